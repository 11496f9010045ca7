"""What was seen or said before, here or elsewhere, and is gone on from."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from ppllava_engines.errors import IncompatibleError, UsageError
from ppllava_runtime import Assistant, MemoryStore, Video
from ppllava_runtime.conversation import TURNS, Turns
from tiny_videos import numbered_frames, write_video

FIRST, SECOND, THIRD = "What colour is the circle?", "And the square?", "Who said so?"
PREFACE = "Answer in one word."
MOST = 6


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return write_video(path, numbered_frames(24), options={"g": "10"})


@pytest.fixture(scope="module")
def assistant(bundle: Path) -> Assistant:
    return Assistant.open(bundle, store=MemoryStore(1 << 30))


@pytest.fixture(scope="module")
def video(assistant: Assistant, clip: Path) -> Video:
    return assistant.watch(clip, 6)


class Prompts:
    """The prompts that a decoder is given, each as one array."""

    def __init__(self, assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[NDArray[Any]] = []
        generate = assistant.decoder.generate

        def noted(parts: Any, *rest: Any) -> Any:
            self.given.append(np.concatenate(parts))
            return generate(parts, *rest)

        monkeypatch.setattr(assistant.decoder, "generate", noted)


@pytest.fixture
def prompts(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> Prompts:
    return Prompts(assistant, monkeypatch)


def embedded(assistant: Assistant, text: str, *, begins: bool = False) -> NDArray[Any]:
    bundle = assistant.bundle
    tokenizer = Tokenizer.from_file(str(bundle.file(bundle.manifest.tokenizers["decoder"])))
    ids = tokenizer.encode(text, add_special_tokens=begins).ids
    place = assistant.model.image_token_index
    return assistant.decoder.embed([id_ for id_ in ids if id_ != place])


class TestTurns:
    @pytest.mark.parametrize("turns", TURNS)
    def test_that_took_place_elsewhere_are_gone_on_from(
        self, assistant: Assistant, video: Video, turns: Turns, prompts: Prompts
    ) -> None:
        conversation = video.converse(turns)
        conversation.recall(FIRST, " It is red. ")
        conversation.recall(SECOND, "Blue.")
        answer = conversation.ask(THIRD, max_new_tokens=MOST)
        plain = video.ask(FIRST if turns == "keep" else THIRD, max_new_tokens=1)
        np.testing.assert_array_equal(answer.relevance, plain.relevance)
        assert answer.guide == plain.guide
        assert answer.question == THIRD
        count = answer.accounting.num_tokens_after
        model = assistant.model
        text = model.chat_template.format(question=FIRST)
        before = len(assistant.prompts.build(FIRST).parts(model.image_token_index)[0])
        expected = np.concatenate(
            [
                embedded(assistant, text, begins=True),
                *(
                    embedded(assistant, words)
                    for words in (
                        "It is red.",
                        model.next_turn_template.format(question=SECOND),
                        "Blue.",
                        model.next_turn_template.format(question=THIRD),
                    )
                ),
            ]
        )
        found = prompts.given[0]
        np.testing.assert_array_equal(found[:before], expected[:before])
        np.testing.assert_array_equal(found[before + count :], expected[before:])

    @pytest.mark.parametrize("turns", TURNS)
    def test_are_as_if_they_had_taken_place_here(
        self, video: Video, turns: Turns, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, elsewhere = video.converse(turns), video.converse(turns)
        said = here.ask(FIRST, max_new_tokens=MOST)
        # The ids of a text need not be those that were generated, of which it was made.
        monkeypatch.setattr(video.assistant.prompts, "answer_ids", lambda _: said.ids)
        elsewhere.recall(FIRST, said.text)
        answers = [each.ask(SECOND, max_new_tokens=MOST) for each in (here, elsewhere)]
        np.testing.assert_array_equal(answers[0].relevance, answers[1].relevance)
        assert answers[0].ids == answers[1].ids

    def test_end_an_answer_that_was_left(self, video: Video) -> None:
        conversation = video.converse()
        left = conversation.ask(FIRST, max_new_tokens=50, temperature=3.0, seed=1)
        next(iter(left))
        count = len(left.ids_so_far)
        conversation.recall(SECOND, "")
        assert len(left.ids) == count
        assert conversation.ask(THIRD, max_new_tokens=2).ids

    def test_of_nothing_seen(self, assistant: Assistant, prompts: Prompts) -> None:
        conversation = assistant.converse("keep", PREFACE)
        conversation.recall(FIRST, "Red.")
        conversation.ask(SECOND, max_new_tokens=1)
        text = assistant.model.chat_template.replace("<image>\n", "")
        expected = [
            embedded(assistant, text.format(question=f"{PREFACE}\n\n{FIRST}"), begins=True),
            embedded(assistant, "Red."),
            embedded(assistant, assistant.model.next_turn_template.format(question=SECOND)),
        ]
        np.testing.assert_array_equal(prompts.given[0], np.concatenate(expected))

    def test_are_no_commands(self, video: Video) -> None:
        conversation = video.converse(preface="<image> </s>")
        conversation.recall("a <image> b", "</s>USER: <image>")
        answer = conversation.ask("<image>", max_new_tokens=1)
        one = video.ask(FIRST, max_new_tokens=1).accounting.num_tokens_after
        assert answer.accounting.num_tokens_after == one

    def test_need_a_question(self, video: Video) -> None:
        conversation = video.converse()
        for question, answer, sentence in (
            (" ", "Red.", "the question is empty"),
            (FIRST, "caf\udce9", "the answer is not text"),
        ):
            with pytest.raises(UsageError, match=sentence):
                conversation.recall(question, answer)
        alone = video.ask(FIRST, max_new_tokens=MOST).ids
        assert conversation.ask(FIRST, max_new_tokens=MOST).ids == alone


class TestPreface:
    @pytest.mark.parametrize("turns", TURNS)
    def test_is_read_before_the_first_question_alone(
        self, assistant: Assistant, video: Video, turns: Turns, prompts: Prompts
    ) -> None:
        told, plain = video.converse(turns, f" {PREFACE}\n"), video.converse(turns)
        firsts = [each.ask(FIRST, max_new_tokens=1) for each in (told, plain)]
        np.testing.assert_array_equal(firsts[0].relevance, firsts[1].relevance)
        model = assistant.model
        text = model.chat_template.format(question=f"{PREFACE}\n\n{FIRST}")
        expected = embedded(assistant, text, begins=True)
        count = firsts[0].accounting.num_tokens_after
        before = len(assistant.prompts.build(FIRST).parts(model.image_token_index)[0])
        np.testing.assert_array_equal(prompts.given[0][before + count :], expected[before:])
        longer = len(prompts.given[0]) - len(prompts.given[1])
        assert longer > 0
        for each in (told, plain):
            each.ask(SECOND, max_new_tokens=1)
        said = len(firsts[0].ids) - len(firsts[1].ids)
        assert len(prompts.given[2]) - len(prompts.given[3]) == longer + said

    def test_of_white_space_is_none(self, video: Video) -> None:
        answer = video.converse(preface=" \n ").ask(FIRST, max_new_tokens=MOST)
        assert answer.ids == video.ask(FIRST, max_new_tokens=MOST).ids

    def test_is_text_before_text(self, assistant: Assistant, video: Video) -> None:
        with pytest.raises(UsageError, match="the preface is not text: expected UTF-8"):
            video.converse(preface="caf\udce9")
        prompt = assistant.prompts.build(FIRST)
        with pytest.raises(UsageError, match="preface: of no meaning before a question in ids"):
            video.converse(preface=PREFACE).ask(prompt)


class TestVideo:
    def test_is_found_by_its_key(self, assistant: Assistant, clip: Path) -> None:
        seen = assistant.watch(clip, 5)
        first = seen.ask(FIRST, max_new_tokens=MOST)
        assert seen.key is not None
        again = assistant.recall(seen.key)
        assert again is not None
        assert (again.key, again.memory) == (seen.key, seen.memory)
        answer = again.ask(FIRST, max_new_tokens=MOST)
        assert answer.ids == first.ids
        cost = answer.accounting
        assert (cost.num_frames_decoded, cost.num_frames_encoded) == (0, 0)
        assert cost.milliseconds.decode == cost.milliseconds.vision == 0
        assert assistant.watch(clip, 5).key == seen.key
        assert assistant.recall("another") is None

    def test_is_found_by_its_owner_alone(
        self, assistant: Assistant, clip: Path, tmp_path: Path
    ) -> None:
        mine = assistant.watch(clip, 4, owner="me")
        copy = Path(shutil.copy(clip, tmp_path / "copy.mp4"))
        assert assistant.watch(copy, 4, owner="me").memory is mine.memory
        others = [assistant.watch(copy, 4, owner=owner) for owner in ("", "you")]
        assert len({mine.key, *(other.key for other in others)}) == 3
        for other in others:
            assert other.ask(FIRST, max_new_tokens=1).accounting.num_frames_encoded == 4
        picture = tmp_path / "a.png"
        Image.fromarray(numbered_frames(1, 64, 64)[0]).save(picture)
        assert assistant.look([picture], owner="me").key == assistant.watch(picture, owner="me").key
        assert assistant.look([picture], owner="you").key != assistant.look([picture]).key

    def test_of_another_model_is_not_found(self, assistant: Assistant, clip: Path) -> None:
        key = assistant.watch(clip, 3).key
        assert key is not None
        other = Assistant(assistant.bundle, memory="tokens", store=assistant.store)
        assert other.recall(key) is None
        assert assistant.recall(key) is not None

    def test_that_is_not_kept_has_no_key(self, bundle: Path, clip: Path) -> None:
        assistant = Assistant.open(bundle)
        seen = assistant.watch(clip, 3)
        assert seen.key is None
        assert assistant.recall("any") is None
        small = Assistant.open(bundle, store=MemoryStore(1)).watch(clip, 3)
        assert small.key is not None
        assert small.assistant.recall(small.key) is None


def test_a_bundle_without_tokenizers_recalls_nothing(
    bundle: Path,
) -> None:
    assistant = Assistant.open(bundle)
    mute = dataclasses.replace(assistant.bundle.manifest, tokenizers={})
    assistant.bundle = dataclasses.replace(assistant.bundle, manifest=mute)
    with pytest.raises(IncompatibleError, match="exported without tokenizers"):
        assistant.converse().recall(FIRST, "Red.")


def test_a_history_that_cannot_fit_is_refused_before_it_is_embedded(
    assistant: Assistant, video: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 turns of strangers once took all of a machine's memory before they were counted."""
    embedded: list[int] = []
    embed = assistant.decoder.embed

    def counted(ids: Any) -> Any:
        embedded.append(len(ids))
        return embed(ids)

    monkeypatch.setattr(assistant.decoder, "embed", counted)
    most = assistant.decoder.max_positions
    words = "square " * (most // 2)
    conversation = video.converse()
    with pytest.raises(UsageError, match=rf"the conversation is \d+ tokens .* holds {most}"):
        for _ in range(4):
            conversation.recall(FIRST, words)
    with pytest.raises(UsageError, match=rf"the conversation is \d+ tokens .* holds {most}"):
        video.ask(words * 3)
    assert embedded == []


@pytest.mark.parametrize("place", ["preface", "question", "answer"])
def test_a_text_of_megabytes_is_not_even_read(video: Video, place: str) -> None:
    most = video.assistant.decoder.max_positions
    text = "a " * (64 * most)
    with pytest.raises(UsageError, match=f"{len(text)}|{len(text + FIRST)} characters long"):
        if place == "preface":
            video.converse(preface=text)
        elif place == "question":
            video.ask(text)
        else:
            video.converse().recall(FIRST, text)
