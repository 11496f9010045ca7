"""Hundreds of URLs that must lead nowhere: nothing is dialled but what is allowed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from errno import EADDRINUSE
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

import hostile_urls
from loopback import Dials, Listener, answer, listening, saying
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.fetching import Fetcher
from ppllava_runtime.server.settings import Settings
from ppllava_runtime.server.urls import Policy

CODES = {"invalid_url", "media_not_allowed", "media_fetch_failed", "media_too_large"}
PUBLIC = "93.184.216.34"


class Here:
    """Two servers that must never be asked, at one port, and one that redirects.

    Its resolver knows every name: to be here.
    """

    def __init__(
        self, canaries: Sequence[Listener], guide: Listener, roots: Iterable[Path]
    ) -> None:
        self.canaries, self.guide = canaries, guide
        self.port = canaries[0].port
        self.resolved: list[str] = []
        self.answers: Sequence[Sequence[str]] = [["127.0.0.1", "::1"]]
        self.settings = Settings(
            media_domains=(
                "media.example.com",
                f"media.example.com:{self.port}",
                f"*.cdn.example.com:{self.port}",
                "93.184.216.34",
            ),
            private_hosts=(f"guide.lan:{guide.port}",),
            media_roots=tuple(roots),
        )
        self.fetcher = Fetcher(Policy(self.settings), self.settings.media, resolve=self.resolve)

    async def resolve(self, host: str, _: int) -> Sequence[str]:
        self.resolved.append(host)
        if host == "guide.lan":
            return ["127.0.0.1"]
        return self.answers[min(len(self.resolved), len(self.answers)) - 1]

    async def fetch(self, url: str) -> bytes:
        async with aclosing(self.fetcher.fetch(url)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def refuses(self, url: str) -> None:
        with pytest.raises(ApiError) as caught:
            await self.fetch(url)
        assert caught.value.status == 400, url
        assert caught.value.code in CODES, url
        assert "\n" not in caught.value.message, url

    @property
    def num_visits(self) -> int:
        return sum(canary.num_connections for canary in self.canaries)


async def redirect(head: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Redirects to what is asked for in the path."""
    where = unquote(head.split()[1].removeprefix("/?to="))
    sent = where.encode("utf-8", "surrogatepass").replace(b"\n", b"").replace(b"\r", b"")
    writer.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + sent + b"\r\n\r\n")
    await writer.drain()


@asynccontextmanager
async def here(roots: Iterable[Path] = ()) -> AsyncIterator[Here]:
    async with AsyncExitStack() as stack:
        good = saying(answer(b"secret"))
        for tries_left in reversed(range(20)):
            first = await stack.enter_async_context(listening(good))
            try:
                canary = listening(good, "::1", port=first.port)
                second = await stack.enter_async_context(canary)
                break
            except OSError as error:  # what is free at one address may be taken at the other
                if error.errno != EADDRINUSE or not tries_left:
                    raise
        guide = await stack.enter_async_context(listening(redirect))
        yield Here((first, second), guide, roots)


@pytest.fixture
def dials(monkeypatch: pytest.MonkeyPatch) -> Dials:
    # Whoever asked these would not ask who is dialled.
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    return Dials(monkeypatch)


def test_there_are_as_many_as_promised() -> None:
    assert len(set(hostile_urls.all_direct(8080))) >= 300


@pytest.mark.parametrize(
    "kind",
    [
        hostile_urls.by_number,
        hostile_urls.by_number_6,
        hostile_urls.by_name,
        hostile_urls.by_user,
        hostile_urls.by_control,
        hostile_urls.by_port,
        hostile_urls.by_scheme,
    ],
)
def test_asking_for_it_dials_nothing(kind: Callable[[int], Iterable[str]], dials: Dials) -> None:
    async def run() -> None:
        async with here() as it:
            dials.names.clear()  # of the servers here
            for url in kind(it.port):
                await it.refuses(url)
            assert it.num_visits == 0
            assert dials.names == []
            # Names that are allowed may be looked up: the answer was refused.
            assert set(it.resolved) <= {"media.example.com"}

    asyncio.run(run())
    assert dials.places == []


def test_redirecting_to_it_dials_nothing_more(dials: Dials) -> None:
    async def run() -> int:
        async with here() as it:
            urls = [*hostile_urls.all_direct(it.port), *hostile_urls.in_redirects(it.port)]
            for url in urls:
                quoted = quote(url.encode("utf-8", "surrogatepass"), safe="")
                await it.refuses(f"http://guide.lan:{it.guide.port}/?to={quoted}")
            assert it.num_visits == 0
            assert len(it.guide.requests) >= len(urls)
            return it.guide.port

    port = asyncio.run(run())
    assert set(dials.places) == {("127.0.0.1", port)}


@pytest.mark.parametrize("among", ["alone", "first", "last"])
def test_an_allowed_name_that_leads_inside_dials_nothing(among: str, dials: Dials) -> None:
    inner = [*hostile_urls.INNER, *hostile_urls.INNER_6, "100.64.0.1", "224.0.0.1", "240.0.0.1"]
    inner += [
        "255.255.255.255",
        "0.0.0.0",
        "192.0.0.8",
        "198.18.0.1",
        "168.63.129.16",
        "fe80::1%lo",
    ]
    inner += [host for address in hostile_urls.INNER for host in hostile_urls.carriers(address)]
    inner += [f"{host}%lo" for host in hostile_urls.carriers("127.0.0.1")]

    async def run() -> None:
        async with here() as it:
            for address in inner:
                it.resolved.clear()
                it.answers = [
                    {"alone": [address], "first": [address, PUBLIC], "last": [PUBLIC, address]}[
                        among
                    ]
                ]
                await it.refuses(f"http://a.cdn.example.com:{it.port}/")
                assert len(it.resolved) == 1
            assert it.num_visits == 0

    asyncio.run(run())
    assert dials.places == []


def test_a_name_that_changes_is_dialled_where_it_was_when_it_was_checked(dials: Dials) -> None:
    async def run() -> int:
        async with here() as it:
            it.answers = [[PUBLIC, "1.1.1.1", PUBLIC], ["127.0.0.1"], ["::1"]]
            await it.refuses(f"http://media.example.com:{it.port}/")
            assert it.resolved == ["media.example.com"]
            assert it.num_visits == 0
            return it.port

    port = asyncio.run(run())
    assert dials.places == [(PUBLIC, port), ("1.1.1.1", port)]


def test_files_outside_of_the_folder_stay_closed(tmp_path: Path, dials: Dials) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret.bin"
    (allowed / "folder").mkdir(parents=True)
    (tmp_path / "allowed2").mkdir()
    for path in (secret, tmp_path / "allowed2" / "good.bin"):
        path.write_bytes(b"secret")
    for path in (allowed / "good.bin", allowed / "folder" / "good.bin"):
        path.write_bytes(b"good")
    (allowed / "link").symlink_to(secret)
    (allowed / "folder_link").symlink_to(tmp_path)
    (allowed / "loop").symlink_to(allowed / "loop")
    os.mkfifo(allowed / "pipe")

    async def run() -> None:
        async with here([allowed]) as it:
            for url in hostile_urls.by_file(str(allowed), str(secret)):
                await it.refuses(url)
            assert await it.fetch(f"file://{allowed}/good.bin") == b"good"
            assert await it.fetch(f"file://{allowed}/folder/good.bin") == b"good"
            assert await it.fetch(f"file://localhost{allowed}/%67ood.bin") == b"good"

    asyncio.run(run())
    assert dials.places == []


def test_those_servers_would_have_been_reached(dials: Dials) -> None:
    """The same servers, once they are allowed: nothing above passed for want of a server."""

    async def run() -> None:
        async with here() as it:
            places = [f"127.0.0.1:{it.port}", f"[::1]:{it.port}", f"nvr.lan:{it.port}"]
            settings = Settings(private_hosts=tuple(places))
            fetcher = Fetcher(Policy(settings), settings.media, resolve=it.resolve)
            it.fetcher = fetcher
            for number, place in enumerate(places, 1):
                assert await it.fetch(f"http://{place}/") == b"secret"
                assert it.num_visits == number
            quoted = quote(f"http://127.0.0.1:{it.port}/", safe="")
            await it.refuses(f"http://guide.lan:{it.guide.port}/?to={quoted}")

    asyncio.run(run())
    assert len(dials.places) == 3
