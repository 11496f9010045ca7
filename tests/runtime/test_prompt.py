"""Strings to ids and back, to the last space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from ppllava_engines.bundle import ModelSpec
from ppllava_engines.errors import DataError, UsageError
from ppllava_runtime.prompt import PromptBuilder, TextStream, _load
from tiny_checkpoint import IMAGE_TOKEN_INDEX, decoder_tokenizer, text_tokenizer

BOS, EOS = 512, 513


def model(**changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "name": "tiny",
        "image_size": 32,
        "grid": (4, 4),
        "vision_width": 32,
        "key_width": 16,
        "decoder_width": 64,
        "max_frames": 64,
        "frames_coupled": False,
        "image_mean": (0.0, 0.0, 0.0),
        "image_std": (1.0, 1.0, 1.0),
        "kernel": (2, 2, 2),
        "stride": (2, 2, 2),
        "image_kernel": (1, 2, 2),
        "image_stride": (1, 2, 2),
        "temperature": 0.01,
        "text_positions": 12,
        "text_bos_token_id": BOS,
        "text_eos_token_id": EOS,
        "text_pad_token_id": None,
        "pooling": None,
        "image_grid_pinpoints": (),
        "image_token_index": IMAGE_TOKEN_INDEX,
        "chat_template": "USER: <image>\n{question} ASSISTANT: ",
        "default_frames": 8,
    }
    return ModelSpec(**fields | changes)


def builder(**changes: Any) -> PromptBuilder:
    return PromptBuilder(decoder_tokenizer(), text_tokenizer(), model(**changes))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def words() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(("<unk>", "the", "red", "circle", "moves", "."))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


class TestPrompt:
    def test_is_the_template_around_the_place_of_the_video(self) -> None:
        prompt = builder().build("What {moves}?")
        ids = decoder_tokenizer().encode("USER: <image>\nWhat {moves}? ASSISTANT: ").ids
        assert [*prompt.ids] == ids
        place = ids.index(IMAGE_TOKEN_INDEX)
        assert prompt.parts(IMAGE_TOKEN_INDEX) == [(*ids[:place],), (*ids[place + 1 :],)]

    @pytest.mark.parametrize("count", [0, 3])
    def test_has_as_many_places_as_asked_for(self, count: int) -> None:
        prompt = builder().build("What moves?", count)
        turn = "USER: " + "<image>\n" * count + "What moves? ASSISTANT: "
        assert [*prompt.ids] == decoder_tokenizer().encode(turn).ids
        assert len(prompt.parts(IMAGE_TOKEN_INDEX)) == count + 1

    def test_guides_by_the_question_alone(self) -> None:
        (text_ids,) = builder().build("  Red box ").text_ids.tolist()
        assert text_ids == text_tokenizer().encode("Red box").ids
        assert (text_ids[0], text_ids[-1]) == (BOS, EOS)

    def test_guides_by_the_beginning_of_a_long_question(self) -> None:
        question = "abcdefghijklmnopqrstuvwxyz"
        (text_ids,) = builder().build(question).text_ids.tolist()
        assert text_ids == [*text_tokenizer().encode(question).ids[:11], EOS]

    def test_fills_up_what_a_siglip_tower_wants_whole(self) -> None:
        siglip = {"text_bos_token_id": None, "text_eos_token_id": 1, "text_pad_token_id": 7}
        words = text_tokenizer().encode("Red box", add_special_tokens=False).ids
        (short,) = builder(**siglip).build("Red box").text_ids.tolist()
        assert short == [*words, 1, *[7] * (11 - len(words))]
        question = "abcdefghijklmnopqrstuvwxyz"
        words = text_tokenizer().encode(question, add_special_tokens=False).ids
        (long,) = builder(**siglip).build(question).text_ids.tolist()
        assert long == [*words[:11], 1]

    def test_does_not_take_over_settings_for_training(self) -> None:
        decoder, text = decoder_tokenizer(), text_tokenizer()
        for tokenizer in (decoder, text):
            tokenizer.enable_truncation(4)
            tokenizer.enable_padding(length=200)
        built = PromptBuilder(decoder, text, model()).build("What moves?")
        expected = builder().build("What moves?")
        assert built.ids == expected.ids
        assert built.text_ids.tolist() == expected.text_ids.tolist()

    @pytest.mark.parametrize(
        ("question", "sentence"),
        [
            ("  \n", "the question is empty"),
            ("caf\udce9", "the question is not text: expected UTF-8"),
            ("a <image> b", "the question contains the reserved '<image>': leave it out"),
            ("end</s>", "the question contains the reserved '</s>': leave it out"),
            (
                "<|endoftext|>",
                "the question contains the reserved '<|endoftext|>': leave it out",
            ),
        ],
    )
    def test_refuses(self, question: str, sentence: str) -> None:
        with pytest.raises(UsageError) as caught:
            builder().build(question)
        assert str(caught.value) == sentence

    @pytest.mark.parametrize("template", ["{question}", "<image><image>{question}"])
    def test_needs_one_place_for_the_video(self, template: str) -> None:
        with pytest.raises(DataError, match=r"image tokens \(id 3\), expected 1: export it again"):
            builder(chat_template=template).build("What moves?")

    def test_needs_tokenizers(self, tmp_path: Path) -> None:
        path = tmp_path / "decoder.json"
        path.write_text("{}", encoding="utf-8")
        with pytest.raises(DataError, match="not a tokenizer, export it again"):
            _load(path)


class TestStream:
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁�<")))
    def test_is_the_text(self, text: str) -> None:
        tokenizer = decoder_tokenizer()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids).strip() == text.strip()

    def test_gives_each_word_with_its_space_at_once(self) -> None:
        tokenizer = words()
        ids = tokenizer.encode("the red circle moves .").ids
        assert streamed(tokenizer, ids) == ["the", " red", " circle", " moves", " .", ""]

    def test_never_shows_half_a_character(self) -> None:
        tokenizer = decoder_tokenizer()
        ids = tokenizer.encode("a你好é🙂", add_special_tokens=False).ids
        pieces = streamed(tokenizer, ids)
        assert [piece for piece in pieces if piece] == ["a", "你", "好", "é", "🙂"]
        cut = streamed(tokenizer, ids[:-1])
        assert [piece for piece in cut if piece] == ["a", "你", "好", "é"]

    def test_skips_special_tokens(self) -> None:
        tokenizer = decoder_tokenizer()
        a, b, space = tokenizer.encode("ab c", add_special_tokens=False).ids[1:4]
        assert streamed(tokenizer, [1, space, a, 2, space, 1, b]) == [
            *("", "", "a", "", "", "", " b"),
            "",
        ]

    def test_leaves_no_white_space_at_the_ends(self) -> None:
        tokenizer = decoder_tokenizer()
        ids = tokenizer.encode(" \n a \n b \n ", add_special_tokens=False).ids
        assert "".join(streamed(tokenizer, ids)) == "a \n b"

    @given(st.lists(st.integers(0, 354)))
    def test_goes_on_after_bytes_that_are_no_text(self, ids: list[int]) -> None:
        tokenizer = decoder_tokenizer()
        stream = TextStream(tokenizer)
        for token in ids:
            stream.push(token)
        stream.finish()
        pieces = "".join(streamed(tokenizer, [*ids, *tokenizer.encode(" end").ids]))
        assert pieces.endswith("end")
