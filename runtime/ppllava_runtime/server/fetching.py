"""The content behind a URL, piece by piece, from where the policy allows and from nowhere else.

A host's name is looked up once, all of its addresses are checked, and one of those is dialled: a
name that means something else a moment later changes nothing. There are no cookies, no proxies, no
compression, and no connection serves twice.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_address
from typing import TypeAlias, TypeVar

import anyio
import httpcore2

from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.server.addresses import Address
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.spool import too_large
from ppllava_runtime.server.urls import Inline, Local, Policy, Remote

# Gives the addresses of a host's name, as text.
Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]

_MOST_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CONNECT_SECONDS = 5.0
_SILENT_SECONDS = 15.0
_READ_BYTES = 1 << 20
_MOST_ADDRESSES = 4
_LOOKUPS = 4  # at once

T = TypeVar("T")


class Fetcher:
    """Opens the URLs that a policy allows.

    Args:
        policy: Which these are.
        limits: How large one file may be.
        seconds: The most time that one file may take, redirects included.
        resolve: Looks names up; the system's resolver where it is not given.
    """

    def __init__(
        self,
        policy: Policy,
        limits: MediaLimits,
        *,
        seconds: float = 60.0,
        resolve: Resolver | None = None,
    ) -> None:
        self.policy = policy
        self.limits = limits
        self.seconds = seconds
        self._resolve = resolve or self._look_up
        # Of its own: names that nobody answers for must not keep files from being written.
        self._threads = ThreadPoolExecutor(_LOOKUPS, "looking up")
        # The certificates that the system trusts, or those of SSL_CERT_FILE.
        self._tls = ssl.create_default_context()

    def close(self) -> None:
        """Looks no more names up."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str) -> AsyncGenerator[bytes, None]:
        """Yields what is behind a URL; to be closed, as `Files.add` of the spool does.

        Args:
            url: Of the schemes data, file, http and https.

        Raises:
            ApiError: 400 with the code "invalid_url", "media_not_allowed", "media_fetch_failed" or
                "media_too_large".
        """
        target = self.policy.parse(url)
        if isinstance(target, Inline):
            for chunk in target.chunks():
                yield chunk
            return
        pieces = self._read(target) if isinstance(target, Local) else self._download(target)
        async with aclosing(pieces):
            async for chunk in pieces:
                yield chunk

    async def _read(self, target: Local) -> AsyncGenerator[bytes, None]:
        with os.fdopen(target.open(), "rb") as file:
            if os.fstat(file.fileno()).st_size > self.limits.num_bytes:
                raise too_large(self.limits.num_bytes)
            try:
                while chunk := await asyncio.to_thread(file.read, _READ_BYTES):
                    yield chunk
            except OSError as error:
                raise _failed(f"the file cannot be read ({error.strerror})") from error

    async def _download(self, target: Remote) -> AsyncGenerator[bytes, None]:
        until = time.monotonic() + self.seconds
        for _ in range(1 + _MOST_REDIRECTS):
            async with self._answered(target, until) as answer:
                if answer.status in _REDIRECTS:
                    target = self.policy.follow(target, _location(target, answer))
                    continue
                self._check(target, answer)
                async with aclosing(answer.aiter_stream()) as body:
                    while chunk := await _in_time(until, target, _next(body)):
                        yield chunk
                return
        raise _failed(f"{target.host} redirects again, after {_MOST_REDIRECTS} redirects")

    @asynccontextmanager
    async def _answered(
        self, target: Remote, until: float
    ) -> AsyncGenerator[httpcore2.Response, None]:
        """The response to a GET of the target, whose body has not been read."""
        dialler = _Dialler(await _in_time(until, target, self._addresses(target)))
        connection = httpcore2.AsyncHTTPConnection(
            httpcore2.Origin(target.scheme.encode(), target.host.encode(), target.port),
            ssl_context=self._tls,
            network_backend=dialler,
        )
        request = httpcore2.Request(
            "GET",
            httpcore2.URL(
                scheme=target.scheme, host=target.host, port=target.port, target=target.path
            ),
            headers={
                "Host": target.authority,
                "User-Agent": "ppllava-serve",
                "Accept": "*/*",
                "Accept-Encoding": "identity",
                "Connection": "close",
            },
            extensions={"timeout": {"connect": _CONNECT_SECONDS, "read": _SILENT_SECONDS}},
        )
        try:
            answer = await _in_time(until, target, connection.handle_async_request(request))
            yield answer
        finally:
            with anyio.CancelScope(shield=True):
                await connection.aclose()
                await dialler.aclose()

    async def _addresses(self, target: Remote) -> list[str]:
        """The addresses of the host, each of which may be dialled.

        Raises:
            ApiError: There is none, or one among them that may not.
        """
        if target.address is not None:
            return [target.host]
        try:
            found = [_plain(text) for text in await self._resolve(target.host, target.port)]
        except (OSError, UnicodeError) as error:
            raise _failed(f"{target.host} has no address that could be looked up") from error
        if not found or not all(target.admits(address) for address in found):
            raise ApiError(
                400,
                f"URL of media: {target.host} has an address that is not public, or none; the "
                "server's operator can allow it as a private host",
                code="media_not_allowed",
            )
        return [str(address) for address in dict.fromkeys(found)]

    async def _look_up(self, host: str, port: int) -> list[str]:
        """What the system's resolver says."""
        asking = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, asking)
        return [str(place[0]) for *_, place in found]

    def _check(self, target: Remote, answer: httpcore2.Response) -> None:
        """Refuses an answer before its body is read."""
        if answer.status != 200:
            raise _failed(f"{target.host} answered with status {answer.status}, expected 200")
        encoding = _header(target, answer, b"content-encoding") or "identity"
        if encoding.lower() != "identity":
            raise _failed(f"{target.host} compressed its answer, expected it as it is")
        length = _header(target, answer, b"content-length") or "0"
        if int(length) > self.limits.num_bytes:  # a number, or the answer would have been refused
            raise too_large(self.limits.num_bytes)


class _Dialler(httpcore2.AsyncNetworkBackend):
    """Connects to one of some addresses, whatever the name of the host.

    Args:
        addresses: Checked ones.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._plain = httpcore2.AnyIOBackend()
        self._stream: httpcore2.AsyncNetworkStream | None = None

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - TLS and "Host" name it
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to the first of the addresses that takes it."""
        *others, last = self._addresses[:_MOST_ADDRESSES]
        rest = (port, timeout, local_address, socket_options)
        for address in others:
            with suppress(httpcore2.NetworkError, httpcore2.TimeoutException):
                self._stream = await self._plain.connect_tcp(address, *rest)
                return self._stream
        self._stream = await self._plain.connect_tcp(last, *rest)
        return self._stream

    async def aclose(self) -> None:
        """Closes the connection, which an interrupted handshake may have left open."""
        if self._stream is not None:
            await self._stream.aclose()


def _plain(text: str) -> Address:
    """The address without its zone, which would say by which of our networks to go."""
    return ip_address(text.partition("%")[0])


def _header(target: Remote, answer: httpcore2.Response, name: bytes) -> str | None:
    """The one value of a header; None where it is not there."""
    values = [value for key, value in answer.headers if key.lower() == name]
    if not values:
        return None
    try:
        (value,) = values
        return value.decode("utf-8").strip()
    except ValueError as error:  # several, or no Unicode
        raise _failed(f"{target.host} answered with a {name.decode()} of no meaning") from error


def _location(target: Remote, answer: httpcore2.Response) -> str:
    found = _header(target, answer, b"location")
    if not found:
        raise _failed(f"{target.host} redirects without saying where to")
    return found


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    return await anext(chunks, b"")


async def _in_time(until: float, target: Remote, work: Awaitable[T]) -> T:
    """What the work gives, unless it takes longer or the network fails: then an ApiError."""
    try:
        with anyio.fail_after(max(0.0, until - time.monotonic())):
            return await work
    except (TimeoutError, httpcore2.TimeoutException) as error:
        raise _failed(f"{target.host} did not answer in time") from error
    except (httpcore2.NetworkError, OSError) as error:
        raise _failed(f"{target.host} could not be reached, or not as the one it is") from error
    except (httpcore2.ProtocolError, ValueError) as error:
        raise _failed(f"{target.host} broke off its answer, or speaks no HTTP") from error


def _failed(what: str) -> ApiError:
    return ApiError(
        400,
        f"URL of media: {what}; check it, or send the content as a data: URL",
        code="media_fetch_failed",
    )
