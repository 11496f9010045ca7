"""What is fetched over HTTP: from the address that was checked, within limits, and in time."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from loopback import Dials, Listener, Script, answer, listening, saying
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.fetching import Fetcher
from ppllava_runtime.server.settings import Settings
from ppllava_runtime.server.spool import Spool
from ppllava_runtime.server.urls import Policy

LIMITS = MediaLimits(num_bytes=1 << 20)


async def to_here(*_: object) -> Sequence[str]:
    return ["127.0.0.1"]


def fetcher(*hosts: str, seconds: float = 20.0, **domains: Any) -> Fetcher:
    settings = Settings(private_hosts=hosts, media=LIMITS, **domains)
    return Fetcher(Policy(settings), LIMITS, seconds=seconds, resolve=to_here)


async def fetched(it: Fetcher, url: str) -> bytes:
    async with aclosing(it.fetch(url)) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def refused(it: Fetcher, url: str, code: str = "media_fetch_failed") -> str:
    with pytest.raises(ApiError) as caught:
        await fetched(it, url)
    assert (caught.value.status, caught.value.code) == (400, code)
    return caught.value.message


def ask(
    script: Script, what: Callable[[Listener], Awaitable[Any]], tls: ssl.SSLContext | None = None
) -> Listener:
    """Runs what with a server that answers so; it ends in time, whatever it is."""

    async def run() -> Listener:
        async with listening(script, tls=tls) as listener:
            await asyncio.wait_for(what(listener), 30)
            if listener.num_connections:
                await asyncio.wait_for(listener.closed.wait(), 30)
        return listener

    return asyncio.run(run())


def test_a_request_says_what_it_must_and_no_more() -> None:
    async def what(there: Listener) -> None:
        it = fetcher(f"nvr.lan:{there.port}")
        assert await fetched(it, f"http://NVR.lan:{there.port}/a%20b?c=ä") == b"film"

    there = ask(saying(answer(b"film")), what)
    line, *headers = there.requests[0].split("\r\n")[:-2]
    assert line == "GET /a%20b?c=%C3%A4 HTTP/1.1"
    assert dict(header.split(": ") for header in headers) == {
        "Host": f"nvr.lan:{there.port}",
        "User-Agent": "ppllava-serve",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def test_a_public_name_is_dialled_at_the_address_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    dials = Dials(monkeypatch)

    async def resolve(*_: object) -> Sequence[str]:
        return ["93.184.216.34", "2606:4700:4700::1111"]

    async def run() -> None:
        settings = Settings(media_domains=("media.example.com",))
        it = Fetcher(Policy(settings), LIMITS, resolve=resolve)
        assert "could not be reached" in await refused(it, "https://media.example.com/x")

    asyncio.run(run())
    assert dials.places == [("93.184.216.34", 443), ("2606:4700:4700::1111", 443)]
    assert dials.names == []


def test_the_next_address_is_tried() -> None:
    async def resolve(*_: object) -> Sequence[str]:
        return ["127.0.0.2", "::1", "127.0.0.1"]

    async def what(there: Listener) -> None:
        settings = Settings(private_hosts=(f"nvr.lan:{there.port}",))
        it = Fetcher(Policy(settings), LIMITS, resolve=resolve)
        assert await fetched(it, f"http://nvr.lan:{there.port}/") == b"film"

    ask(saying(answer(b"film")), what)


def test_the_systems_resolver_is_asked_otherwise() -> None:
    async def what(there: Listener) -> None:
        settings = Settings(private_hosts=(f"localhost:{there.port}",))
        it = Fetcher(Policy(settings), LIMITS)
        assert await fetched(it, f"http://localhost:{there.port}/") == b"film"

    ask(saying(answer(b"film")), what)


def test_a_name_without_an_address_is_told() -> None:
    async def resolve(*_: object) -> Sequence[str]:
        raise OSError("no such name")

    async def nothing(*_: object) -> Sequence[str]:
        return []

    settings = Settings(private_hosts=("nvr.lan",))
    it = Fetcher(Policy(settings), LIMITS, resolve=resolve)
    assert "nvr.lan" in asyncio.run(refused(it, "http://nvr.lan/"))
    it = Fetcher(Policy(settings), LIMITS, resolve=nothing)
    asyncio.run(refused(it, "http://nvr.lan/", "media_not_allowed"))


def test_the_largest_file_passes() -> None:
    async def what(there: Listener) -> None:
        it = fetcher(f"127.0.0.1:{there.port}")
        assert await fetched(it, f"http://127.0.0.1:{there.port}/") == bytes(1 << 20)

    ask(saying(answer(bytes(1 << 20))), what)


def test_a_larger_one_is_refused_before_it_is_read() -> None:
    async def never_ending(_: str, reader: asyncio.StreamReader, writer: Any) -> None:
        writer.write(answer(content_length=str((1 << 20) + 1)))
        await reader.read()  # until we are left

    async def what(there: Listener) -> None:
        it = fetcher(f"127.0.0.1:{there.port}")
        await refused(it, f"http://127.0.0.1:{there.port}/", "media_too_large")

    ask(never_ending, what)


def test_one_that_does_not_say_so_is_refused_while_it_is_read(tmp_path: Path) -> None:
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"

    async def endless(_: str, __: object, writer: Any) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:  # until we are left
            writer.write(chunk)
            await writer.drain()

    async def what(there: Listener) -> None:
        spool = Spool(tmp_path, LIMITS)
        it = fetcher(f"127.0.0.1:{there.port}")
        with pytest.raises(ApiError) as caught:
            async with spool.request() as files:
                await files.add(it.fetch(f"http://127.0.0.1:{there.port}/"))
        assert caught.value.code == "media_too_large"
        spool.close()

    ask(endless, what)


BAD = {
    "missing": answer(b"", "404 Not Found"),
    "nothing": b"HTTP/1.1 204 No Content\r\n\r\n",
    "part": answer(b"film", "206 Partial Content", content_range="bytes 0-3/9"),
    "other_protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "broken_off": answer(b"film", content_length="5"),
    "broken_off_chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfilm",
    "broken_off_head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "silence": b"",
    "no_http": b"SSH-2.0-OpenSSH_9.9\r\n",
    "two_lengths": answer(b"film", content_length="4\r\nContent-Length: 5"),
    "no_length": answer(b"film", content_length="-4"),
    "endless_head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    "compressed": answer(gzip.compress(bytes(9 << 20)), content_encoding="gzip"),
    "compressed_twice": answer(b"x", content_encoding="identity\r\nContent-Encoding: gzip"),
    "compressed_on_the_way": answer(b"x", content_length="1", transfer_encoding="gzip"),
    "redirect_nowhere": answer(b"", "302 Found"),
    "redirects_twice": answer(b"", "302 Found", location="/a\r\nLocation: /b"),
    "redirect_no_text": b"HTTP/1.1 302 Found\r\nLocation: /\xff\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_is_none_is_told(name: str) -> None:
    async def what(there: Listener) -> None:
        it = fetcher(f"127.0.0.1:{there.port}")
        message = await refused(it, f"http://127.0.0.1:{there.port}/")
        assert "127.0.0.1" in message

    assert ask(saying(BAD[name]), what).num_connections == 1


# How slow they are; nobody waits for that.
DRIP_SECONDS = 0.01


async def dripping_head(_: str, __: object, writer: Any) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: x\r\n")
        await writer.drain()
        await asyncio.sleep(DRIP_SECONDS)


async def dripping_body(_: str, __: object, writer: Any) -> None:
    writer.write(answer(content_length="100000"))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(DRIP_SECONDS)


async def not_yet(_: str, __: object, writer: Any) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(DRIP_SECONDS)


async def silent(_: str, reader: asyncio.StreamReader, __: object) -> None:
    await reader.read()


@pytest.mark.parametrize("script", [dripping_head, dripping_body, not_yet, silent])
def test_one_deadline_holds_for_all_of_it(script: Script) -> None:
    async def what(there: Listener) -> None:
        it = fetcher(f"127.0.0.1:{there.port}", seconds=0.3)
        assert "in time" in await refused(it, f"http://127.0.0.1:{there.port}/")

    ask(script, what)


def test_a_resolver_that_does_not_answer_is_left_in_time() -> None:
    async def resolve(*_: object) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    settings = Settings(private_hosts=("nvr.lan",))
    it = Fetcher(Policy(settings), LIMITS, seconds=0.1, resolve=resolve)
    assert "in time" in asyncio.run(refused(it, "http://nvr.lan/"))


def test_names_that_nobody_answers_for_keep_no_files_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than a loop has threads of its own; files are written meanwhile."""
    asked, answered = threading.Semaphore(0), threading.Event()

    def resolving(*_: object, **__: object) -> list[object]:
        asked.release()
        assert answered.wait(20)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", resolving)
    settings = Settings(private_hosts=("nvr.lan",), media=LIMITS)
    spool = Spool(tmp_path, LIMITS)
    it = Fetcher(Policy(settings), LIMITS)

    async def run() -> None:
        several = [asyncio.create_task(refused(it, "http://nvr.lan/")) for _ in range(40)]
        assert await asyncio.to_thread(asked.acquire, timeout=20)
        try:
            async with spool.request() as files:
                adding = files.add(it.fetch("data:video/mp4;base64,AAAA"))
                assert (await asyncio.wait_for(adding, 10)).num_bytes == 3
        finally:
            answered.set()
        await asyncio.gather(*several)

    try:
        asyncio.run(run())
    finally:
        it.close()
        spool.close()


def test_who_is_cancelled_leaves_the_connection() -> None:
    async def what(there: Listener) -> None:
        it = fetcher(f"127.0.0.1:{there.port}")
        task = asyncio.create_task(fetched(it, f"http://127.0.0.1:{there.port}/"))
        await there.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    ask(silent, what)


async def three_steps(head: str, _: object, writer: Any) -> None:
    path = head.split()[1]
    if path == "/end":
        writer.write(answer(b"film"))
    else:
        step = int(path.rpartition("/")[2])
        where = f"{step - 1}?x" if step > 1 else "/end"
        status = {1: "308 x", 2: "307 x", 3: "303 x", 4: "302 x"}[step]
        writer.write(answer(b"not here", status, location=where, set_cookie="a=b"))
    await writer.drain()


async def step(head: str, reader: Any, writer: Any) -> None:
    await three_steps(head.replace("?x", ""), reader, writer)


def test_redirects_are_followed_three_times() -> None:
    async def what(there: Listener) -> None:
        it = fetcher(f"127.0.0.1:{there.port}")
        assert await fetched(it, f"http://127.0.0.1:{there.port}/a/3") == b"film"
        assert "3 redirects" in await refused(it, f"http://127.0.0.1:{there.port}/a/4")

    there = ask(step, what)
    asked = [head.split()[1] for head in there.requests]
    assert asked == ["/a/3", "/a/2?x", "/a/1?x", "/end", "/a/4", "/a/3?x", "/a/2?x", "/a/1?x"]
    assert not any("cookie" in head.lower() for head in there.requests)


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


def test_files_and_data_come_in_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "b.mp4").write_bytes(bytes((1 << 20) + 1))
    it = fetcher(media_roots=(tmp_path,))

    async def run() -> None:
        assert await fetched(it, f"file://{tmp_path}/a.mp4") == bytes(range(256)) * 4096
        await refused(it, f"file://{tmp_path}/b.mp4", "media_too_large")
        assert await fetched(it, "data:video/mp4;base64,aGVsbG8=") == b"hello"

    asyncio.run(run())
