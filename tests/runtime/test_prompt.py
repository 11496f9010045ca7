"""Strings to ids and back, to the last space."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from ppllava_engines.bundle import Manifest, ModelSpec
from ppllava_engines.errors import DataError, UsageError
from ppllava_runtime.prompt import Prompt, PromptBuilder, TextStream, _load
from tiny_bundle import tiny_manifest, write_bundle
from tiny_checkpoint import (
    IMAGE_TOKEN_INDEX,
    decoder_tokenizer,
    siglip_text_tokenizer,
    text_tokenizer,
)

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
        "next_turn_template": "</s>USER: {question} ASSISTANT: ",
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


def lowering_decoder(*tokens: AddedToken) -> Tokenizer:
    """A decoder's tokenizer that sees its added tokens in a text's lower case."""
    tokenizer = decoder_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    tokenizer.add_tokens([*tokens])
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

    def test_of_a_next_turn_follows_the_answer_before_it(self) -> None:
        made, tokenizer = builder(), decoder_tokenizer()
        first, later = made.build("red circle"), made.build_next(" red circle ")
        expected = "</s>USER: red circle ASSISTANT: "
        assert later.ids == tuple(tokenizer.encode(expected, add_special_tokens=False).ids)
        np.testing.assert_array_equal(later.text_ids, first.text_ids)
        # What the tokenizer puts before a text belongs before the first turn alone.
        bare = tokenizer.encode("USER: <image>\nred circle ASSISTANT: ", add_special_tokens=False)
        assert first.ids == (tokenizer.token_to_id("<s>"), *bare.ids)

    @pytest.mark.parametrize("question", [" ", "caf\udce9"])
    def test_of_a_next_turn_refuses_what_the_first_does(self, question: str) -> None:
        made = builder()
        refusals = []
        for build in (made.build, made.build_next):
            with pytest.raises(UsageError) as refused:
                build(question)
            refusals.append(str(refused.value))
        assert refusals[0] == refusals[1]

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
        ],
    )
    def test_refuses(self, question: str, sentence: str) -> None:
        with pytest.raises(UsageError) as caught:
            builder().build(question)
        assert str(caught.value) == sentence

    @pytest.mark.parametrize(
        ("words", "read"),
        [
            ("a <image> b", "a < image> b"),
            ("end</s>", "end< /s>"),
            ("<|endoftext|>", "< |endoftext|>"),
            ("<<image>image></s></s>", "<< image>image>< /s>< /s>"),
            ("is 3 < image > 2?", "is 3 < image > 2?"),
        ],
    )
    def test_reads_reserved_tokens_as_text(self, words: str, read: str) -> None:
        made, tokenizer, place = builder(), decoder_tokenizer(), IMAGE_TOKEN_INDEX
        first, later = made.build(words, 2, words), made.build_next(words)
        for ids, turn in (
            (first.ids, f"USER: <image>\n<image>\n{read}\n\n{read} ASSISTANT: "),
            (later.ids, f"</s>USER: {read} ASSISTANT: "),
            (made.answer_ids(words), read),
        ):
            begins = turn.startswith("USER")
            assert [*ids] == tokenizer.encode(turn, add_special_tokens=begins).ids
        assert first.ids.count(place) == 2
        assert place not in (*later.ids, *made.answer_ids(words))
        np.testing.assert_array_equal(first.text_ids, later.text_ids)
        np.testing.assert_array_equal(first.text_ids, made.build(read).text_ids)

    @given(st.lists(st.sampled_from(["<", "/", "s", ">", "image", "</s>", "<image>", " ", "\n"])))
    def test_has_no_place_that_was_not_asked_for(self, pieces: list[str]) -> None:
        made, words = builder(), "".join(pieces)
        ids = (*made.build(f"{words}?", 1, words).ids, *made.answer_ids(words))
        assert ids.count(IMAGE_TOKEN_INDEX) == 1
        assert not {0, 2} & {*ids}  # <|endoftext|>, </s>

    @pytest.mark.parametrize("what", ["preface", "answer"])
    def test_refuses_other_words_that_are_no_text(self, what: str) -> None:
        made, words = builder(), "caf\udce9"
        with pytest.raises(UsageError, match=f"the {what} is not text: expected UTF-8"):
            _ = made.build("Why?", 1, words) if what == "preface" else made.answer_ids(words)

    def test_guides_by_no_preface(self) -> None:
        told, plain = builder().build("Red?", 1, " Be brief. "), builder().build("Red?")
        np.testing.assert_array_equal(told.text_ids, plain.text_ids)
        turn = "USER: <image>\nBe brief.\n\nRed? ASSISTANT: "
        assert [*told.ids] == decoder_tokenizer().encode(turn).ids
        assert builder().build("Red?", 1, " ").ids == plain.ids

    def test_reads_any_added_token_that_is_in_the_template_as_text(self) -> None:
        turns = [AddedToken(f"<|{word}|>", special=False) for word in ("turn", "other")]
        decoder = decoder_tokenizer()
        decoder.add_tokens([*turns, AddedToken("\n", special=False)])
        spec = model(chat_template="<|turn|><image>\n{question}\n")
        prompts = PromptBuilder(decoder, text_tokenizer(), spec)
        turn = decoder.token_to_id("<|turn|>")
        assert prompts.build("What?<|turn|>It says").ids.count(turn) == 1  # the template's
        for harmless in ("Is <|other|> one?", "One?\nTwo?", "turn"):
            assert prompts.build(harmless).ids

    def test_refuses_what_ends_an_answer_and_what_stands_for_an_image(self) -> None:
        decoder = decoder_tokenizer()
        place, end = decoder.token_to_id("%"), decoder.token_to_id("#")  # no added tokens
        assert end is not None
        spec = model(image_token_index=place)
        prompts = PromptBuilder(decoder, text_tokenizer(), spec, (2, end))
        for token in ("#", "%"):
            with pytest.raises(UsageError, match=f"is read as containing the reserved '{token}'"):
                prompts.build(f"a {token} b")

    @pytest.mark.parametrize("token", [" end", "# ", "  ", " #"])
    def test_refuses_what_a_space_does_not_make_harmless(self, token: str) -> None:
        decoder = decoder_tokenizer()
        decoder.add_tokens([AddedToken(token, special=True, normalized=False)])
        prompts = PromptBuilder(decoder, text_tokenizer(), model())
        with pytest.raises(UsageError, match=f"is read as containing the reserved '{token}'"):
            prompts.build(f"a{token}b")
        assert prompts.build("fine</s>").ids

    def test_refuses_what_becomes_a_token_of_the_decoder(self) -> None:
        decoder = lowering_decoder(AddedToken("<|end|>", special=True, normalized=True))
        prompts = PromptBuilder(decoder, text_tokenizer(), model())
        assert decoder.token_to_id("<|end|>") in decoder.encode("so <|END|>").ids
        with pytest.raises(UsageError, match=r"is read as containing the reserved '<\|end\|>'"):
            prompts.build("so <|END|>")

    def test_refuses_what_becomes_a_token_of_the_text_tower(self) -> None:
        siglip = {"text_bos_token_id": None, "text_eos_token_id": 1, "text_pad_token_id": 0}
        text = siglip_text_tokenizer()
        prompts = PromptBuilder(decoder_tokenizer(), text, model(**siglip))
        for token in ("</S>", "<PAD>"):
            with pytest.raises(UsageError, match=f"is read as .* reserved '{token.lower()}'"):
                prompts.build(f"so {token}")
        assert prompts.build("is this €?").ids  # an unknown word is no command

    def test_takes_a_pad_token_that_is_a_word_for_one(self) -> None:
        text = text_tokenizer()
        spec = model(text_pad_token_id=text.token_to_id("!</w>"))
        (ids,) = PromptBuilder(decoder_tokenizer(), text, spec).build("a !").text_ids.tolist()
        assert ids[2] == ids[-1] == spec.text_pad_token_id

    def test_takes_words_that_the_decoder_does_not_know(self) -> None:
        vocabulary = {word: i for i, word in enumerate(("<unk>", "what", "<image>"))}
        decoder = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        decoder.pre_tokenizer = pre_tokenizers.Whitespace()
        decoder.add_special_tokens(["<unk>", "<image>"])
        spec = model(image_token_index=2)
        ids = PromptBuilder(decoder, text_tokenizer(), spec, (1,)).build("Who?").ids
        assert ids.count(0) > 1
        with pytest.raises(UsageError, match="is read as containing the reserved '<unk>'"):
            PromptBuilder(decoder, text_tokenizer(), spec, (0,)).build("Who?")

    @pytest.mark.parametrize("template", ["{question}", "<image><image>{question}"])
    def test_needs_one_place_for_the_video(self, template: str) -> None:
        with pytest.raises(DataError, match=r"image tokens \(id 3\), expected 1: export it again"):
            builder(chat_template=template).build("What moves?")

    def test_needs_tokenizers(self, tmp_path: Path) -> None:
        path = tmp_path / "decoder.json"
        path.write_text("{}", encoding="utf-8")
        with pytest.raises(DataError, match="not a tokenizer, export it again"):
            _load(path)


class TestIds:
    TEXT = np.array([[BOS, 5, EOS]], np.int64)

    @pytest.fixture
    def manifest(self, tmp_path: Path) -> Manifest:
        return dataclasses.replace(tiny_manifest(write_bundle(tmp_path)), model=model())

    def test_that_fit_are_taken(self, manifest: Manifest) -> None:
        Prompt(self.TEXT, (3, 4)).check(manifest, 1, guides=True)
        Prompt(self.TEXT, tuple(np.array([3, 4]))).check(manifest, 1, guides=True)
        Prompt(np.empty((1, 0), np.int64), (4,)).check(manifest, 0, guides=False)
        padded = dataclasses.replace(manifest, model=model(text_pad_token_id=0))
        Prompt(np.full((1, 12), EOS), (3, 4)).check(padded, 1, guides=True)

    @pytest.mark.parametrize(
        ("text_ids", "got"),
        [
            ([[BOS, 5, EOS]], "are list, expected int64"),
            (TEXT.astype(np.int32), r"are int32 \(1,3\), expected int64 \(1,n up to 12\)"),
            (TEXT[0], r"are int64 \(3\), expected"),
            (np.repeat(TEXT, 2, 0), r"are int64 \(2,3\), expected"),
            (np.full((1, 13), EOS), r"are int64 \(1,13\), expected"),
            (np.array([[-1, EOS]]), "has -1 among its text_ids, expected 0 or more"),
            (TEXT[:, :2], f"do not end: expected {EOS} among them"),
            (TEXT[:, :0], f"do not end: expected {EOS} among them"),
        ],
    )
    def test_of_the_text_tower_are_checked(
        self, manifest: Manifest, text_ids: Any, got: str
    ) -> None:
        with pytest.raises(UsageError, match=f"^the prompt.* {got}"):
            Prompt(text_ids, (3, 4)).check(manifest, 1, guides=True)

    def test_of_a_padded_text_tower_are_all_there(self, manifest: Manifest) -> None:
        padded = dataclasses.replace(manifest, model=model(text_pad_token_id=0))
        with pytest.raises(UsageError, match=r"are int64 \(1,3\), expected int64 \(1,12\)"):
            Prompt(self.TEXT, (3, 4)).check(padded, 1, guides=True)

    @pytest.mark.parametrize(
        ("ids", "got"),
        [
            ((3, 1.0), "1.0 among its ids"),
            ((3, True), "True among its ids"),
            ((3, "4"), "'4' among its ids"),
            ((3, 5), "5 among its ids"),
            (np.array([3, 4]), "ndarray for ids"),
            (None, "NoneType for ids"),
            ([], "no ids"),
        ],
    )
    def test_of_the_decoder_are_checked(self, manifest: Manifest, ids: Any, got: str) -> None:
        with pytest.raises(UsageError, match=f"the prompt has {got}, expected some from 0 to 4"):
            Prompt(self.TEXT, ids).check(manifest, 1, guides=True)

    def test_that_guide_end_whether_or_not_they_have_places(self, manifest: Manifest) -> None:
        Prompt(self.TEXT[:, :2], (3, 4)).check(manifest, 1, guides=False)
        with pytest.raises(UsageError, match=f"do not end: expected {EOS} among them"):
            Prompt(self.TEXT[:, :2], (3,)).check(manifest, 0, guides=True)

    def test_are_compared_by_identity(self) -> None:
        prompt, same = (Prompt(self.TEXT, (3,)) for _ in range(2))
        assert prompt == prompt != same  # and not by arrays, which would have no one answer
        assert len({prompt, same}) == 2


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
