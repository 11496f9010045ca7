"""Questions one after the other: what each prompt is made of, and what is not computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from ppllava_engines.errors import UsageError
from ppllava_runtime import Assistant, Prompt, Video
from ppllava_runtime.conversation import TURNS, Turns
from ppllava_runtime.decoders import FinishReason, Sampling
from tiny_videos import numbered_frames, write_video

Parts = list[NDArray[Any]]

FIRST, SECOND, THIRD = "What colour is the circle?", "And the square?", "Who said so?"
MOST = 6


@pytest.fixture(scope="module")
def assistant(bundle: Path) -> Assistant:
    return Assistant.open(bundle)


@pytest.fixture(scope="module")
def video(assistant: Assistant, tmp_path_factory: pytest.TempPathFactory) -> Video:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return assistant.watch(write_video(path, numbered_frames(24), options={"g": "10"}), 6)


@pytest.fixture
def given(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> list[Parts]:
    """Every prompt that the decoder was given, in its parts."""
    found: list[Parts] = []
    generate = assistant.decoder.generate

    def noted(
        parts: Sequence[NDArray[Any]],
        most: int,
        sampling: Sampling,
        *others: Any,
    ) -> Generator[int, None, FinishReason]:
        found.append(list(parts))
        return generate(parts, most, sampling, *others)

    monkeypatch.setattr(assistant.decoder, "generate", noted)
    return found


def pooled(video: Video, question: str) -> NDArray[Any]:
    assistant, record = video.assistant, video.memory.record
    assert record is not None
    ids = assistant.prompts.build(question).text_ids
    text_embed = assistant.text.run({"input_ids": ids})["text_embed"]
    window = video.memory.window(assistant.model)
    return record.pool(text_embed, window, assistant.pool, assistant.weigh)[0]


def embedded(assistant: Assistant, text: str) -> NDArray[Any]:
    """What follows, by the decoder's own tokenizer; nothing is put before it."""
    bundle = assistant.bundle
    tokenizer = Tokenizer.from_file(str(bundle.file(bundle.manifest.tokenizers["decoder"])))
    return assistant.decoder.embed(tokenizer.encode(text, add_special_tokens=False).ids)


def next_turn(assistant: Assistant, question: str) -> NDArray[Any]:
    return embedded(assistant, assistant.model.next_turn_template.format(question=question))


@pytest.mark.parametrize("turns", TURNS)
def test_the_first_question_is_as_without_others(video: Video, turns: Turns) -> None:
    alone = video.ask(FIRST, max_new_tokens=MOST)
    first = video.converse(turns).ask(FIRST, max_new_tokens=MOST)
    assert first.ids == alone.ids
    np.testing.assert_array_equal(first.relevance, alone.relevance)


@pytest.mark.parametrize("turns", TURNS)
def test_later_prompts_go_on_from_what_was_said(
    assistant: Assistant, video: Video, given: list[Parts], turns: Turns
) -> None:
    conversation = video.converse(turns)
    answers = [conversation.ask(words, max_new_tokens=MOST) for words in (FIRST, SECOND)]
    assert answers[1].text
    third = conversation.ask(THIRD, max_new_tokens=MOST)
    assert answers[0].ids == ()  # asked for no word of it
    first, others = given[0], (given[1], given[2])
    seen = [pooled(video, FIRST if turns == "keep" else words) for words in (SECOND, THIRD)]
    after = first[1][len(seen[0]) :]
    said = [
        next_turn(assistant, SECOND),
        np.concatenate([assistant.decoder.embed(answers[1].ids), next_turn(assistant, THIRD)]),
    ]
    for count, (parts, tokens) in enumerate(zip(others, seen, strict=True), 1):
        whole = np.concatenate([first[0], tokens, after, *said[:count]])
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(parts[0], first[0])
    if turns == "keep":
        np.testing.assert_array_equal(given[2][1], first[1])
        np.testing.assert_array_equal(third.relevance, answers[0].relevance)
    else:
        assert not np.array_equal(third.relevance, answers[0].relevance)
    assert third.accounting.num_prompt_tokens == sum(map(len, given[2]))


def rows_run(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many rows the decoder ran since the last call."""
    decoder: Any = assistant.decoder
    counts: list[int] = []
    made = decoder._new_cache

    def counted(capacity: int) -> Any:
        cache = made(capacity)
        run = cache.run

        def noted(embeds: NDArray[Any], length: int) -> NDArray[np.float32]:
            counts.append(len(embeds))
            found: NDArray[np.float32] = run(embeds, length)
            return found

        cache.run = noted
        return cache

    monkeypatch.setattr(decoder, "_new_cache", counted)
    decoder._idle = None

    def since() -> int:
        total = sum(counts)
        counts.clear()
        return total

    return since


@pytest.mark.parametrize("turns", TURNS)
def test_only_what_is_new_is_run(
    assistant: Assistant, video: Video, monkeypatch: pytest.MonkeyPatch, turns: Turns
) -> None:
    # Each answer ends after its last id: none of them is an end token, which would be one row more.
    since = rows_run(assistant, monkeypatch)
    conversation = video.converse(turns)
    first = conversation.ask(FIRST, max_new_tokens=MOST)
    assert len(first.ids) == MOST
    assert since() == first.accounting.num_prompt_tokens + MOST - 1
    second = conversation.ask(SECOND, max_new_tokens=MOST)
    assert len(second.ids) == MOST
    before = len(assistant.prompts.build(FIRST).parts(assistant.model.image_token_index)[0])
    known = before if turns == "re-pool" else first.accounting.num_prompt_tokens + MOST - 1
    assert since() == second.accounting.num_prompt_tokens - known + MOST - 1


def test_kept_tokens_take_no_tower_and_no_pooling(
    assistant: Assistant, video: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = video.converse("keep")
    conversation.ask(FIRST, max_new_tokens=MOST, num_tokens=5)
    monkeypatch.setattr(assistant, "text", None)
    monkeypatch.setattr(assistant, "pool", None)
    second = conversation.ask(SECOND, max_new_tokens=MOST)
    spent = second.accounting.milliseconds
    assert (spent.text, spent.pool) == (0, 0)
    assert 0 < second.accounting.num_tokens_after <= 5
    assert conversation.ask(THIRD, max_new_tokens=1, num_tokens=5).ids
    with pytest.raises(UsageError, match="the visual tokens of the first question are kept"):
        conversation.ask(THIRD, kernel=(1, 1, 1))


@pytest.mark.parametrize("turns", TURNS)
def test_an_answer_ends_where_it_was_left(
    assistant: Assistant, video: Video, given: list[Parts], turns: Turns
) -> None:
    conversation = video.converse(turns)
    left = conversation.ask(FIRST, max_new_tokens=20)
    begun = next(iter(left))
    count = left.accounting.num_new_tokens
    conversation.ask(SECOND, max_new_tokens=1)
    assert (left.text, len(left.ids)) == (begun, count)
    said = np.concatenate([assistant.decoder.embed(left.ids), next_turn(assistant, SECOND)])
    np.testing.assert_array_equal(np.concatenate(given[1])[-len(said) :], said)


def test_others_in_between_change_no_answer(video: Video) -> None:
    alone, mixed = video.converse("keep"), video.converse("keep")
    expected = [alone.ask(words, max_new_tokens=MOST).ids for words in (FIRST, SECOND, THIRD)]
    found = []
    for words in (FIRST, SECOND, THIRD):
        found.append(mixed.ask(words, max_new_tokens=MOST).ids)
        assert video.ask("Something else?", max_new_tokens=2).ids
    assert found == expected


def test_a_refused_question_is_none(video: Video) -> None:
    conversation, other = video.converse(), video.converse()
    for each in (conversation, other):
        assert each.ask(FIRST, max_new_tokens=MOST).ids
    answer = conversation.ask(SECOND, max_new_tokens=MOST)
    begun = next(iter(answer))
    for options in ({"kernel": (99, 1, 1)}, {"temperature": -1}, {"max_new_tokens": 0}):
        with pytest.raises(UsageError):
            conversation.ask(THIRD, **options)
    with pytest.raises(UsageError, match="the question is empty"):
        conversation.ask(" ")
    with pytest.raises(TypeError):
        conversation.ask(THIRD, kernels=(1, 1, 1))  # type: ignore[call-arg]
    assert answer.text.startswith(begun)
    assert other.ask(SECOND, max_new_tokens=MOST).ids == answer.ids
    last = [each.ask(THIRD, max_new_tokens=MOST).ids for each in (conversation, other)]
    assert last[0] == last[1]


def test_a_conversation_that_is_too_long_says_so(assistant: Assistant, video: Video) -> None:
    conversation = video.converse("keep")
    assert conversation.ask(FIRST, max_new_tokens=400, temperature=3.0, seed=1).ids
    most = assistant.decoder.max_positions
    with pytest.raises(
        UsageError,
        match=rf"the conversation is \d+ tokens long and the model holds {most} with its answer: "
        "begin another one",
    ):
        for _ in range(20):
            assert conversation.ask(" ".join([SECOND] * 3), max_new_tokens=100, seed=1).ids


def test_pictures_may_be_joined_in_a_later_turn(
    assistant: Assistant, tmp_path: Path, given: list[Parts]
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, frame in zip(paths, numbered_frames(3, 64, 64), strict=True):
        Image.fromarray(frame).save(path)
    conversation = assistant.look(paths).converse()
    apart = conversation.ask(FIRST, kernel=(1, 4, 4), max_new_tokens=1)
    joined = conversation.ask(SECOND, kernel=(3, 4, 4), max_new_tokens=1)
    counts = [answer.accounting.num_tokens_after for answer in (apart, joined)]
    assert counts == [3, 1]
    assert len(given[1][0]) == len(given[0][0])


@pytest.mark.parametrize("turns", TURNS)
def test_nothing_need_be_seen(assistant: Assistant, turns: Turns) -> None:
    conversation = assistant.converse(turns)
    first = conversation.ask(FIRST, max_new_tokens=MOST)
    assert first.ids == assistant.ask(FIRST, max_new_tokens=MOST).ids
    second = conversation.ask(SECOND, max_new_tokens=MOST)
    assert second.kind is None
    assert second.accounting.num_prompt_tokens > first.accounting.num_prompt_tokens + MOST


def test_ids_may_be_asked_too(assistant: Assistant, video: Video) -> None:
    words, ids = video.converse(), video.converse()
    builder = assistant.prompts
    for question, prompt in (
        (FIRST, builder.build(FIRST)),
        (SECOND, builder.build_next(SECOND)),
        (THIRD, builder.build_next(THIRD)),
    ):
        expected = words.ask(question, max_new_tokens=MOST)
        assert ids.ask(prompt, max_new_tokens=MOST).ids == expected.ids
    place = assistant.model.image_token_index
    with pytest.raises(UsageError, match="has 1 places for visual tokens"):
        ids.ask(Prompt(builder.build(FIRST).text_ids, (5, place, 6)))


def test_refuses_turns_that_there_are_not(video: Video) -> None:
    with pytest.raises(UsageError, match="turns is 'forget', expected one of re-pool, keep"):
        video.converse("forget")  # type: ignore[arg-type]


@pytest.mark.parametrize("turns", TURNS)
def test_of_nothing_seen_nothing_is_run_again(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, turns: Turns
) -> None:
    since = rows_run(assistant, monkeypatch)
    conversation = assistant.converse(turns)
    known = 0
    for words in (FIRST, SECOND, THIRD, FIRST):
        answer = conversation.ask(words, max_new_tokens=MOST)
        assert len(answer.ids) == MOST
        length = answer.accounting.num_prompt_tokens + MOST - 1
        assert since() == length - known
        known = length


def test_of_nothing_seen_no_window_is_taken(assistant: Assistant) -> None:
    for ask in (assistant.ask, assistant.converse().ask, assistant.converse("keep").ask):
        with pytest.raises(UsageError, match="of no meaning where nothing was seen"):
            ask(FIRST, num_tokens=0)


def test_a_kept_map_is_shown_with_the_question_that_guided_it(video: Video, tmp_path: Path) -> None:
    shown = {}
    for turns in TURNS:
        conversation = video.converse(turns)
        answers = [conversation.ask(words, max_new_tokens=1) for words in (FIRST, SECOND)]
        assert [answer.question for answer in answers] == [FIRST, SECOND]
        assert [answer.guide for answer in answers] == [FIRST, FIRST if turns == "keep" else SECOND]
        for number, answer in enumerate(answers):
            answer.save_heatmap(tmp_path / "map.png")
            shown[turns, number] = (tmp_path / "map.png").read_bytes()
    assert shown["keep", 0] == shown["keep", 1] == shown["re-pool", 0] != shown["re-pool", 1]


def test_later_ids_that_guide_are_checked(assistant: Assistant, video: Video) -> None:
    builder = assistant.prompts
    later = builder.build_next(SECOND)
    text_ids = np.where(later.text_ids == assistant.model.text_eos_token_id, 5, later.text_ids)
    endless = Prompt(text_ids, later.ids)
    kept, pooled_anew = video.converse("keep"), video.converse()
    for conversation in (kept, pooled_anew):
        conversation.ask(FIRST, max_new_tokens=1)
    with pytest.raises(UsageError, match="the prompt's text_ids do not end"):
        pooled_anew.ask(endless)
    assert kept.ask(endless, max_new_tokens=1).ids


def test_stop_strings_are_looked_at_before_anything_is_run(
    assistant: Assistant, video: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assistant, "text", None)
    with pytest.raises(UsageError, match="stop has '' in it"):
        video.ask(FIRST, stop=[""])
    prompt = assistant.prompts.build(FIRST)
    mute = dataclasses.replace(assistant.bundle.manifest, tokenizers={})
    monkeypatch.setattr(assistant, "bundle", dataclasses.replace(assistant.bundle, manifest=mute))
    with pytest.raises(UsageError, match="there is no text to end"):
        video.ask(prompt, stop=["."])
