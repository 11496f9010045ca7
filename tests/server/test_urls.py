"""What a URL is: one reading of it, and only where settings allow."""

from __future__ import annotations

import base64
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import hostile_urls
from ppllava_engines.errors import UsageError
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.server.addresses import is_public, is_unicast
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.settings import Settings
from ppllava_runtime.server.urls import Inline, Local, Policy, Remote

PUBLIC = ("media.example.com", "*.cdn.example.com", "other.example.com:8443", "bücher.example")
PRIVATE = ("nvr.lan", "nvr.lan:8080", "192.168.1.5", "127.0.0.1:81", "[::1]:81", "fd00::5")
POLICY = Policy(Settings(media_domains=PUBLIC, private_hosts=PRIVATE))


def code_of(call: Callable[..., object], *args: Any) -> str | None:
    with pytest.raises(ApiError) as caught:
        call(*args)
    assert caught.value.status == 400
    return caught.value.code


def remote(url: str) -> Remote:
    target = POLICY.parse(url)
    assert isinstance(target, Remote)
    return target


@pytest.mark.parametrize(
    ("url", "scheme", "authority", "path"),
    [
        ("http://media.example.com/a.mp4", "http", "media.example.com", "/a.mp4"),
        ("HTTPS://Media.Example.COM./a", "https", "media.example.com", "/a"),
        ("https://media.example.com:443/a", "https", "media.example.com", "/a"),
        ("https://media.example.com", "https", "media.example.com", "/"),
        ("https://media.example.com?x=1&y=@/:", "https", "media.example.com", "/?x=1&y=@/:"),
        ("https://a.b.cdn.example.com/ä/%20", "https", "a.b.cdn.example.com", "/%C3%A4/%20"),
        ("https://other.example.com:8443/", "https", "other.example.com:8443", "/"),
        ("https://bücher.example/", "https", "xn--bcher-kva.example", "/"),
        ("https://BÜCHER。example/", "https", "xn--bcher-kva.example", "/"),
        ("https://xn--bcher-kva.example/", "https", "xn--bcher-kva.example", "/"),
        ("http://nvr.lan:8080/live?ch=1", "http", "nvr.lan:8080", "/live?ch=1"),
        ("https://nvr.lan/", "https", "nvr.lan", "/"),
        ("http://127.0.0.1:81//x", "http", "127.0.0.1:81", "//x"),
        ("http://[::1]:81/x", "http", "[::1]:81", "/x"),
        ("http://[fd00::5]/x", "http", "[fd00::5]", "/x"),
    ],
)
def test_allowed_ones_are_read(url: str, scheme: str, authority: str, path: str) -> None:
    target = remote(url)
    assert (target.scheme, target.authority, target.path) == (scheme, authority, path)


def test_nothing_is_allowed_by_default() -> None:
    policy = Policy(Settings())
    for url in ("https://example.com/", "http://127.0.0.1/", "file:///etc/passwd"):
        assert code_of(policy.parse, url) == "media_not_allowed"
    assert isinstance(policy.parse("data:video/mp4;base64,AAAA"), Inline)


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example.com/",
        "http://nvr.lan:81/",
        "http://127.0.0.1/",
        "https://192.168.1.5:80/",
        "http://cdn.example.com/",
        "http://x.media.example.com/",
    ],
)
def test_a_host_is_allowed_at_its_ports_only(url: str) -> None:
    assert code_of(POLICY.parse, url) == "media_not_allowed"


def test_an_allowed_address_has_one_form() -> None:
    usual = ("127.0.0.1", "127.0.0.1.")
    others = [host for host in hostile_urls.numbers("127.0.0.1") if host not in usual]
    others += [f"[{host}]" for host in hostile_urls.carriers("127.0.0.1")]
    others += ["[0:0:0:0:0:0:0:1]", "[::01]", "[0::1]", "[::1%lo]", "[::0.0.0.1]"]
    for host in others:
        assert code_of(POLICY.parse, f"http://{host}:81/") in ("invalid_url", "media_not_allowed")
    for host in (*usual, "[::1]"):
        assert remote(f"http://{host}:81/").private


@pytest.mark.parametrize("host", ["[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[fe80::1]", "0.0.0.0"])
def test_some_addresses_cannot_be_allowed(host: str) -> None:
    policy = Policy(Settings(private_hosts=(host,)))
    assert code_of(policy.parse, f"http://{host}/") == "media_not_allowed"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/b", "http://nvr.lan:8080/b"),
        ("b?x", "http://nvr.lan:8080/a/b?x"),
        ("?y", "http://nvr.lan:8080/a/old?y"),
        ("//nvr.lan/b", "http://nvr.lan/b"),
        ("http://nvr.lan:8080", "http://nvr.lan:8080/"),
        ("https://media.example.com/b", "https://media.example.com/b"),
        ("/ä", "http://nvr.lan:8080/%C3%A4"),
    ],
)
def test_redirects_are_joined(location: str, expected: str) -> None:
    found = POLICY.follow(remote("http://nvr.lan:8080/a/old?q=/"), location)
    assert f"{found.scheme}://{found.authority}{found.path}" == expected


@pytest.mark.parametrize(
    "location", ["/a\\b", "/a#b", "/a b", "\\\\evil.example\\", "/" + "a" * 9000]
)
def test_redirects_are_read_as_strictly(location: str) -> None:
    before = remote("http://nvr.lan:8080/a/old")
    assert code_of(POLICY.follow, before, location) == "invalid_url"


def test_a_password_is_refused_and_not_told() -> None:
    with pytest.raises(ApiError, match="a user or a password") as caught:
        POLICY.parse("http://me:hunter2@media.example.com/")
    assert "hunter2" not in caught.value.message


def test_redirects_keep_to_https() -> None:
    before = remote("https://media.example.com/")
    assert code_of(POLICY.follow, before, "http://media.example.com/") == "media_not_allowed"
    assert POLICY.follow(before, "//media.example.com/x").scheme == "https"
    for location in ("file:///etc/passwd", "data:video/mp4;base64,AAAA", "//evil.example/"):
        assert code_of(POLICY.follow, before, location) == "media_not_allowed"


def content(url: str, policy: Policy = POLICY) -> bytes:
    target = policy.parse(url)
    assert isinstance(target, Inline)
    return b"".join(target.chunks())


@pytest.mark.parametrize(
    "url",
    [
        "data:video/mp4;base64,aGVsbG8=",
        "DATA:Image/PNG;Base64,aGVsbG8=",
        "data:;base64,aGVsbG8=",
        "data:application/octet-stream;base64,aGVsbG8=",
        "data:video/mp4;codecs=avc1;base64,aGVsbG8=",
    ],
)
def test_data_is_decoded(url: str) -> None:
    assert content(url) == b"hello"


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,",
        "data:video/mp4,hello",
        "data:video/mp4;base64",
        "data:video/mp4;base64;x=1,AAAA",
        "data:text/html;base64,AAAA",
        "data:video/mp4;base64,A",
        "data:video/mp4;base64,AAA",
        "data:video/mp4;base64,AA==AAAA",
        "data:video/mp4;base64,AA A",
        "data:video/mp4;base64,AAAA\n",
        "data:video/mp4;base64,ÄAAA",
        "data:video/mp4;base64,AA_-",
        f"data:video/mp4;base64,{'A' * (1 << 20)}=AAA",
        f"data:video/mp4;base64,{'A' * ((1 << 20) - 4)}AA==AAAA",
        f"data:video/{'x' * 300};base64,AAAA",
    ],
)
def test_data_of_another_form_is_refused(url: str) -> None:
    assert code_of(content, url) == "invalid_url"


def test_data_that_is_too_large_is_refused_before_it_is_decoded() -> None:
    policy = Policy(Settings(media=MediaLimits(num_bytes=3)))
    assert content("data:;base64,AAAA", policy) == bytes(3)
    assert code_of(policy.parse, "data:;base64,AAAAAAAA") == "media_too_large"


@given(size=st.integers(2 << 18, 3 << 18))
def test_data_in_blocks_is_the_data(size: int) -> None:
    sent = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert content(f"data:;base64,{base64.b64encode(sent).decode()}") == sent


PIECES = [
    *(
        "http://",
        "https:",
        "//",
        "/",
        "@",
        ":",
        ":8080",
        ".",
        "?",
        "#",
        "\\",
        "%2e",
        "file:",
        "data:",
    ),
    *(
        "media.example.com",
        "127.0.0.1",
        "[::1]",
        "nvr.lan",
        "0x7f",
        "。",
        "１",
        "\u00ad",
        "ß",
        "xn--",
    ),
]


@given(url=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join))
@example("http://media.example.com@127.0.0.1/")
def test_whatever_is_read_is_allowed(url: str) -> None:
    target = None
    with suppress(ApiError):
        target = POLICY.parse(url)
    if isinstance(target, Remote):
        hosts = {"media.example.com", "nvr.lan", "127.0.0.1", "::1", "xn--bcher-kva.example"}
        assert target.host in hosts or target.host.endswith(".cdn.example.com")
        assert target.port in (80, 443, 81, 8080)
        assert target.path.isascii()
        assert target.path.isprintable()
        # It is one and the same however often it is read.
        assert POLICY.parse(f"{target.scheme}://{target.authority}{target.path}") == target


@pytest.mark.parametrize(
    "settings",
    [
        {"media_domains": ("*",)},
        {"media_domains": ("https://example.com",)},
        {"media_domains": ("example.com/x",)},
        {"media_domains": ("*.*.example.com",)},
        {"media_domains": ("*.10.0.0.1",)},
        {"media_domains": ("",)},
        {"private_hosts": ("*.lan",)},
        {"private_hosts": ("nvr.lan:0",)},
        {"private_hosts": ("0x7f.1",)},
        {"private_hosts": ("[0:0:0:0:0:0:0:1]",)},
        {"private_hosts": ("user@nvr.lan",)},
        {"media_roots": (Path("/missing/folder"),)},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Policy(Settings(**settings))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00::1"])
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", [*hostile_urls.INNER, *hostile_urls.INNER_6])
def test_inner_addresses_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    for carrier in hostile_urls.carriers("1.1.1.1"):
        assert not is_public(ip_address(carrier))
        assert not is_unicast(ip_address(carrier), by_name=False)


def test_link_local_is_dialled_by_number_only() -> None:
    address = ip_address("169.254.169.254")
    assert is_unicast(address, by_name=False)
    assert not is_unicast(address, by_name=True)


def read(target: object) -> bytes:
    assert isinstance(target, Local)
    with os.fdopen(target.open(), "rb") as file:
        return file.read()


def test_files_are_found_by_either_name_of_their_folder(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    (real / "a" / "a").mkdir(parents=True)
    (real / "a" / "a" / "ä b.mp4").write_bytes(b"film")
    link.symlink_to(real)
    policy = Policy(Settings(media_roots=(link,)))
    for root in (real, link):
        assert read(policy.parse(f"file://{root}/a/a/%C3%A4%20b.mp4")) == b"film"
        assert read(policy.parse(f"file://{root}/a/a/ä%20b.mp4")) == b"film"


def test_a_link_that_is_swapped_in_loses_the_race(tmp_path: Path) -> None:
    root, outside, spare = tmp_path / "root", tmp_path / "outside", tmp_path / "spare"
    for folder, what in ((root / "sub", b"good"), (outside, b"secret")):
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(what)
    target = Policy(Settings(media_roots=(root,))).parse(f"file://{root}/sub/x")
    assert isinstance(target, Local)
    done = Event()

    def swap() -> None:
        while not done.is_set():
            (root / "sub").rename(spare)
            (root / "sub").symlink_to(outside)
            (root / "sub").unlink()
            spare.rename(root / "sub")

    thread = Thread(target=swap)
    thread.start()
    seen: set[object] = set()
    try:
        for _ in range(200_000):
            try:
                seen.add(read(target))
            except ApiError as error:
                seen.add(getattr(error.__cause__, "errno", None))
            if seen >= {b"good", errno.ENOENT, errno.ENOTDIR}:  # it was tried at each moment
                break
    finally:
        done.set()
        thread.join()
    assert b"good" in seen
    assert errno.ENOTDIR in seen
    assert b"secret" not in seen
