"""Connections that do not do their part: each is closed in time, and costs others nothing."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from load import Withheld, alone, question
from ppllava_runtime.server.metrics import Metrics
from ppllava_runtime.server.protocol import protocol_of
from ppllava_runtime.server.settings import Settings
from server_process import Serve, Served, served

HEAD_SECONDS, BODY_SECONDS = 1.0, 1.5
SLACK_SECONDS = 8.0  # of a machine that is busy with 200 of them
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
CHUNKED = HEAD + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


@pytest.fixture(scope="module")
def strict(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ("--head-timeout", HEAD_SECONDS, "--body-timeout", BODY_SECONDS)
    with served(bundle, tmp_path_factory.mktemp("strict"), *flags) as it:
        yield it


def all_of(connection: socket.socket) -> bytes:
    """What comes until the other end closes."""
    told = b""
    while piece := connection.recv(4096):
        told += piece
    return told


async def half_open(port: int, beginning: bytes, trickle: bytes = b"") -> tuple[float, bytes]:
    """How long such a connection lasted, and what it was told."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(beginning)

    async def drip() -> None:
        while True:
            await asyncio.sleep(0.1)  # how slow it is; nobody waits for that
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
        assert num_good >= 1
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
        for number in range(3):
            if number == 1:
                # One that came later, and never began, is closed: more than its time is over.
                with socket.create_connection(("127.0.0.1", strict.port), 10) as later:
                    assert all_of(later).startswith(b"HTTP/1.1 408 ")
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            told = b""
            while not told.endswith(b"}"):
                told += (piece := connection.recv(1000))
                assert piece, told
            assert told.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health")  # and half of one more
        assert all_of(connection).startswith(b"HTTP/1.1 408 ")


def test_pipelined_requests_are_answered_in_order(strict: Served) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), 10) as connection:
        request = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(request % b"/health" + request % b"/nowhere" + b"GET /he")
        told = all_of(connection)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", told) == [b"200", b"404", b"408"]


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time passes when it is told so, too."""

    _ahead = 0.0

    def time(self) -> float:
        return super().time() + self._ahead

    async def passes(self, seconds: float) -> None:
        """Returns when so much time has passed, and what was to happen then has."""
        self._ahead += seconds
        passed = self.create_future()
        self.call_at(self.time(), passed.set_result, None)
        await passed


def test_a_pipelined_request_has_its_own_time() -> None:
    loop, settings, state = Clock(), Settings(), ServerState()

    async def run() -> bytes:
        begun, go_on = asyncio.Queue[str](), asyncio.Semaphore(0)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            begun.put_nowait(scope["path"])
            await go_on.acquire()
            await Response()(scope, receive, send)

        config = Config(app, log_config=None, proxy_headers=False)
        made = protocol_of(settings, Metrics("0", "model", "cpu"))(config, state, {}, loop)  # type: ignore[call-arg]  # as uvicorn makes it
        ours, theirs = socket.socketpair()
        transport, _ = await loop.connect_accepted_socket(lambda: made, ours)
        reader, writer = await asyncio.open_connection(sock=theirs)
        paths = ["/first", "/second", "/third"]
        for path in paths:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        for path in paths:
            assert await asyncio.wait_for(begun.get(), 20) == path
            # But the last, each is answered in time, the second after the time of the first.
            await loop.passes(settings.request_seconds - 60 if path != paths[-1] else 400)
            go_on.release()
        told = await reader.read()
        await asyncio.gather(*state.tasks)
        writer.close()
        transport.abort()
        await loop.passes(0)
        return told

    try:
        told = loop.run_until_complete(run())
    finally:
        loop.close()
    assert re.findall(rb"HTTP/1\.1 (\d+) ", told) == [b"200", b"200", b"400"]
    assert b"the answer took longer than 300 s" in told


@pytest.mark.parametrize(("size", "count"), [(1, 1000), (64, 3000)])
def test_small_chunks_are_read_where_they_are_few_or_not_tiny(
    strict: Served, size: int, count: int
) -> None:
    chunks = b"%x\r\n%s\r\n" % (size, b" " * size) * count + b"0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", strict.port), 10) as connection:
        for _ in range(2):  # which are counted for each request
            connection.sendall(CHUNKED + chunks)
            told = b""
            while not told.endswith(b"}}"):
                told += (piece := connection.recv(4096))
                assert piece, told
            assert b'"invalid_json"' in told  # all of it, which is white space


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
        # Not one of 408, 409, 429 and 5xx, after which a client asks for it all again.
        assert reply.status == 400
        assert json.loads(reply.body)["error"]["code"] == "timeout"
        assert b"the answer took longer than 1 s" in reply.body
        assert reply.seconds < 1.0 + SLACK_SECONDS
        # And nothing goes on behind it.
        end = time.monotonic() + 10
        while b"ppllava_requests_running 0.0" not in httpx2.get(f"{server.url}/metrics").content:
            assert time.monotonic() < end
        counts = httpx2.get(f"{server.url}/metrics").text
        route = "/v1/chat/completions"
        assert f'ppllava_requests_total{{route="{route}",status="400"}} 1.0' in counts


def test_one_connection_too_many_is_told_so(serve: Serve) -> None:
    server = serve("--connections", 5)
    several = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(5)]
    try:
        with socket.create_connection(("127.0.0.1", server.port), 10) as refused:
            told = all_of(refused)
            assert told.startswith(b"HTTP/1.1 503 ")
            assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["type"] == "server_error"
            assert b"\r\nretry-after: 2\r\n" in told
            assert b"\r\nx-content-type-options: nosniff\r\n" in told
        several.pop().close()
        # Until the server has seen that one go, it may refuse the next.
        end = time.monotonic() + 10
        while httpx2.get(f"{server.url}/health").status_code != 200:
            assert time.monotonic() < end
        counts = httpx2.get(f"{server.url}/metrics").text
        assert 'ppllava_requests_total{route="other",status="503"}' in counts
    finally:
        for connection in several:
            connection.close()


SOCKET = (
    b"GET /v1/video/chat/stream HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\n"
)
KEY = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
NO_HTTP = {
    "a line of no meaning": b"hello\r\n\r\n",
    "a header of no name": b"GET / HTTP/1.1\r\nHost: localhost\r\nX Y: 1\r\n\r\n",
    "a head of 200 kB": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    "a length of no use": HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "a chunk of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a body in crumbs": CHUNKED + b"1\r\n \r\n" * 1024,
    "a socket without a key": SOCKET + b"\r\n",
    "a socket of another version": SOCKET + KEY.replace(b"13", b"12") + b"\r\n",
    "a socket that is posted": (SOCKET + KEY + b"\r\n").replace(b"GET", b"POST"),
    "a socket with a body": SOCKET + KEY + b"Transfer-Encoding: chunked\r\n\r\n",
    "a socket of 200 headers": SOCKET + KEY + b"X: x\r\n" * 200 + b"\r\n",
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_refused_as_everything_else(strict: Served, name: str) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), 10) as connection:
        connection.sendall(NO_HTTP[name])
        head, _, body = all_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")
    assert b"x-content-type-options: nosniff" in head
    # Strangers write nothing into the log, and are counted.
    assert strict.log.read_text() == ""
    assert 'status="400"' in httpx2.get(f"{strict.url}/metrics").text
