"""What is fetched over TLS: of the name that was asked for, and of nobody else."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from fetches import ask, fetched, fetcher, refused, silent
from loopback import Listener, answer, listening, saying


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of nvr.lan by itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate: NOT RUN")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    rest: list[str | Path] = [
        "-subj",
        "/CN=nvr.lan",
        "-addext",
        "subjectAltName=DNS:nvr.lan",
        "-keyout",
        path,
    ]
    subprocess.run(
        [*command.split(), *rest, "-out", path.with_suffix(".crt")], check=True, capture_output=True
    )
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


def server_side(certificate: Path, names: list[str | None]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _, name, __: names.append(name)
    return context


def test_tls_is_of_the_name_that_was_asked_for(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    names: list[str | None] = []

    async def what(there: Listener) -> None:
        it = fetcher(f"nvr.lan:{there.port}", f"other.lan:{there.port}")
        assert await fetched(it, f"https://nvr.lan:{there.port}/") == b"film"
        # Whose certificate is another's is nobody.
        await refused(it, f"https://other.lan:{there.port}/")

    there = ask(saying(answer(b"film")), what, server_side(certificate, names))
    assert names == ["nvr.lan", "other.lan"]
    assert len(there.requests) == 1


def test_a_certificate_of_nobody_is_refused(certificate: Path) -> None:
    names: list[str | None] = []

    async def what(there: Listener) -> None:
        it = fetcher(f"nvr.lan:{there.port}")
        await refused(it, f"https://nvr.lan:{there.port}/")
        there.closed.set()  # it never got as far as to be one

    assert ask(saying(answer(b"film")), what, server_side(certificate, names)).requests == []


def test_a_handshake_that_hangs_is_left_in_time() -> None:
    async def what(there: Listener) -> None:
        it = fetcher(f"127.0.0.1:{there.port}", seconds=0.3)
        await refused(it, f"https://127.0.0.1:{there.port}/")

    ask(silent, what)


def test_no_redirect_leaves_https(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))

    async def what(plain: Listener) -> None:
        script = saying(answer(b"", "302 Found", location=f"http://127.0.0.1:{plain.port}/"))
        async with listening(script, tls=server_side(certificate, [])) as there:
            it = fetcher(f"nvr.lan:{there.port}", f"127.0.0.1:{plain.port}")
            assert await fetched(it, f"http://127.0.0.1:{plain.port}/") == b"film"
            await refused(it, f"https://nvr.lan:{there.port}/", "media_not_allowed")

    assert ask(saying(answer(b"film")), what).num_connections == 1
