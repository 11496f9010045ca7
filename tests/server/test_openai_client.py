"""The official client, as people use it, against the real server."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from server_process import Serve, Served
from tiny_videos import numbered_frames, write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A video as a data: URL."""
    folder: Path = tmp_path_factory.mktemp("videos")
    path = write_video(folder / "clip.mp4", numbered_frames(12))
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as it:
        yield it


def ask(text: str, *parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def show(url: str | None, **fields: object) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **fields}


def extra_of(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_extra["x_ppllava"]
    return found


def test_a_question_about_a_video(client: openai.OpenAI, server: Served, video: str) -> None:
    completion = client.chat.completions.create(
        model=server.model, messages=ask("What happens?", show(video, num_frames=4)), max_tokens=8
    )
    (choice,) = completion.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert completion.usage is not None
    assert 0 < completion.usage.completion_tokens <= 8
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert extra_of(completion)["frames"]["sampled"] == 4


def test_a_stream_is_the_same_answer_in_pieces(
    client: openai.OpenAI, server: Served, video: str
) -> None:
    messages = ask("And what then?", show(video))
    whole = client.chat.completions.create(model=server.model, messages=messages, max_tokens=12)
    stream = client.chat.completions.create(
        model=server.model,
        messages=messages,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *middle, end, usage = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    pieces = [chunk.choices[0].delta.content for chunk in middle]
    assert all(pieces)
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert all(chunk.choices[0].finish_reason is None for chunk in middle)
    assert end.choices[0].finish_reason == whole.choices[0].finish_reason
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert extra_of(end)["tokens"] == extra_of(whole)["tokens"]
    assert all("x_ppllava" not in (chunk.model_extra or {}) for chunk in middle)
    assert len({chunk.id for chunk in (first, *middle, end, usage)}) == 1


def test_usage_comes_only_where_it_is_asked_for(client: openai.OpenAI, server: Served) -> None:
    chunks = list(
        client.chat.completions.create(
            model=server.model, messages=ask("Hello?"), max_tokens=4, stream=True
        )
    )
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_asked_again_by_its_uuid_nothing_is_sent_or_encoded(
    client: openai.OpenAI, server: Served, video: str
) -> None:
    def watch(url: str | None) -> Any:
        messages = ask("What is it?", show(url, uuid="again"))
        return client.chat.completions.create(model=server.model, messages=messages, max_tokens=6)

    before, after = watch(video), watch(None)
    assert before.choices[0].message == after.choices[0].message
    assert extra_of(after)["cached"] is True
    assert extra_of(after)["frames"]["decoded"] == extra_of(after)["frames"]["encoded"] == 0
    assert extra_of(after)["media"] == extra_of(before)["media"]


def test_an_answer_by_a_schema_is_json_of_it(client: openai.OpenAI, server: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"red": {"type": "boolean"}},
        "required": ["red"],
        "additionalProperties": False,
    }
    completion = client.chat.completions.create(
        model=server.model,
        messages=ask("Is it red?"),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "colour", "schema": schema, "strict": True},
        },
    )
    found = json.loads(completion.choices[0].message.content or "")
    assert found in ({"red": True}, {"red": False})


def test_a_seed_repeats_an_answer(client: openai.OpenAI, server: Served) -> None:
    def sampled(seed: int) -> str | None:
        completion = client.chat.completions.create(
            model=server.model,
            messages=ask("Tell me"),
            temperature=1.5,
            top_p=0.9,
            seed=seed,
            max_completion_tokens=12,
        )
        return completion.choices[0].message.content

    assert sampled(7) == sampled(7)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_an_answer_ends_before_a_stop_string(client: openai.OpenAI, server: Served) -> None:
    def asked(**fields: Any) -> Any:
        return client.chat.completions.create(
            model=server.model, messages=ask("Go on"), max_tokens=12, **fields
        ).choices[0]

    whole = asked().message.content
    middle = whole[len(whole) // 2]
    stopped = asked(stop=[middle])
    assert stopped.message.content == whole.partition(middle)[0].rstrip()
    assert stopped.finish_reason == "stop"


def test_the_next_question_goes_on_from_the_last_answer(
    client: openai.OpenAI, server: Served, video: str
) -> None:
    messages = ask("What is it?", show(video))
    first = client.chat.completions.create(model=server.model, messages=messages, max_tokens=6)
    assert first.usage is not None
    messages += [first.choices[0].message, {"role": "user", "content": "Why?"}]
    second = client.chat.completions.create(model=server.model, messages=messages, max_tokens=6)
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_system_message_comes_before_the_question(client: openai.OpenAI, server: Served) -> None:
    def length(*before: Any) -> int:
        completion = client.chat.completions.create(
            model=server.model, messages=[*before, *ask("Why?")], max_tokens=1
        )
        assert completion.usage is not None
        return completion.usage.prompt_tokens

    told = {"role": "system", "content": "You answer in one word."}
    assert length(told) > length()
    assert length(told) == length(told | {"role": "developer"})


@pytest.mark.parametrize(
    ("kind", "change", "code", "param"),
    [
        (openai.NotFoundError, {"model": "gpt-x"}, "model_not_found", "model"),
        (openai.BadRequestError, {"n": 2}, "invalid_type", "n"),
        (openai.BadRequestError, {"logprobs": True}, "unknown_field", "logprobs"),
        (openai.BadRequestError, {"temperature": -1}, "invalid_type", "temperature"),
        (openai.BadRequestError, {"messages": []}, "invalid_type", "messages"),
        (
            openai.NotFoundError,
            {"messages": ask("What?", show(None, uuid="never sent"))},
            "media_not_found",
            "messages[0].content[0]",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_an_exception_of_the_client(
    client: openai.OpenAI,
    server: Served,
    kind: type[openai.APIStatusError],
    change: dict[str, Any],
    code: str,
    param: str,
    stream: bool,
) -> None:
    asked: dict[str, Any] = {
        "model": server.model,
        "messages": ask("What?"),
        "stream": stream,
    } | change
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**asked)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error"


def test_a_wrong_key_is_an_authentication_error(serve: Serve) -> None:
    right = "a-key-of-the-right-length"
    keyed = serve(env={"PPLLAVA_API_KEYS": right}, key=right)
    url = f"{keyed.url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.chat.completions.create(model=keyed.model, messages=ask("Who?"))
    with openai.OpenAI(base_url=url, api_key=right, max_retries=0) as friend:
        assert [model.id for model in friend.models.list()] == [keyed.model]
        friend.chat.completions.create(model=keyed.model, messages=ask("Who?"), max_tokens=1)


def test_many_at_once_get_what_each_gets_alone(
    client: openai.OpenAI, server: Served, video: str
) -> None:
    questions = [f"What is number {i}?" for i in range(8)]
    alone = [
        client.chat.completions.create(
            model=server.model, messages=ask(question, show(video)), max_tokens=6
        )
        .choices[0]
        .message.content
        for question in questions
    ]

    async def text(asking: openai.AsyncOpenAI, question: str) -> str:
        stream = await asking.chat.completions.create(
            model=server.model, messages=ask(question, show(video)), max_tokens=6, stream=True
        )
        chunks: list[ChatCompletionChunk] = [chunk async for chunk in stream]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0
        ) as asking:
            return await asyncio.gather(*(text(asking, question) for question in questions))

    assert asyncio.run(together()) == alone
