"""Who gets in, and with how much: checked before a byte of a request's body is looked at.

- Readiness: /v1/ is 503 before the model is there and while the server drains.
- Host: where no key is asked for, only localhost and addresses of the loopback are answered, since
  any web page may have its own name lead here (DNS rebinding).
- Origin: a browser's POST or WebSocket must come from the page of this server.
- Key: /v1/ and /metrics want `Authorization: Bearer KEY`. A browser cannot send that with a
  WebSocket: it offers the subprotocols "ppllava" and "key." + base64url(KEY) without padding, and
  "ppllava" is what it is answered with.
- Body: its stated length, then what really comes, and all bodies in memory together. A response
  that does not wait for all of it is the connection's last, and little more of it is read.

`request.state.tenant` is the key's hash from then on; "" where there are no keys.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ppllava_runtime.server.addresses import is_loopback
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.service import Service

SUBPROTOCOL = "ppllava"
_KEY_PROTOCOL = "key."
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
# Read and forgotten after a refusal: a client that sends all before it reads is told then, too.
_FORGOTTEN_BYTES = 8 << 20
_FORGOTTEN_SECONDS = 2.0


class Gate:
    """The app behind the gate.

    Args:
        app: What is behind it.
        service: Whose settings decide.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._settings = service.settings
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in self._settings.api_keys]
        self.body_bytes = 0  # of all requests that are in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it here."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = _Body(self, headers, receive, send)
        if scope["type"] == "http":
            send = body.send
        try:
            scope.setdefault("state", {})["tenant"] = self._check(scope, headers)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, _choosing_ours(scope, send))
            return
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.let_go()

    def _check(self, scope: Scope, headers: Headers) -> str:
        """The tenant."""
        path, is_socket = scope["path"], scope["type"] == "websocket"
        host = _host_of(f"//{headers.get('host', '')}")
        if not self._hashes and (host is None or not is_loopback(host[0])):
            raise ApiError(
                403,
                f"gate: this server is asked as {headers.get('host', '')!r}, but without API keys "
                "it answers only as localhost: ask it so, or start it with --api-keys",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and (is_socket or scope["method"] not in ("GET", "HEAD")):
            _check_origin(origin, headers.get("host", ""))
        tenant = ""
        if path.startswith("/v1/") or path == "/metrics":
            tenant = self._tenant(scope, headers)
        if path.startswith("/v1/"):
            self._service.check_ready()
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._settings.body_bytes:
            raise self._too_large(f"{length} bytes long")
        return tenant

    def _tenant(self, scope: Scope, headers: Headers) -> str:
        if not self._hashes:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else _key_offered(scope)
        if not given:
            raise ApiError(
                401,
                "gate: there is no API key, expected the header 'Authorization: Bearer KEY'",
                code="missing_api_key",
                type="authentication_error",
            )
        digest = hashlib.sha256(given).digest()
        # All of them each time: how long it takes says nothing about which one is close.
        if sum([hmac.compare_digest(digest, known) for known in self._hashes]) == 0:
            raise ApiError(
                401,
                "gate: the API key is not one of this server's, expected one of its --api-keys",
                code="invalid_api_key",
                type="authentication_error",
            )
        return digest.hex()[:32]

    def count(self, num_bytes: int, of_this: int) -> None:
        """Counts bytes of a body that came, of which `of_this` are there now.

        Raises:
            ApiError: 413 where it is too large; 429 where all bodies together are.
        """
        self.body_bytes += num_bytes
        if of_this > self._settings.body_bytes:
            raise self._too_large("longer")
        if self.body_bytes > self._settings.bodies_bytes:
            raise ApiError(
                429,
                f"gate: requests of {self.body_bytes} bytes are on their way, expected at most "
                f"{self._settings.bodies_bytes}: try again in a few seconds",
                code="server_busy",
                type="rate_limit_error",
                retry_after=2.0,
            )

    def _too_large(self, got: str) -> ApiError:
        return ApiError(
            413,
            f"gate: the request is {got}, expected at most {self._settings.body_bytes} bytes: send "
            "less, or start the server with a larger --body-size",
            code="request_too_large",
        )


class _Body:
    """Counts a request's body as it comes, and ends the connection of one that is not wanted."""

    def __init__(self, gate: Gate, headers: Headers, receive: Receive, send: Send) -> None:
        self._gate = gate
        self._receive = receive
        self._send = send
        self._is_read = (
            headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        )
        self._ends = False  # the connection, with this response
        self._num_bytes = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._is_read = not message.get("more_body", False)
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._num_bytes += size
            try:
                self._gate.count(size, self._num_bytes)
            except ApiError:
                # Nothing of it is kept while it is told so, which must not refuse others as well.
                self.let_go()
                raise
        return message

    def let_go(self) -> None:
        """Counts this body no longer among those in memory."""
        self._gate.body_bytes -= self._num_bytes
        self._num_bytes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._is_read:
            self._ends = True
            MutableHeaders(scope=message)["connection"] = "close"
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self._ends and is_last:
            # All is said. To close while bytes come would take it back from who has not read it.
            await self._send({**message, "more_body": True})
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._forget(), _FORGOTTEN_SECONDS)
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _forget(self) -> None:
        num_bytes = 0
        while not self._is_read and num_bytes < _FORGOTTEN_BYTES:
            message = await self._receive()
            num_bytes += len(message.get("body", b""))
            self._is_read = not message.get("more_body", False)


def _check_origin(origin: str, host: str) -> None:
    page, scheme = _host_of(origin), origin.partition("://")[0].lower()
    # A Host header names no port where it is the scheme's.
    if page is None or scheme not in _PORTS or page != _host_of(f"{scheme}://{host}"):
        raise ApiError(
            403,
            f"gate: the page of {origin!r} asks, expected one of this server's own",
            code="origin_not_allowed",
        )


def _host_of(url: str) -> tuple[str, int | None] | None:
    """Name and port; None for what is not a URL of a host and nothing more."""
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not name or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return None
    return name, _PORTS.get(parts.scheme) if port is None else port


def _key_offered(scope: Scope) -> bytes:
    """The key among the subprotocols of a WebSocket; empty where there is none."""
    for offered in scope.get("subprotocols", ()):
        if offered.startswith(_KEY_PROTOCOL):
            text = offered.removeprefix(_KEY_PROTOCOL)
            try:
                return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
            except (binascii.Error, ValueError):
                return b""
    return b""


def _choosing_ours(scope: Scope, send: Send) -> Send:
    """Answers a browser with the subprotocol it must be answered with; the key is taken away."""
    offered = scope.get("subprotocols", ())
    scope["subprotocols"] = [name for name in offered if not name.startswith(_KEY_PROTOCOL)]

    async def choosing(message: Message) -> None:
        if message["type"] == "websocket.accept" and SUBPROTOCOL in offered:
            message = {**message, "subprotocol": SUBPROTOCOL}
        await send(message)

    return choosing


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response = error.response()
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    await response(scope, receive, send)
