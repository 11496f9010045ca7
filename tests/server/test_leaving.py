"""What becomes of a request when nobody waits for its answer any more."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from ppllava_runtime.lane import Lane
from ppllava_runtime.server import completions
from ppllava_runtime.server.app import create_app
from ppllava_runtime.server.schema import ChatCompletionRequest, read_request
from ppllava_runtime.server.service import Service
from ppllava_runtime.server.settings import Settings

SECONDS = 20.0  # no wait is meant to last
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAh"
    "KmMIQAAAABJRU5ErkJggg=="
)
Message = MutableMapping[str, Any]


class Client:
    """Somebody who asks, and leaves when told to.

    Args:
        app: Who is asked.
        fields: Of the request, beside its model and its messages.
    """

    def __init__(self, app: Starlette, **fields: object) -> None:
        service: Service = app.state.service
        image = {"type": "image_url", "image_url": {"url": PICTURE}}
        content = [image, {"type": "text", "text": "What is it?"}]
        body = {"model": service.model_id, "messages": [{"role": "user", "content": content}]}
        self._app = app
        self._coming = [json.dumps(body | fields).encode()]
        self._gone = asyncio.Event()
        self.spoken = asyncio.Event()  # the answer has begun
        self.sent: list[Message] = []

    async def ask(self) -> None:
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await self._app(scope, self._receive, self._send)

    def lengthen(self, size: int) -> None:
        """Makes its body so large, by white space, which means nothing."""
        self._coming = [body.ljust(size) for body in self._coming]

    def leave(self) -> None:
        self._gone.set()

    async def _receive(self) -> Message:
        if self._coming:
            return {"type": "http.request", "body": self._coming.pop(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.spoken.set()


@contextmanager
def held(lane: Lane) -> Iterator[None]:
    """The lane, for the time of the block, held by another thread."""
    has_it, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lane:
            has_it.set()
            assert release.wait(SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert has_it.wait(SECONDS)
        yield
    finally:
        release.set()
        thread.join()


async def until(holds: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not holds():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), SECONDS)


def words(service: Service) -> float:
    """Ids of all answers so far."""
    lines = service.metrics.render().decode().splitlines()
    name = 'ppllava_decoder_tokens_total{part="answer"}'
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


async def left(
    app: Starlette,
    client: Client,
    begun: Callable[[], bool],
    has_left: Callable[[], None] = lambda: None,
) -> None:
    """Nothing, once a client has left an answer that had begun, and all is as if it never came."""
    service: Service = app.state.service
    asking = asyncio.ensure_future(client.ask())
    await until(lambda: begun() or asking.done())
    assert not asking.done()
    with held(service.assistant.lane):
        client.leave()
        await asyncio.sleep(0)
    has_left()
    await asyncio.wait_for(asking, SECONDS)
    assert service.admission.num_held == 0
    assert service.spool.num_bytes == 0
    assert not list(service.spool.folder.iterdir())


def run(bundle: Path, folder: Path, scenario: Callable[[Starlette], Any]) -> None:
    async def live() -> None:
        settings = Settings(num_running=1, num_queued=1, spool=folder)
        app = create_app(bundle, settings, threads=1)
        async with app.router.lifespan_context(app):
            await app.state.service.loading
            await scenario(app)

    asyncio.run(live())


def test_a_stream_that_is_left_ends_at_its_next_step(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(app: Starlette) -> None:
        service: Service = app.state.service
        whole = Client(app, max_tokens=2000)
        await asyncio.wait_for(whole.ask(), SECONDS)
        length, gone = words(service), threading.Event()
        decoder = service.assistant.decoder
        generate = decoder.generate

        def pausing(*arguments: Any) -> Any:  # else it may be through before anybody can leave
            ids = generate(*arguments)
            for _ in range(20):
                yield next(ids)
            assert gone.wait(SECONDS)
            return (yield from ids)

        monkeypatch.setattr(decoder, "generate", pausing)
        client = Client(app, max_tokens=2000, stream=True)
        await left(app, client, client.spoken.is_set, gone.set)
        assert words(service) - length < length
        assert not any(b"[DONE]" in message.get("body", b"") for message in client.sent)

    run(bundle, tmp_path, scenario)


def test_an_answer_that_is_left_while_it_waits_for_the_device(bundle: Path, tmp_path: Path) -> None:
    async def scenario(app: Starlette) -> None:
        lane = app.state.service.assistant.lane
        client = Client(app)
        with held(lane):
            asking = asyncio.ensure_future(client.ask())
            await until(lambda: lane.num_waiting > 0)
            client.leave()
            for _ in range(10):  # turns of the loop until all know
                await asyncio.sleep(0)
        await asyncio.wait_for(asking, SECONDS)
        assert app.state.service.admission.num_held == 0
        assert words(app.state.service) == 0
        assert client.sent == []

    run(bundle, tmp_path, scenario)


def test_a_file_that_is_decoded_for_nobody_keeps_no_slot(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(app: Starlette) -> None:
        service: Service = app.state.service
        begin, begun = service.sandbox.begin, threading.Event()
        assert service.sandbox._zygote is not None
        decoding = service.sandbox._zygote._process.pid

        def beginning(*arguments: Any) -> Any:
            run = begin(*arguments)
            begun.set()
            return run

        monkeypatch.setattr(service.sandbox, "begin", beginning)
        os.kill(decoding, signal.SIGSTOP)  # so that nothing ever comes of the file
        try:
            await left(app, Client(app), begun.is_set)
        finally:
            os.kill(decoding, signal.SIGCONT)
        other = Client(app, max_tokens=1)
        await asyncio.wait_for(other.ask(), SECONDS)
        assert other.sent[0]["status"] == 200

    run(bundle, tmp_path, scenario)


def test_a_request_that_is_left_in_the_queue_leaves_no_hole(bundle: Path, tmp_path: Path) -> None:
    async def scenario(app: Starlette) -> None:
        service: Service = app.state.service
        first, second, third = Client(app), Client(app), Client(app)
        with held(service.assistant.lane):
            answering = asyncio.ensure_future(first.ask())
            await until(lambda: service.admission.num_held == 1)
            waiting = asyncio.ensure_future(second.ask())
            await until(lambda: service.admission.num_queued == 1)
            await third.ask()
            assert third.sent[0]["status"] == 429
            assert b"retry-after" in dict(third.sent[0]["headers"])
            second.leave()
            await asyncio.wait_for(waiting, SECONDS)
            assert service.admission.num_queued == 0
        await asyncio.wait_for(answering, SECONDS)
        assert (first.sent[0]["status"], second.sent) == (200, [])
        assert service.admission.num_held == 0

    run(bundle, tmp_path, scenario)


def test_a_failure_half_way_is_an_event_of_the_stream(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(app: Starlette) -> None:
        decoder = app.state.service.assistant.decoder
        generate = decoder.generate

        def breaking(*arguments: Any) -> Any:
            ids = generate(*arguments)
            yield next(ids)
            ids.close()
            raise OSError("the device is gone")

        monkeypatch.setattr(decoder, "generate", breaking)
        stream, whole = Client(app, stream=True), Client(app)
        await stream.ask()
        await whole.ask()
        assert stream.sent[0]["status"] == 200
        bodies = b"".join(message.get("body", b"") for message in stream.sent).decode()
        *_, failure, done, _ = bodies.split("\n\n")
        error = json.loads(failure.removeprefix("data: "))["error"]
        assert (error["code"], done) == ("internal_error", "data: [DONE]")
        assert "device" not in error["message"]
        assert whole.sent[0]["status"] == 500

    run(bundle, tmp_path, scenario)


def test_others_are_answered_while_a_large_body_is_read(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(app: Starlette) -> None:
        loop, answered, others = asyncio.get_running_loop(), threading.Event(), list[bool]()

        def reading(body: bytes, content_type: str) -> ChatCompletionRequest:
            loop.call_soon_threadsafe(answered.set)
            others.append(answered.wait(SECONDS))
            return read_request(body, content_type)

        monkeypatch.setattr(completions, "read_request", reading)
        client = Client(app, max_tokens=1, stop=["x"], seed=1)
        client.lengthen(1 << 20)
        asking = asyncio.ensure_future(client.ask())
        await asyncio.wait_for(client.spoken.wait(), SECONDS)
        client.leave()
        await asyncio.wait_for(asking, SECONDS)
        assert client.sent[0]["status"] == 200
        assert others == [True]

    run(bundle, tmp_path, scenario)


def test_leaving_waits_for_no_files(bundle: Path, tmp_path: Path) -> None:
    """Threads that all share may be busy with files for long; a slot is free all the same."""

    async def scenario(app: Starlette) -> None:
        service: Service = app.state.service
        busy, release = ThreadPoolExecutor(1), threading.Event()
        asyncio.get_running_loop().set_default_executor(busy)
        client = Client(app, max_tokens=2000, stream=True)
        asking = asyncio.ensure_future(client.ask())
        await asyncio.wait_for(client.spoken.wait(), SECONDS)
        reading = busy.submit(release.wait, SECONDS)
        try:
            client.leave()
            await asyncio.wait_for(asking, SECONDS / 2)
            assert service.admission.num_held == 0
            assert not reading.done()
        finally:
            release.set()

    run(bundle, tmp_path, scenario)


def test_a_load_that_is_called_off_has_not_failed(bundle: Path, tmp_path: Path) -> None:
    async def live() -> None:
        service: Service = create_app(bundle, Settings(spool=tmp_path), threads=1).state.service
        service.sandbox.start()  # which takes as long as it takes
        with held(service.assistant.lane):
            service.loading = asyncio.create_task(service.load())
            await until(lambda: service.assistant.lane.num_waiting > 0)
            service.drain()
            await service.close()
            assert service.is_loading  # what nothing can end
            assert service.state == "draining"
        await until(lambda: not service.is_loading)

    asyncio.run(live())
