"""Servers on the loopback that say what a test wants and note who came; and who dialled where."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any, TypeAlias

import pytest

# Gets the request's line and headers.
Script: TypeAlias = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Listener:
    """A server at a free port.

    Attributes:
        requests: The head of each request.
        num_connections: How many were opened.
        asked: Set when there is one.
        closed: Set when a connection has been put away.
    """

    def __init__(self, script: Script) -> None:
        self.requests: list[str] = []
        self.num_connections = 0
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()
        self.port = 0
        self._script = script

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.requests.append(head)
            self.asked.set()
            await self._script(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(OSError):  # ssl.SSLError too
                await writer.wait_closed()
            self.closed.set()


@asynccontextmanager
async def listening(
    script: Script, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[Listener]:
    listener = Listener(script)
    server = await asyncio.start_server(listener.serve, host, port, ssl=tls)
    listener.port = server.sockets[0].getsockname()[1]
    try:
        yield listener
    finally:
        server.close()


def saying(*parts: bytes) -> Script:
    """A script that says the parts one by one."""

    async def script(_: str, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return script


def answer(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """A response, as bytes; headers are given as in `content_length="5"`."""
    given = {"content_length": str(len(body))} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in given.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


class Dials:
    """Every connection that this process tries to open; those that would leave it are refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: list[tuple[str, int]] = []
        self.names: list[Any] = []
        connect, look_up = socket.socket.connect, socket.getaddrinfo

        def connecting(sock: socket.socket, place: Any) -> None:
            self.places.append((str(place[0]), int(place[1])))
            if not ip_address(place[0]).is_loopback:
                raise ConnectionRefusedError(f"{place} is not on this machine")
            connect(sock, place)

        def looking_up(host: Any, *rest: Any, **more: Any) -> Any:
            self.names.append(host)
            return look_up(host, *rest, **more)

        monkeypatch.setattr(socket.socket, "connect", connecting)
        monkeypatch.setattr(socket, "getaddrinfo", looking_up)
