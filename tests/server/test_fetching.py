"""What is fetched over HTTP: from the address that was checked, within limits, and in time."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fetches import LIMITS, ask, fetched, fetcher, refused, silent
from loopback import Dials, Listener, Script, answer, saying
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.fetching import Fetcher
from ppllava_runtime.server.settings import Settings
from ppllava_runtime.server.spool import Spool
from ppllava_runtime.server.urls import Policy


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


def test_files_and_data_come_in_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "b.mp4").write_bytes(bytes((1 << 20) + 1))
    it = fetcher(media_roots=(tmp_path,))

    async def run() -> None:
        assert await fetched(it, f"file://{tmp_path}/a.mp4") == bytes(range(256)) * 4096
        await refused(it, f"file://{tmp_path}/b.mp4", "media_too_large")
        assert await fetched(it, "data:video/mp4;base64,aGVsbG8=") == b"hello"

    asyncio.run(run())
