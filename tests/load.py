"""Many clients of one server, in one event loop and with little code, so as to measure the server.

A client library would take longer for a request than the server takes to refuse it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

BUSY = 429
AWAY_SECONDS = 0.05  # though they are told to stay away for a second or more
IDLE_SECONDS = 2.0  # of a connection that is not used again: a server closes it after 5
WORD_SECONDS = 5.0  # after which a server says that it is still there, or it would be given up


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        status: Of the response; 0 where the connection ended before there was one.
        seconds: From the first byte out to the last one in.
        body: All of it.
        is_whole: Whether all of it came that was announced.
    """

    status: int
    seconds: float
    body: bytes = b""
    is_whole: bool = False


class Client:
    """One connection that is used again and again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._last = 0.0  # when a reply had come

    async def post(self, fields: Mapping[str, Any]) -> Reply:
        """The reply to a request for a completion."""
        body = json.dumps(fields).encode()
        began = time.perf_counter()
        if began - self._last > IDLE_SECONDS:  # or the server may close it in this moment
            await self.close()
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(head(len(body)) + body)
            answer = await reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError):
            await self.close()
            return Reply(0, time.perf_counter() - began)
        lines = answer.decode().lower().split("\r\n")
        status = int(lines[0].split()[1])
        length = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
        try:
            content = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            await self.close()
            part = error.partial if isinstance(error, asyncio.IncompleteReadError) else b""
            return Reply(status, time.perf_counter() - began, part)
        self._last = time.perf_counter()
        return Reply(status, self._last - began, content, True)

    async def close(self) -> None:
        """Hangs up."""
        if self._streams is not None:
            writer = self._streams[1]
            self._streams = None
            writer.close()
            with suppress(OSError):  # the other end was first
                await writer.wait_closed()


def head(length: int) -> bytes:
    """The head of a request for a completion whose body is so long."""
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def picture(number: int) -> bytes:
    """A small PNG, one of many."""
    stream = io.BytesIO()
    Image.new("RGB", (48, 32), (number % 256, number // 256 % 256, 77)).save(stream, "PNG")
    return stream.getvalue()


def question(
    model: str, number: int = 0, *, max_tokens: int = 8, url: str | None = None
) -> dict[str, Any]:
    """A question about a small picture, one of many, or the one that there is at `url`."""
    if url is None:
        url = f"data:image/png;base64,{base64.b64encode(picture(number)).decode()}"
    content = [
        {"type": "text", "text": f"What is number {number}?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
    }


def endless(model: str) -> dict[str, Any]:
    """A question whose answer goes on as long as a tiny model's positions last, with this seed."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": "What is it?"}],
        "max_tokens": 100_000,
        "temperature": 1.0,
        "seed": 3,
        "stream": True,
    }


async def alone(port: int, fields: Mapping[str, Any]) -> Reply:
    """The reply to one request on a connection of its own."""
    client = Client(port)
    try:
        return await client.post(fields)
    finally:
        await client.close()


class Withheld:
    """A server of a picture that it does not give away before it is told to.

    Attributes:
        url: Of the picture.
        host: As a setting names it.
    """

    def __init__(self) -> None:
        self._released, self._arrived = threading.Event(), threading.Semaphore(0)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._arrived.release()
                body = picture(0)
                with suppress(OSError):  # it may be too late
                    while not outer._released.wait(WORD_SECONDS):
                        self.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/picture.png"

    def __enter__(self) -> Withheld:
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait_for(self, count: int) -> None:
        """Returns once so many more have asked for it."""
        for _ in range(count):
            assert self._arrived.acquire(timeout=20)

    def release(self) -> None:
        """From now on whoever asks gets it."""
        self._released.set()


async def many(port: int, model: str, num_clients: int, num_requests: int) -> list[Reply]:
    """Replies to so many requests, by so many clients that hardly wait when they are refused."""
    left = iter(range(num_requests))

    async def ask() -> list[Reply]:
        client, replies = Client(port), []
        for number in left:
            replies.append(await client.post(question(model, number)))
            if replies[-1].status == BUSY:
                await asyncio.sleep(AWAY_SECONDS)
        await client.close()
        return replies

    several = await asyncio.gather(*(ask() for _ in range(num_clients)))
    return [reply for replies in several for reply in replies]


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of them is."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
