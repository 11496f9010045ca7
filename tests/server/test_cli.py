"""The command line of the server: what it takes, and what it refuses before it does anything."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.server import cli
from ppllava_runtime.server.settings import Settings
from server_process import PATHS, SERVE, Serve

KEY = "a-key-of-enough-letters"
# The same where neither starlette nor anything else of the extra can be imported.
BARE = f"""
import sys
for name in ("starlette", "uvicorn", "websockets", "pydantic", "prometheus_client", "httpx2"):
    sys.modules[name] = None
{SERVE}
"""


def refused(
    *arguments: object, code: str = SERVE, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and last line of stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": PATHS} | (env or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()[-1]


def test_without_keys_only_the_loopback_is_listened_on(bundle: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "server.example"):
        status, told = refused(bundle, "--host", host)
        assert status == 2
        assert f"--host {host}: without API keys only this machine may ask" in told
        assert "--api-keys FILE" in told


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_the_loopback_needs_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cli.KEYS_VARIABLE, raising=False)
    options, settings = cli.read(["bundle", "--host", host])
    assert (options.host, settings.api_keys) == (host, ())


def test_another_address_of_the_loopback_is_answered(serve: Serve) -> None:
    server = serve("--host", "127.0.0.2")
    assert server.url == f"http://127.0.0.2:{server.port}"
    assert httpx2.get(f"{server.url}/v1/models").status_code == 200


def test_with_keys_any_address_is_listened_on(serve: Serve) -> None:
    server = serve("--host", "0.0.0.0", env={cli.KEYS_VARIABLE: f"{KEY} {KEY}2"}, key=KEY)
    assert httpx2.get(f"http://127.0.0.1:{server.port}/v1/models").status_code == 401
    assert f"--host {KEY}" not in Path(f"/proc/{server.process.pid}/cmdline").read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "there is no key in it"),
        (" \n \n", "there is no key in it"),
        ("short", "key 1 is not 16 or more characters"),
        (f"{KEY}\nschlüssel-aus-worten", "key 2 is not 16 or more characters of ASCII"),
    ],
)
def test_keys_that_are_none_are_refused(bundle: Path, tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    status, error = refused(bundle, "--api-keys", path)
    assert status == 2
    assert told in error
    assert not any(word in error for word in text.split())


def test_keys_that_are_not_there_are_refused(bundle: Path, tmp_path: Path) -> None:
    assert refused(bundle, "--api-keys", tmp_path / "none")[0] == 66


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "65536"], "is not a port"),
        (["--running", "0"], "is not a whole number above 0"),
        (["--queued", "-1"], "is not a whole number above 0"),
        (["--body-size", "12X"], "is not a size: 1000, 64K, 256M or 1.5G"),
        (["--body-size", "0"], "is not a size"),
        (["--cache-size", "infG"], "is not a size"),
        (["--head-timeout", "0"], "is not a number of seconds above 0"),
        (["--head-timeout", "nan"], "is not a number of seconds above 0"),
        (["--head-timeout", "inf"], "is not a number of seconds above 0"),
    ],
)
def test_values_without_a_meaning_are_refused(flags: list[str], told: str) -> None:
    status, error = refused("bundle", *flags)
    assert status == 2
    assert told in error


def test_a_folder_of_media_must_be_there(bundle: Path, tmp_path: Path) -> None:
    status, error = refused(bundle, "--media-root", tmp_path / "none")
    assert status == 66
    assert "there is no such folder" in error


def test_an_address_in_use_is_refused(bundle: Path, serve: Serve) -> None:
    server = serve()
    status, error = refused(bundle, "--port", server.port)
    assert status == 69
    assert f"port {server.port} cannot be listened on" in error


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none", "--port", 0)[0] == 66


def test_without_the_extra_it_says_what_to_install(bundle: Path) -> None:
    status, error = refused(bundle, code=BARE)
    assert status == 69
    assert "pip install 'ppllava-edge[serve]'" in error
    assert refused(bundle, "--host", "0.0.0.0", code=BARE)[0] == 2  # it is read all the same


def test_sizes_are_in_binary_units() -> None:
    flags = ["bundle", "--body-size", "1.5M", "--media-size", "2g", "--cache-size", "1000"]
    _, settings = cli.read(flags)
    assert settings.body_bytes == 3 << 19
    assert settings.media.num_bytes == 2 << 30
    assert settings.cache_bytes == 1000


def test_every_setting_has_a_flag() -> None:
    """And the defaults of the command line are those of the class."""
    options, settings = cli.read(["bundle"])
    for kind in (Settings, MediaLimits):
        names = {field.name for field in dataclasses.fields(kind)}
        assert names - {"media"} <= vars(options).keys()
    assert settings == Settings()
