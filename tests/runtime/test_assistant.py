"""The whole story on a tiny model: watch, ask, read."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ppllava_engines.bundle import Bundle
from ppllava_engines.errors import InternalError, UsageError
from ppllava_runtime import Assistant, Video
from ppllava_runtime import answer as answer_module
from ppllava_runtime.preprocess import pixel_values
from ppllava_runtime.prompt import PromptBuilder
from ppllava_runtime.video import read_clip
from tiny_videos import numbered_frames, write_video

QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return write_video(path, numbered_frames(40), options={"g": "10"})


@pytest.fixture(scope="module")
def assistant(bundle: Path) -> Assistant:
    return Assistant.open(bundle)


@pytest.fixture
def video(assistant: Assistant, clip: Path) -> Video:
    return assistant.watch(clip, num_frames=6)


def test_pieces_are_the_text(video: Video) -> None:
    answer = video.ask(QUESTION, max_new_tokens=30)
    pieces = list(answer)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3
    assert list(answer) == pieces
    assert answer.accounting.num_new_tokens <= 30


def test_an_answer_is_what_the_graphs_say(bundle: Path, clip: Path) -> None:
    video = Assistant.open(bundle, memory="hidden-fp32").watch(clip, 6)
    opened = Bundle.open(bundle)
    model = opened.manifest.model
    frames = read_clip(clip, 6).frames
    values = pixel_values(frames, model.image_size, model.image_mean, model.image_std)
    seen = opened.engine("vision").run({"pixel_values": values})
    prompt = PromptBuilder.open(opened).build(QUESTION)
    window = {"kernel": np.array([3, 1, 2]), "stride": np.array([1, 1, 2])}
    text_embed = opened.engine("text").run({"input_ids": prompt.text_ids})["text_embed"]
    found = opened.engine("pool").run({**seen, "text_embed": text_embed, **window})

    answer = video.ask(QUESTION, kernel=(3, 1, 2), stride=(1, 1, 2), max_new_tokens=5)
    assert answer.relevance.dtype == np.float32
    np.testing.assert_allclose(answer.relevance, found["relevance"], atol=1e-5)
    expected = np.einsum("tlp,p->tl", seen["keys"], text_embed[0]).reshape(6, 4, 4)
    np.testing.assert_allclose(answer.relevance, expected, atol=1e-5)
    assert answer.accounting.num_tokens_before == 6 * 16
    assert answer.accounting.num_tokens_after == 4 * 4 * 2 == len(found["pooled"])
    assert answer.accounting.num_prompt_tokens == 32 + len(prompt.ids) - 1


def test_a_second_question_encodes_nothing(
    assistant: Assistant, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = assistant.watch(clip, num_frames=6)
    first = video.ask(QUESTION, max_new_tokens=3)
    monkeypatch.setattr(assistant, "vision", None)
    second = video.ask("And the square?", max_new_tokens=3)
    assert first.text
    assert second.text
    counts = [
        (a.num_frames_sampled, a.num_frames_decoded, a.num_frames_encoded)
        for a in (first.accounting, second.accounting)
    ]
    assert counts == [(6, video.info.num_decoded, 6), (6, 0, 0)]
    assert first.accounting.milliseconds.vision > 0
    spent = second.accounting.milliseconds
    assert (spent.decode, spent.preprocess, spent.vision) == (0, 0, 0)
    assert min(spent.text, spent.pool, spent.prefill, spent.generate) > 0
    assert spent.first_token == pytest.approx(spent.text + spent.pool + spent.prefill)
    assert spent.total == pytest.approx(spent.first_token + spent.generate)


def test_answers_left_half_way_do_no_harm(video: Video) -> None:
    expected = video.ask(QUESTION, max_new_tokens=25).text
    left = video.ask(QUESTION, max_new_tokens=25)
    begun = next(iter(left))
    assert video.ask("Another?", max_new_tokens=25).text != expected
    assert video.ask(QUESTION, max_new_tokens=25).text == expected
    assert left.text == expected
    assert left.text.startswith(begun)
    ended = video.ask(QUESTION, max_new_tokens=25)
    next(iter(ended))
    ended.close()
    assert ended.text == begun


def test_costs_so_far_are_told_on_the_way(video: Video) -> None:
    answer = video.ask(QUESTION, max_new_tokens=25)
    assert answer.accounting.num_new_tokens == 0
    assert answer.accounting.milliseconds.generate == 0
    next(iter(answer))
    assert 0 < answer.accounting.num_new_tokens < 25


def test_seeds_make_answers_repeatable(video: Video) -> None:
    def text(seed: int) -> str:
        return video.ask(QUESTION, max_new_tokens=30, temperature=1.2, top_p=0.9, seed=seed).text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_says_whether_it_was_cut(video: Video) -> None:
    assert video.ask(QUESTION, max_new_tokens=2).was_cut
    wild: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 440}
    answers = [video.ask(QUESTION, seed=seed, **wild) for seed in range(6)]
    whole = [answer for answer in answers if not answer.was_cut]
    assert whole
    for answer in whole:
        assert answer.accounting.num_new_tokens < 440
        again = video.ask(QUESTION, seed=answers.index(answer), **wild | {"max_new_tokens": 441})
        assert (again.text, again.was_cut) == (answer.text, False)


def test_a_budget_is_kept(video: Video) -> None:
    for budget in (1, 7, 24, 96, 500):
        after = video.ask(QUESTION, num_tokens=budget).accounting.num_tokens_after
        assert min(budget, 96) / 2 <= after <= min(budget, 96)
    assert video.ask(QUESTION).accounting.num_tokens_after == 3 * 2 * 2


def test_a_half_precision_bundle_answers(bundle_fp16: Path, clip: Path, video: Video) -> None:
    assistant = Assistant.open(bundle_fp16)
    answer = assistant.watch(clip, num_frames=6).ask(QUESTION, max_new_tokens=20)
    assert answer.text
    assert answer.relevance.dtype == np.float32
    np.testing.assert_allclose(answer.relevance, video.ask(QUESTION).relevance, atol=5e-3)


def test_one_frame_of_a_video_can_be_asked_about(assistant: Assistant, clip: Path) -> None:
    answer = assistant.watch(clip, num_frames=1).ask(QUESTION, max_new_tokens=3)
    assert answer.accounting.num_tokens_after == 4


def test_refuses_what_the_model_cannot_take(assistant: Assistant, clip: Path, video: Video) -> None:
    with pytest.raises(UsageError, match="frames is 65, but checkpoint takes at most 64"):
        assistant.watch(clip, num_frames=65)
    long = assistant.watch(clip, num_frames=40)
    with pytest.raises(UsageError, match=r"the prompt is 6\d\d tokens long"):
        long.ask(QUESTION, kernel=(1, 1, 1))
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        video.ask(QUESTION, max_new_tokens=0)


def test_a_refused_question_does_not_pay_for_watching(assistant: Assistant, clip: Path) -> None:
    video = assistant.watch(clip, num_frames=6)
    with pytest.raises(UsageError):
        video.ask("")
    assert video.ask(QUESTION, max_new_tokens=1).accounting.num_frames_encoded == 6


def test_once_loaded_needs_its_bundle_no_more(bundle: Path, clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    loaded = Assistant.open(copy).load()
    shutil.rmtree(copy)
    assert loaded.watch(clip, num_frames=6).ask(QUESTION, max_new_tokens=3).text


def test_accounts_cannot_be_changed(video: Video) -> None:
    accounting = video.ask(QUESTION, max_new_tokens=1).accounting
    with pytest.raises(dataclasses.FrozenInstanceError):
        accounting.num_new_tokens = 7  # type: ignore[misc]


def test_once_loaded_needs_its_bundle_for_no_schema_either(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    loaded = Assistant.open(copy).load()
    shutil.rmtree(copy)
    asked: dict[str, Any] = {"regex": "[a-z]{2,9} [0-9]+", "max_new_tokens": 20}
    answer = loaded.ask(QUESTION, **asked)
    assert re.match("[a-z]{2,9} [0-9]+$", answer.text)
    # What was loaded says the same as the file.
    assert answer.ids == Assistant.open(bundle).ask(QUESTION, **asked).ids


def failing(generate: Callable[..., Iterator[int]], count: int) -> Callable[..., Iterator[int]]:
    """The same, but it fails after so many ids."""

    def broken(*arguments: Any) -> Iterator[int]:
        yield from islice(generate(*arguments), count)
        raise InternalError("decoder: it broke")

    return broken


def test_an_answer_that_failed_fails_again(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = video.assistant.decoder
    monkeypatch.setattr(decoder, "generate", failing(decoder.generate, 9))
    answer = video.ask(QUESTION, max_new_tokens=25)
    begun: list[str] = []
    reads: list[Callable[[], object]] = [
        lambda: begun.extend(answer),
        lambda: answer.text,
        lambda: answer.ids,
        lambda: answer.finish_reason,
        lambda: answer.was_cut,
    ]
    for read in reads:
        with pytest.raises(InternalError, match="decoder: it broke"):
            read()
    assert begun
    assert len(answer.ids_so_far) == 9
    answer.close()
    assert len(answer.ids) == 9
    assert answer.text.startswith("".join(begun))
    assert answer.finish_reason == "stop"


def test_first_token_counts_all_that_a_question_needs(
    assistant: Assistant, video: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now

    def taking(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*arguments: Any) -> Any:
            clock.now += seconds
            return work(*arguments)

        return done

    assert video.ask(QUESTION, max_new_tokens=1).text  # pays for watching
    monkeypatch.setattr(answer_module, "time", clock)
    monkeypatch.setattr(assistant.prompts, "build", taking(1, assistant.prompts.build))
    monkeypatch.setattr(assistant, "constraint", taking(2, assistant.constraint))
    monkeypatch.setattr(assistant.text, "run", taking(4, assistant.text.run))
    answer = video.ask(QUESTION, max_new_tokens=3)
    assert answer.ids
    spent = answer.accounting.milliseconds
    assert (spent.first_token, spent.prefill, spent.text) == (7000, 3000, 4000)
