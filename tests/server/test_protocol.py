"""Connections that do not do their part: each is closed in time, and costs others nothing."""

from __future__ import annotations

import asyncio
import re
import socket
import time

import httpx2
import pytest

from load import Withheld, alone, question
from server_process import Serve, Served

HEAD_SECONDS, BODY_SECONDS = 1.0, 1.5
SLACK_SECONDS = 3.0  # of a machine that is busy with 200 of them
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
BODY = HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


@pytest.fixture
def strict(serve: Serve) -> Served:
    return serve("--head-timeout", HEAD_SECONDS, "--body-timeout", BODY_SECONDS)


async def half_open(port: int, beginning: bytes, trickle: bytes = b"") -> tuple[float, bytes]:
    """How long such a connection lasted, and what it was told."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(beginning)

    async def drip() -> None:
        while True:
            await asyncio.sleep(0.1)
            writer.write(trickle)

    dripping = asyncio.create_task(drip()) if trickle else None
    try:
        told = await reader.read()
    except ConnectionError:
        told = b""
    finally:
        if dripping is not None:
            dripping.cancel()
    lasted = time.monotonic() - began
    writer.close()
    return lasted, told


def test_200_half_open_connections_end_in_time(strict: Served) -> None:
    kinds = {
        "nothing": (b"", b"", HEAD_SECONDS),
        "half a head": (HEAD, b"", HEAD_SECONDS),
        "a head byte by byte": (HEAD, b"X", HEAD_SECONDS),
        "half a body": (BODY + b"{", b"", BODY_SECONDS),
        "a body byte by byte": (BODY, b" ", BODY_SECONDS),
    }

    async def run() -> None:
        waiting = {
            name: [
                asyncio.create_task(half_open(strict.port, beginning, trickle)) for _ in range(40)
            ]
            for name, (beginning, trickle, _) in kinds.items()
        }
        everything = asyncio.gather(*(task for tasks in waiting.values() for task in tasks))
        num_good = 0
        async with httpx2.AsyncClient(base_url=strict.url) as client:
            while not everything.done():
                assert (await client.get("/v1/models")).status_code == 200
                num_good += 1
                await asyncio.sleep(0)
        await everything
        assert num_good >= 5
        for name, (_, trickle, limit) in kinds.items():
            for lasted, told in [await task for task in waiting[name]]:
                assert limit - 0.1 < lasted < limit + SLACK_SECONDS, name
                # Who still sends may lose what was said.
                is_told = told.startswith(b"HTTP/1.1 408 ") and b'"timeout"' in told
                assert is_told or (trickle and not told), (name, told)

    asyncio.run(run())


def test_an_idle_connection_may_be_used_again(strict: Served) -> None:
    """The deadline is of a request, not of a connection that has had one."""
    with socket.create_connection(("127.0.0.1", strict.port), 10) as connection:
        for pause in (0.0, HEAD_SECONDS + 0.3, 0.0):
            # What is tested is that time passes; nothing is waited for.
            time.sleep(pause)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            told = b""
            while not told.endswith(b"}"):
                told += connection.recv(1000)
            assert told.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health")  # and half of one more
        told = b""
        while piece := connection.recv(1000):
            told += piece
        assert told.startswith(b"HTTP/1.1 408 ")


def test_pipelined_requests_are_answered_in_order(strict: Served) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), 10) as connection:
        request = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(request % b"/health" + request % b"/nowhere" + b"GET /he")
        told = b""
        while piece := connection.recv(1000):
            told += piece
    assert re.findall(rb"HTTP/1\.1 (\d+) ", told) == [b"200", b"404", b"408"]


def test_an_answer_that_takes_too_long_ends(serve: Serve) -> None:
    """A body may be slow within its own time, but all together has an end too."""
    server = serve("--request-timeout", 1.0, "--body-timeout", 60.0)
    lasted, told = asyncio.run(half_open(server.port, BODY, b" "))
    assert 0.9 < lasted < 1.0 + SLACK_SECONDS
    assert told.startswith(b"HTTP/1.1 408 ") or not told


def test_an_answer_that_is_not_there_in_time_is_given_up(serve: Serve) -> None:
    with Withheld() as media:
        server = serve("--request-timeout", 1.0, "--private-host", media.host)
        reply = asyncio.run(alone(server.port, question(server.model, url=media.url)))
        assert reply.status == 408
        assert b"the answer took longer than 1 s" in reply.body
        assert reply.seconds < 1.0 + SLACK_SECONDS
        # And nothing goes on behind it.
        end = time.monotonic() + 10
        while b"ppllava_requests_running 0.0" not in httpx2.get(f"{server.url}/metrics").content:
            assert time.monotonic() < end


def test_one_connection_too_many_is_told_so(serve: Serve) -> None:
    server = serve("--connections", 5)
    several = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(5)]
    try:
        with socket.create_connection(("127.0.0.1", server.port), 10) as refused:
            assert refused.recv(1000).startswith(b"HTTP/1.1 503 ")
        several.pop().close()
        # Until the server has seen that one go, it may refuse the next.
        end = time.monotonic() + 10
        while httpx2.get(f"{server.url}/health").status_code != 200:
            assert time.monotonic() < end
    finally:
        for connection in several:
            connection.close()
