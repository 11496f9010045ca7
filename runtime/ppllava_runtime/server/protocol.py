"""HTTP/1.1 with a deadline for each part of a request, which uvicorn does not have.

A connection that sends no head, half a head or half a body costs a socket and no more, and that
not for long; one that does not read its answer loses it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Literal

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState
from websockets.http11 import Request
from websockets.server import ServerProtocol

from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.metrics import Metrics
from ppllava_runtime.server.settings import Settings

Phase = Literal["idle", "head", "body", "answer"]

# What a browser is told with every response; a response that says more of one of them is kept.
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
_FULL_SECONDS = 2.0
_UNREAD_SECONDS = 1.0
# A chunk of a body takes as long to read as some kilobytes, and nothing else is done while those
# that came together are read: so many in a row must have so many bytes, however they came.
_RUN_CHUNKS = 1024
_RUN_BYTES = 64 << 10


def protocol_of(settings: Settings, metrics: Metrics) -> type[asyncio.Protocol]:
    """The class that uvicorn makes one of for each connection.

    Args:
        settings: With its deadlines.
        metrics: Count what is refused here, before there is a request.
    """

    class Protocol(DeadlineProtocol):
        def __init__(
            self,
            config: Config,
            server_state: ServerState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            super().__init__(config, server_state, app_state, _loop)
            self.conn = _Connection(h11.SERVER)
            self.settings = settings
            self.metrics = metrics

    return Protocol


class DeadlineProtocol(H11Protocol):
    """One connection.

    Attributes:
        settings: Of the deadlines, and how many connections there may be.
        metrics: Count what is refused here.
    """

    settings: Settings
    metrics: Metrics
    conn: _Connection
    _began = 0.0  # when the first byte of the request came
    _phase: Phase = "idle"
    _alarm: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Starts the deadline of the first head; one connection too many is told and closed."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.num_connections:
            self._refuse(
                ApiError(
                    503,
                    f"connection: {len(self.connections)} are open, expected at most "
                    f"{self.settings.num_connections}: try again in a few seconds",
                    code="too_many_connections",
                    type="server_error",
                    retry_after=_FULL_SECONDS,
                )
            )
            return
        self._began = self.loop.time()
        self._enter("head")

    def data_received(self, data: bytes) -> None:
        """Hands bytes on, and sees which part of a request they end."""
        if self.transport.is_closing() or self._is_refused:
            return
        if self._phase == "idle":
            self._began = self.loop.time()
            self._enter("head")
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Goes on to the next request, which may be there and has its own time."""
        self._began = self.loop.time()
        self._enter("idle")
        super().on_response_complete()
        if not self.transport.is_closing():
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the deadline."""
        self._enter("idle")
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hands the connection on: from here on it is no request."""
        if not _begins_websocket(event):
            self._refuse(
                ApiError(
                    400,
                    "connection: it asks to become a WebSocket, but not as RFC 6455 has it: leave "
                    "the header 'Upgrade' out, or use a WebSocket client",
                    code="invalid_http",
                )
            )
            return
        self._enter("idle")
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - it says nothing
        """Refuses what is no HTTP, as everything else is refused."""
        if self.conn.is_in_crumbs:
            why = (
                f"{_RUN_CHUNKS} chunks of the body have less than {_RUN_BYTES} bytes together: "
                "send larger ones"
            )
        else:
            why = (
                "what came is not a request of HTTP/1.1, or its head is too long: check the client"
            )
        self._refuse(ApiError(400, f"connection: {why}", code="invalid_http"))

    def _look(self) -> None:
        """Finds the phase anew from where the other side is."""
        theirs = self.conn.their_state
        handed_on = self.transport.get_protocol() is not self  # to a WebSocket
        if self._is_refused:
            return
        if handed_on or self.transport.is_closing() or theirs is h11.ERROR:
            phase: Phase = "idle"
        elif theirs is h11.IDLE:
            begun = bool(self.conn.trailing_data[0])
            phase = "head" if begun or self._phase == "head" else "idle"
        elif theirs is h11.SEND_BODY:
            phase = "body"
        elif self.cycle is not None and not self.cycle.response_complete:
            phase = "answer"
        else:
            phase = "idle"
        if phase == "head" and self._phase != "head":
            self._began = self.loop.time()
        if phase != self._phase:
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        settings = self.settings
        now = self.loop.time()
        end = {
            "head": self._began + settings.head_seconds,
            "body": now + settings.body_seconds,
            "answer": self._began + settings.request_seconds,
        }.get(phase)
        if end is not None:
            last = self._began + settings.request_seconds
            self._alarm = self.loop.call_at(min(end, last), partial(self._expire, phase))

    def _expire(self, phase: Phase) -> None:
        seconds = {
            "head": self.settings.head_seconds,
            "body": self.settings.body_seconds,
            "answer": self.settings.request_seconds,
        }[phase]
        if phase == "answer":
            # Not 408, after which clients ask for the same again, and wait for as long.
            error = ApiError(
                400,
                f"connection: the answer took longer than {seconds:g} s: ask for less",
                code="timeout",
            )
        else:
            error = ApiError(
                408,
                f"connection: the {phase} of the request took longer than {seconds:g} s: send it "
                "at once",
                code="timeout",
                type="timeout_error",
            )
        self._refuse(error)

    def _refuse(self, error: ApiError) -> None:
        """Ends the connection, with a sentence where nothing has been said yet."""
        self._enter("idle")
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error.response()
            for name, value in {**HEADERS, "connection": "close"}.items():
                response.headers[name] = value
            events = (
                h11.Response(status_code=error.status, headers=response.raw_headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event))
            if self.cycle is not None and not self.cycle.response_complete:
                self.scope["state"]["refused"] = error.status  # counted with its route
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            else:
                self.metrics.responded("other", error.status)
            if self._began:
                # To close while bytes come would take it back from who has not read it.
                self._is_refused = True
                self.transport.write_eof()
                self._alarm = self.loop.call_later(_UNREAD_SECONDS, self.transport.abort)
                return
        if self.transport.get_write_buffer_size():  # of one who does not read, close() would wait
            self.transport.abort()
        else:
            self.transport.close()


class _Connection(h11.Connection):
    """One whose bodies do not come in crumbs.

    Attributes:
        is_in_crumbs: One did, and no more of it is to be read.
    """

    is_in_crumbs = False
    _num_chunks = 0  # of the run
    _num_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What came next.

        Raises:
            h11.RemoteProtocolError: It is not HTTP, or a body in crumbs.
        """
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._num_chunks += event.chunk_end
            self._num_bytes += len(event.data)
        if isinstance(event, h11.Request) or self._num_chunks == _RUN_CHUNKS:
            if self._num_chunks == _RUN_CHUNKS and self._num_bytes < _RUN_BYTES:
                self.is_in_crumbs = True
                raise h11.RemoteProtocolError("a body in crumbs")
            self._num_chunks = self._num_bytes = 0
        return event


def _begins_websocket(event: h11.Request) -> bool:
    """Whether the WebSocket library takes this request, which would refuse it in its own way."""
    lines = [event.method + b" " + event.target + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in event.headers]
    trial = ServerProtocol()
    trial.receive_data(b"\r\n".join([*lines, b"", b""]))
    if trial.parser_exc is not None:
        return False
    requests = [found for found in trial.events_received() if isinstance(found, Request)]
    return bool(requests) and trial.accept(requests[0]).status_code == 101
