"""One request from its bytes to its last event, and what becomes of it when nobody waits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from ppllava_engines.errors import UsageError
from ppllava_runtime.asking import DEFAULT_MAX_NEW_TOKENS
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.server.answering import aside, in_thread
from ppllava_runtime.server.app import create_app
from ppllava_runtime.server.asked import Asked, Item, read_asked
from ppllava_runtime.server.completions import _Completion
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.live_messages import Config
from ppllava_runtime.server.live_window import live_video
from ppllava_runtime.server.media import Media, Remembered, Uuids
from ppllava_runtime.server.replies import ChatCompletionChunk
from ppllava_runtime.server.schema import read_request
from ppllava_runtime.server.service import Service
from ppllava_runtime.server.settings import Settings
from server_process import Served

SECONDS = 20.0  # no wait is meant to last
USER = {"role": "user", "content": "What is it?"}
ASSISTANT = {"role": "assistant", "content": "A cat."}
SYSTEM = {"role": "system", "content": "Be brief."}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}


def asked(*messages: object, **fields: object) -> Asked:
    body = {"model": "m", "messages": messages or [USER]} | fields
    return read_asked(read_request(json.dumps(body).encode(), "application/json"))


def user(*parts: object) -> dict[str, object]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}


def test_messages_become_turns() -> None:
    found = asked(SYSTEM, SYSTEM | {"role": "developer"}, USER, ASSISTANT, USER)
    assert found.preface == "Be brief.\n\nBe brief."
    assert found.turns == (("What is it?", "A cat."),)
    assert found.question == "What is it?"
    assert found.options.max_new_tokens == DEFAULT_MAX_NEW_TOKENS


def test_texts_of_one_message_are_lines() -> None:
    parts = [{"type": "text", "text": "Look."}, {"type": "text", "text": "Where?"}]
    assert asked({"role": "user", "content": parts}).question == "Look.\nWhere?"


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ([SYSTEM], {}, "messages"),
        ([USER, ASSISTANT], {}, "messages"),
        ([ASSISTANT], {}, "messages[0].role"),
        ([USER, USER], {}, "messages[1].role"),
        ([USER, SYSTEM], {}, "messages[1].role"),
        ([USER, ASSISTANT, user(PICTURE)], {}, "messages[2].content[0]"),
        ([user(VIDEO, VIDEO)], {}, "messages[0].content[1]"),
        ([user(PICTURE, VIDEO)], {}, "messages[0].content[1]"),
        ([user({"type": "image_url", "image_url": None})], {}, "messages[0].content[0]"),
        (
            [user({"type": "image_url", "image_url": {"url": None, "uuid": "a"}, "uuid": "b"})],
            {},
            "messages[0].content[0].uuid",
        ),
        ([USER], {"media_io_kwargs": {"video": {"fps": 1}}}, "media_io_kwargs.video"),
        (
            [user({"type": "video", "frames": ["data:"], "fps": 1})],
            {"media_io_kwargs": {"video": {"fps": 1}}},
            "media_io_kwargs.video.fps",
        ),
        ([USER], {"mm_processor_kwargs": {"num_tokens": 3}}, "mm_processor_kwargs"),
        ([USER], {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ([USER], {"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_has_no_meaning_is_refused_by_its_place(
    messages: list[object], fields: dict[str, object], param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        asked(*messages, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"tools": []}, "unknown_field", "tools"),
        ({"messages": [USER | {"name": "me"}]}, "unknown_field", "messages[0].name"),
        ({"messages": [{"role": "user"}]}, "missing_field", "messages[0].content"),
        ({"messages": [{"role": "tool", "content": ""}]}, "invalid_type", "messages[0]"),
        (
            {"messages": [user({"type": "input_audio"})]},
            "invalid_type",
            "messages[0].content[0]",
        ),
        (
            {"messages": [user(PICTURE | {"image_url": {"url": "x", "detail": "high"}})]},
            "invalid_type",
            "messages[0].content[0].image_url.detail",
        ),
        (
            {"messages": [user(VIDEO | {"fps": 0})]},
            "invalid_type",
            "messages[0].content[0].fps",
        ),
        ({"stop": ["a"] * 5}, "invalid_type", "stop"),
        ({"stream": 1}, "invalid_type", "stream"),
        ({"n": True}, "invalid_type", "n"),
        ({"seed": 1.5}, "invalid_type", "seed"),
        ({"max_tokens": 10**400}, "invalid_type", "max_tokens"),
        ({"model": "\ud800"}, "invalid_type", "model"),
    ],
)
def test_what_a_request_may_not_be_is_refused_by_its_place(
    change: dict[str, object], code: str, param: str
) -> None:
    body = {"model": "m", "messages": [USER]} | change
    with pytest.raises(ApiError) as caught:
        read_request(json.dumps(body).encode(), "application/json")
    error = caught.value
    assert (error.status, error.code, error.param) == (400, code, param)
    assert param in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'{"model": "a", "model": "b"}',
        b'{"seed": NaN}',
        b"[" * 100_000,
        b"[" + b"{}," * 100_000 + b"{}]",
    ],
    ids=["empty", "cut", "bytes", "twice", "nan", "deep", "many"],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        read_request(body, "application/json")
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data"])
def test_other_than_json_is_refused(server: Served, content_type: str) -> None:
    body = json.dumps({"model": server.model, "messages": [USER]})
    headers = {"content-type": content_type} if content_type else {}
    response = httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_content_type"


def test_whole_numbers_may_have_a_point() -> None:
    assert asked(max_tokens=3.0, seed=1e3).options.max_new_tokens == 3


def test_events_are_lines_of_data_up_to_the_last(server: Served) -> None:
    body = {"model": server.model, "messages": [USER], "stream": True, "max_tokens": 3}
    response = httpx2.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks:  # they are what the document says
        ChatCompletionChunk.model_validate(chunk)
    assert chunks[-1]["x_ppllava"]["frames"]["sampled"] == 0


def test_the_decoder_knows_whose_an_answer_is(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it does not begin it with what it has run for another."""
    service: Service = create_app(bundle, Settings(spool=tmp_path), threads=1).state.service
    decoder, owners = service.assistant.decoder, list[str]()
    generate = decoder.generate

    def noting(*arguments: Any) -> Any:
        owners.append(arguments[-1])
        return generate(*arguments)

    monkeypatch.setattr(decoder, "generate", noting)
    body = {"model": service.model_id, "messages": [USER], "max_tokens": 2}
    request = read_request(json.dumps(body).encode(), "application/json")
    try:
        for tenant in ("a", "b"):
            completion = _Completion(service, request, read_asked(request), tenant)
            assert "".join(completion._work(Media((), (), tenant), Leaving()))
        live = live_video(service, Config(type="session.config"), "c")
        live.add(np.zeros((8, 8, 3), np.uint8), 0)
        assert live.ask("What is it?", max_new_tokens=2).ids
    finally:
        service.threads.shutdown()
        service.spool.close()
    assert owners == ["a", "b", "c"]


def test_a_thread_puts_its_items_in_order() -> None:
    found: list[int] = []

    def produce(_: Leaving) -> Generator[int, None, None]:
        yield from range(100)

    with ThreadPoolExecutor(1) as threads:
        asyncio.run(in_thread(threads, produce, found.append))
    assert found == list(range(100))


def test_what_a_thread_raises_is_raised() -> None:
    def produce(_: Leaving) -> Generator[int, None, None]:
        yield 1
        raise UsageError("stop is empty")

    found: list[int] = []
    with ThreadPoolExecutor(1) as threads, pytest.raises(UsageError, match="stop is empty"):
        asyncio.run(in_thread(threads, produce, found.append))
    assert found == [1]


def test_a_thread_that_nobody_waits_for_ends_before_that_is_told() -> None:
    began, left, ended = threading.Event(), threading.Event(), threading.Event()

    def produce(leaving: Leaving) -> Generator[int, None, None]:
        try:
            with leaving.ending(left.set):
                yield 1
                began.set()
                assert left.wait(SECONDS)
                yield 2
        finally:
            ended.set()

    found: list[int] = []

    async def leave() -> None:
        with ThreadPoolExecutor(1) as threads:
            working = asyncio.ensure_future(in_thread(threads, produce, found.append))
            assert await asyncio.to_thread(began.wait, SECONDS)
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working
            assert ended.is_set()
            assert working.cancelled()

    asyncio.run(leave())
    assert found == [1]


def test_who_leaves_before_it_is_asked_for_is_known_at_once() -> None:
    leaving, ended = Leaving(), threading.Event()
    leaving.leave()
    with leaving.ending(ended.set):
        assert ended.is_set()


def test_only_what_is_under_way_is_ended() -> None:
    leaving, before, now = Leaving(), threading.Event(), threading.Event()
    with leaving.ending(before.set):
        pass
    with leaving.ending(now.set):
        leaving.leave()
        leaving.end()
    assert (before.is_set(), now.is_set()) == (False, True)


@pytest.mark.parametrize("size", [1 << 10, 1 << 20])
def test_what_is_large_is_read_while_others_are_answered(size: int) -> None:
    async def run() -> bool:
        loop, answered = asyncio.get_running_loop(), threading.Event()

        def read() -> bool:
            loop.call_soon_threadsafe(answered.set)
            # Where it is small nobody needs to be answered meanwhile.
            return answered.wait(SECONDS if size > 1 << 18 else 0)

        return await aside(size, read)

    assert asyncio.run(run()) == (size > 1 << 18)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url"},
        {"type": "video_url", "video_url": None},
        {"type": "video_url", "video_url": {}},
        {"type": "input_video"},
        {"type": "input_video", "input_video": {"format": "mp4"}},
        {"type": "video", "fps": 2},
        {"type": "image_url"},
        {"type": "image_url", "image_url": {"url": None}},
    ],
)
def test_a_name_stands_for_content_that_is_left_out(part: dict[str, object]) -> None:
    (item,) = asked(user(part | {"uuid": "name"})).items
    assert (item.urls, item.uuid) == (None, "name")
    with pytest.raises(ApiError, match="neither content nor a uuid"):
        asked(user(part))


def test_names_are_lost_by_who_gave_most() -> None:
    uuids, remembered = Uuids(6), Remembered("key", b"", ())

    def named(name: str) -> list[Item]:
        return [Item("image", None, name, "messages[0].content[0]")]

    for name in ("one", "two"):
        uuids.put("quiet", named(name), remembered)
    for number in range(20):
        uuids.put("loud", named(str(number)), remembered)
        assert uuids.get("loud", named("0")) is remembered
    assert all(uuids.get("quiet", named(name)) for name in ("one", "two"))
    kept = [number for number in range(20) if uuids.get("loud", named(str(number)))]
    assert kept == [0, 17, 18, 19]  # the ones used last
    uuids.put("new", named("one"), remembered)
    assert uuids.get("new", named("one")) is not None
    assert sum(uuids.get("loud", named(str(number))) is not None for number in kept) == 3


def test_relevance_without_anything_to_be_seen_is_refused() -> None:
    with pytest.raises(ApiError, match="nothing to be seen") as caught:
        asked(user(), x_ppllava={"relevance": "curve"})
    assert (caught.value.status, caught.value.param) == (400, "x_ppllava.relevance")
    assert asked(user(), x_ppllava={}).relevance is None
