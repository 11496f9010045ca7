"""What is fetched from a server of the test's own, by names that lead to it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from loopback import Listener, Script, listening
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.fetching import Fetcher
from ppllava_runtime.server.settings import Settings
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


async def silent(_: str, reader: asyncio.StreamReader, __: object) -> None:
    """A server's script: takes all that comes and says nothing."""
    await reader.read()
