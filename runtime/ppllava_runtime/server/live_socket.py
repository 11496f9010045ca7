"""The WebSocket /v1/video/chat/stream: frames come as they are taken, questions at any time.

Frames wait in one place where only the newest stays, and are decoded in the sandbox. A question is
answered in a slot of the server's, as any request, over the frames that were sent before it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from ppllava_runtime.leaving import Leaving
from ppllava_runtime.server.answering import in_thread
from ppllava_runtime.server.completions import End
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.live_messages import (
    Cancel,
    Config,
    Done,
    Query,
    SentFrame,
    read_aside,
)
from ppllava_runtime.server.live_protocol import RESTARTING
from ppllava_runtime.server.live_window import Counts, LiveWindow, live_video
from ppllava_runtime.server.replies import Extra, Usage

if TYPE_CHECKING:
    from ppllava_runtime.server.service import Service

# Of WebSocket.
_DONE, _GOING_AWAY, _WRONG, _REFUSED, _FAILED, _TRY_LATER = 1000, 1001, 1002, 1008, 1011, 1013

_MOST_QUERIES = 4  # that wait for the one that is answered
_MOST_TROUBLES = 16  # with frames, that wait to be told


class LiveExtra(Extra):
    """What an answer is based on and what it cost, as of any answer, and its session's frames."""

    live: Counts


async def live_socket(websocket: WebSocket) -> None:
    """Serves one session, from the connection to its end; see docs/server.md for the messages."""
    service: Service = websocket.app.state.service
    await websocket.accept()
    with suppress(WebSocketDisconnect):
        try:
            async with service.live.slot():
                code = await _Session(websocket, service).run()
        except ApiError as error:
            await _send(websocket, _told(error))
            code = _REFUSED if error.status == HTTPStatus.FORBIDDEN else _TRY_LATER
        await websocket.close(code)


class _Session:
    """One session."""

    def __init__(self, websocket: WebSocket, service: Service) -> None:
        self._websocket = websocket
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._queries: asyncio.Queue[Query | None] = asyncio.Queue(_MOST_QUERIES)
        self._troubles: asyncio.Queue[ApiError] = asyncio.Queue(_MOST_TROUBLES)
        self._answering: asyncio.Task[None] | None = None
        self._window: LiveWindow | None = None

    async def run(self) -> int:
        """The code to close the connection with, when the session is over.

        Raises:
            WebSocketDisconnect: The client has gone.
        """
        workers = [
            asyncio.ensure_future(self._answer_all()),
            asyncio.ensure_future(self._tell_troubles()),
        ]
        try:
            return await self._listen(workers[0])
        finally:
            self._end_answer()
            for worker in workers:
                await _ended(worker)
            if self._window is not None:
                await asyncio.to_thread(self._window.close)

    async def _listen(self, answering: asyncio.Future[None]) -> int:
        idle = self._service.settings.body_seconds
        while True:
            try:
                received = await asyncio.wait_for(self._websocket.receive(), idle)
            except asyncio.TimeoutError:
                if self._answering is not None:
                    continue
                why = f"session: nothing came for {idle:g} s: begin another"
                await self._send(_told(ApiError(408, why, code="timeout")))
                return _GOING_AWAY
            if received["type"] == "websocket.disconnect":
                if self._is_stop(received):
                    await self._drain()
                    return RESTARTING
                raise WebSocketDisconnect(received.get("code", _DONE))
            try:
                message = await self._read(received)
            except Exception as error:
                await self._send(_told(ApiError.of(error)))
                if self._window is None:
                    return _WRONG
                continue
            if isinstance(message, Done):
                if not await self._finish(answering):
                    return RESTARTING
                counts = self._window.counts().model_dump() if self._window else None
                await self._send({"type": "session.done", "frames": counts})
                return _DONE
            try:
                await self._take(message)
            except Exception as error:
                name = message.id if isinstance(message, Query) else None
                await self._send(_told(ApiError.of(error), name))
                if self._window is None:
                    return _WRONG
                if self._window.has_ended:
                    return _FAILED

    def _is_stop(self, received: Any) -> bool:
        """Whether it is the server that ends the connection, which still takes what is sent."""
        return bool(received["code"] == RESTARTING and self._service.state == "draining")

    async def _drain(self) -> None:
        """Returns when the answer that has begun has ended; those that wait for it are refused."""
        while not self._queries.empty():
            if (query := self._queries.get_nowait()) is not None:
                why = "session: the server was told to stop and answers no more: ask another"
                error = ApiError(503, why, code="not_ready", type="server_error")
                await self._send(_told(error, query.id))
        if (answering := self._answering) is not None:
            await asyncio.wait([answering], timeout=self._service.settings.drain_seconds)

    async def _finish(self, answering: asyncio.Future[None]) -> bool:
        """Whether all that was asked is answered, when it is or the server has to stop before.

        Raises:
            WebSocketDisconnect: The client did not wait for that.
        """

        async def leave() -> bool:
            while (received := await self._websocket.receive())["type"] != "websocket.disconnect":
                pass
            if is_stop := self._is_stop(received):
                await self._drain()
            return is_stop

        async def end() -> None:
            await self._queries.put(None)
            await answering

        leaving, ending = asyncio.ensure_future(leave()), asyncio.ensure_future(end())
        try:
            await asyncio.wait({leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                if leaving.result():
                    return False
                raise WebSocketDisconnect
            ending.result()
            return True
        finally:
            await _ended(leaving)
            await _ended(ending)

    async def _read(self, received: Any) -> Config | SentFrame | Query | Done | Cancel:
        text = received.get("text")
        if text is None:
            raise ApiError(400, "message: expected text, got bytes", code="invalid_json")
        message = await read_aside(text, self._service.model_id)
        if (self._window is None) != isinstance(message, Config) and not isinstance(message, Done):
            raise ApiError(
                400,
                f"message: {message.type if not isinstance(message, Query) else 'video.query'}: "
                "expected session.config first, and no more of it",
                code="invalid_order",
            )
        return message

    async def _take(self, message: Config | SentFrame | Query | Cancel) -> None:
        if isinstance(message, Config):
            tenant = self._websocket.state.tenant
            live = await asyncio.to_thread(live_video, self._service, message, tenant)
            self._window = LiveWindow(self._service, live, self._note)
            shape = {"seconds": live.seconds, "fps": live.fps, "num_frames": live.num_rows}
            started = {"type": "session.started", **shape, "num_bytes": live.nbytes}
            await self._send({**started, "note": live.describe()})
        elif isinstance(message, Cancel):
            while not self._queries.empty():
                await self._tell_cancelled(self._queries.get_nowait())
            self._end_answer()
        elif self._window is not None:
            self._window.check()
        if isinstance(message, Query):
            if self._queries.full():
                why = f"session: {_MOST_QUERIES} questions wait already: wait for their answers"
                raise ApiError(429, why, code="server_busy", type="rate_limit_error")
            self._queries.put_nowait(message)
        elif isinstance(message, SentFrame) and self._window is not None:
            self._window.put(message)

    async def _answer_all(self) -> None:
        """Answers one question after the other, until there are no more."""
        while (query := await self._queries.get()) is not None:
            answering = self._answering = asyncio.ensure_future(self._answer(query))
            try:
                await asyncio.wait([answering], timeout=self._service.settings.request_seconds)
                if answering.cancelled():
                    await self._tell_cancelled(query)
                elif not answering.done():
                    answering.cancel()
                    await asyncio.wait([answering])
                    why = "session: the answer took longer than it may: ask for less"
                    await self._send(_told(ApiError(408, why, code="timeout"), query.id))
            finally:
                self._answering = None
                await _ended(answering)

    async def _answer(self, query: Query) -> None:
        """Answers a question, or tells why there is no answer."""
        service, events = self._service, asyncio.Queue[str | None]()
        named = {} if query.id is None else {"id": query.id}

        async def work() -> End:
            try:
                async with service.admission.slot():
                    return await in_thread(
                        service.threads,
                        lambda leaving: self._work(query, leaving),
                        events.put_nowait,
                    )
            finally:
                events.put_nowait(None)

        working = asyncio.ensure_future(work())
        try:
            pieces: list[str] = []
            while (piece := await events.get()) is not None:
                if piece:
                    pieces.append(piece)
                    await self._send({"type": "response.text.delta", **named, "delta": piece})
                else:
                    await self._send({"type": "response.start", **named})
            end = await working
            await self._send({
                "type": "response.text.done", **named, "text": "".join(pieces),
                "finish_reason": end.finish_reason, "usage": end.usage.model_dump(),
                "x_ppllava": end.extra.model_dump(),
            })  # fmt: skip
        except WebSocketDisconnect:
            pass  # who listens to it will hear of that too
        except Exception as error:
            with suppress(WebSocketDisconnect):
                await self._send(_told(ApiError.of(error), query.id))
        finally:
            await _ended(working)

    def _work(self, query: Query, leaving: Leaving) -> Generator[str, None, End]:
        """Yields the pieces of an answer, the first of them empty, and returns its end."""
        window = self._window
        assert window is not None
        window.settle(leaving)
        leaving.check()
        answer = window.live.answer(query.text, query.options)
        try:
            with leaving.ending(answer.close):
                yield ""
                yield from answer
            extra = vars(Extra.of(answer, (), query.relevance))
            usage = Usage.of(answer.accounting)
            return End(answer.finish_reason, usage, LiveExtra(**extra, live=window.counts()))
        finally:
            answer.close()
            self._service.metrics.answered(answer.accounting)

    def _end_answer(self) -> None:
        if self._answering is not None:
            self._answering.cancel()

    async def _tell_cancelled(self, query: Query | None) -> None:
        if query is not None:
            named = {} if query.id is None else {"id": query.id}
            await self._send({"type": "response.cancelled", **named})

    def _note(self, error: ApiError) -> None:
        """Has trouble with a frame told; called in a thread."""

        def put() -> None:
            with suppress(asyncio.QueueFull):  # who does not listen misses some
                self._troubles.put_nowait(error)

        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(put)

    async def _tell_troubles(self) -> None:
        while True:
            await self._send(_told(await self._troubles.get()))

    async def _send(self, event: dict[str, Any]) -> None:
        await _send(self._websocket, event)


async def _send(websocket: WebSocket, event: dict[str, Any]) -> None:
    # An error may name what a client sent, and that may be half of a surrogate pair.
    await websocket.send_text(json.dumps(event, separators=(",", ":")))


def _told(error: ApiError, name: str | None = None) -> dict[str, Any]:
    """An error as an event; with the id of the question that it is about."""
    named = {} if name is None else {"id": name}
    told = {"message": error.message, "code": error.code, "param": error.param}
    return {"type": "error", **named, **told}


async def _ended(task: asyncio.Future[Any]) -> None:
    """Returns when the task has ended, which it is told to."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # looked at, though nobody is to hear of it
