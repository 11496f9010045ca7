"""POST /v1/chat/completions: a request is read, waits for its slot, and is answered by a thread.

Nothing is sent before the first question of failure is settled: media that cannot be read, or a
question that cannot be asked, is a status and no stream. A client that goes away frees its slot at
the next step of the model.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ppllava_runtime.leaving import Leaving
from ppllava_runtime.server.answering import aside, in_thread, settled
from ppllava_runtime.server.asked import Asked, read_asked
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.media import Media, gathered
from ppllava_runtime.server.replies import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Extra,
    FinishReason,
    Usage,
    event_of,
)
from ppllava_runtime.server.schema import ChatCompletionRequest, read_request

if TYPE_CHECKING:
    from ppllava_runtime.server.service import Service

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies would keep the pieces together
]


@dataclass(frozen=True)
class End:
    """How an answer ended, and what it cost."""

    finish_reason: FinishReason
    usage: Usage
    extra: Extra


# What comes from the thread: pieces of the answer, the first of them empty, when it has begun; and
# its end, or why there is none.
_Event = str | End | Exception


async def chat_completions(request: Request) -> Response:
    """The response to a request for a completion, which answers while it is sent.

    Raises:
        ApiError: 400 or 404: not a request that can be answered.
    """
    service: Service = request.app.state.service
    try:
        # Not `request.body()`, which would keep all of a video once more until the end.
        body = b"".join([chunk async for chunk in request.stream()])
    except ClientDisconnect as error:
        raise ApiError(400, "request: its body ended early", code="incomplete_body") from error
    content_type = request.headers.get("content-type", "")
    try:
        asked_for, asked = await aside(
            len(body), lambda: _read(body, content_type, service.model_id)
        )
    except Exception as error:
        raise ApiError.of(error) from error
    return _Completion(service, asked_for, asked, request.state.tenant)


def _read(body: bytes, content_type: str, model_id: str) -> tuple[ChatCompletionRequest, Asked]:
    """The request in a body, and what it asks for."""
    request = read_request(body, content_type)
    if request.model != model_id:
        raise ApiError(
            404,
            f"request: model is {request.model[:60]!r}, expected {model_id!r}",
            code="model_not_found",
            param="model",
        )
    return request, read_asked(request)


class _Completion(Response):
    """The response that answers, whole or as a stream."""

    def __init__(
        self, service: Service, request: ChatCompletionRequest, asked: Asked, tenant: str
    ) -> None:
        self._service = service
        self._streams = bool(request.stream)
        options = request.stream_options
        self._includes_usage = bool(options and options.include_usage)
        self._asked = asked
        self._tenant = tenant
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer, or what a failure is told as; ends early when nobody listens."""
        answering = asyncio.ensure_future(self._answer())
        sending = asyncio.ensure_future(self._send(scope, receive, send))
        listening = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, listening, answering):
                task.cancel()
            await settled(sending, listening, answering)

    async def _answer(self) -> None:
        """Puts all events of the answer into the queue; its end when the slot is free again."""
        service, asked = self._service, self._asked
        try:
            async with (
                service.admission.slot(),
                gathered(service, asked.items, self._tenant) as media,
            ):
                end = await in_thread(
                    service.threads,
                    lambda leaving: self._work(media, leaving),
                    self._events.put_nowait,
                )
            self._events.put_nowait(end)  # not before: who has it may ask again at once
        except Exception as error:
            self._events.put_nowait(error)

    def _work(self, media: Media, leaving: Leaving) -> Generator[str, None, End]:
        """Yields the pieces of an answer, the first of them empty, and returns its end."""
        service, asked = self._service, self._asked
        leaving.check()
        found = media.see(service, leaving)
        video, seen = (service.assistant, ()) if found is None else found
        conversation = video.converse(preface=asked.preface, owner=self._tenant)
        for question, said in asked.turns:
            leaving.check()
            conversation.recall(question, said)
        leaving.check()
        answer = conversation.answer(asked.question, asked.options)
        try:
            with leaving.ending(answer.close):  # pieces may be many ids apart
                yield ""
                yield from answer
            extra = Extra.of(answer, seen, asked.relevance)
            if seen:
                service.metrics.watched(cached=extra.cached)
            return End(answer.finish_reason, Usage.of(answer.accounting), extra)
        finally:
            answer.close()
            service.metrics.answered(answer.accounting)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await self._events.get()
        if isinstance(first, Exception):
            await ApiError.of(first).response()(scope, receive, send)
        elif self._streams:
            await self._send_stream(send)
        else:
            await (await self._whole())(scope, receive, send)

    async def _whole(self) -> Response:
        pieces = []
        while isinstance(event := await self._events.get(), str):
            pieces.append(event)
        if not isinstance(event, End):
            return ApiError.of(event).response()
        completion = ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._service.model_id,
            choices=[
                Choice(
                    index=0,
                    message=AnswerMessage(role="assistant", content="".join(pieces)),
                    finish_reason=event.finish_reason,
                    logprobs=None,
                )
            ],
            usage=event.usage,
            x_ppllava=event.extra,
        )
        return JSONResponse(completion.model_dump())

    async def _send_stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})

        async def event(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await event(self._chunk(Delta(role="assistant", content="")))
        while isinstance(piece := await self._events.get(), str):
            await event(self._chunk(Delta(content=piece)))
        if isinstance(piece, End):
            await event(self._chunk(Delta(), piece))
            if self._includes_usage:
                await event(self._chunk(None, piece))
        else:
            await event(event_of(ApiError.of(piece).body))
        await event(event_of("[DONE]"), more=False)

    def _chunk(self, delta: Delta | None, end: End | None = None) -> bytes:
        """An event: with what is new, with the end as well, or with the usage alone."""
        choice = delta and ChunkChoice(
            index=0, delta=delta, finish_reason=end.finish_reason if end else None, logprobs=None
        )
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._service.model_id,
            choices=[choice] if choice else [],
            usage=end.usage if end and not choice else None,
        )
        if end and choice:
            chunk = chunk.model_copy(update={"x_ppllava": end.extra})
        return event_of(chunk.model_dump(exclude_unset=True))


async def _gone(receive: Receive) -> None:
    """Nothing, once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
