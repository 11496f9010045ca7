"""Strings ↔ token ids: the question for the text tower, the prompt for the decoder, the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle, Manifest, ModelSpec
from ppllava_engines.errors import DataError, IncompatibleError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PLACE = "<image>\n"  # in a template
_WORDS_REMEMBERED = 1000
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders show for bytes that are no character yet


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question as ids.

    Attributes:
        text_ids: (1,n) int64 for the text tower, from its first to its end token and padded where
            the tower wants it.
        ids: The decoder's; each of the model's `image_token_index` is a place for visual tokens.
    """

    text_ids: NDArray[np.int64]
    ids: tuple[int, ...]

    def check(self, manifest: Manifest, num_places: int, *, guides: bool) -> None:
        """Nothing, when the ids fit the model and leave so many places for visual tokens.

        Args:
            manifest: What the model takes.
            num_places: None in a question that is not the first.
            guides: Whether the text tower reads it.

        Raises:
            UsageError: They do not.
        """
        self._check_text_ids(manifest.model, guides)
        place, vocab_size = manifest.model.image_token_index, manifest.decoder.vocab_size
        if not isinstance(self.ids, Sequence) or not self.ids:
            got = "no" if isinstance(self.ids, Sequence) else f"{type(self.ids).__name__} for"
            raise UsageError(f"the prompt has {got} ids, expected some from 0 to {vocab_size - 1}")
        for id_ in self.ids:
            is_int = isinstance(id_, int | np.integer) and not isinstance(id_, bool)
            if not is_int or (id_ != place and not 0 <= id_ < vocab_size):
                raise UsageError(
                    f"the prompt has {id_!r} among its ids, expected some from 0 to "
                    f"{vocab_size - 1}"
                )
        if self.ids.count(place) != num_places:
            raise UsageError(
                f"the prompt has {self.ids.count(place)} places for visual tokens (id {place}), "
                f"expected {num_places}"
            )

    def _check_text_ids(self, model: ModelSpec, guides: bool) -> None:
        ids: object = self.text_ids
        most, padded = model.text_positions, model.text_pad_token_id is not None
        expected = f"int64 (1,{'' if padded else 'n up to '}{most})"
        if not isinstance(ids, np.ndarray):
            raise UsageError(f"the prompt's text_ids are {type(ids).__name__}, expected {expected}")
        fitting = ids.shape == (1, most) or (
            ids.ndim == 2 and len(ids) == 1 and not padded and ids.size <= most
        )
        if ids.dtype != np.int64 or not fitting:
            shape = ",".join(map(str, ids.shape))
            raise UsageError(
                f"the prompt's text_ids are {ids.dtype} ({shape}), expected {expected}"
            )
        if ids.size and ids.min() < 0:
            raise UsageError(f"the prompt has {ids.min()} among its text_ids, expected 0 or more")
        end = model.text_eos_token_id
        if guides and end not in ids:
            raise UsageError(f"the prompt's text_ids do not end: expected {end} among them")

    def parts(self, image_token_index: int) -> list[tuple[int, ...]]:
        """The decoder's ids before, between and after its places."""
        places = [i for i, id_ in enumerate(self.ids) if id_ == image_token_index]
        starts, ends = [0, *(place + 1 for place in places)], [*places, len(self.ids)]
        return [self.ids[start:end] for start, end in zip(starts, ends, strict=True)]


class PromptBuilder:
    """Makes prompts of questions, and text of the ids that come back.

    Args:
        decoder: The decoder's tokenizer.
        text: The text tower's tokenizer.
        model: Template, special ids and the number of positions.
        eos_token_ids: What ends an answer of the decoder.
    """

    def __init__(
        self,
        decoder: Tokenizer,
        text: Tokenizer,
        model: ModelSpec,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        for tokenizer in (decoder, text):  # a tokenizer file may carry settings for training
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._decoder = decoder
        self._text = text
        self._model = model
        self._decoder_reserved = _reserved_by_decoder(decoder, model, eos_token_ids)
        self._text_reserved = _reserved_by_text(text, model)
        self._reserved = sorted(
            {*self._decoder_reserved.values(), *self._text_reserved.values()} - {""}
        )
        # What stands for the unknown is harmless as an id, unless it ends an answer as well.
        unknown = decoder.token_to_id(getattr(decoder.model, "unk_token", None) or "")
        if unknown is not None and unknown not in (model.image_token_index, *eos_token_ids):
            self._decoder_reserved.pop(unknown, None)

    @staticmethod
    def open(bundle: Bundle) -> PromptBuilder:
        """The builder for a bundle's model.

        Raises:
            DataError: A tokenizer file that cannot be read.
            IncompatibleError: A bundle that was exported without tokenizers.
        """
        files, names = bundle.manifest.tokenizers, ("decoder", "text")
        if not files.keys() >= set(names):
            raise IncompatibleError(
                f"bundle {bundle.path}: it was exported without tokenizers, so it takes no "
                "questions in text: export it again without --skip-tokenizer"
            )
        decoder, text = (_load(bundle.file(files[name])) for name in names)
        return PromptBuilder(
            decoder, text, bundle.manifest.model, bundle.manifest.decoder.eos_token_ids
        )

    def build(self, question: str, num_places: int = 1, preface: str = "") -> Prompt:
        """The ids of one question; a question too long for the text tower guides by its beginning.

        A token reserved for the template has a space in it from then on: it is no command.

        Args:
            question: In one's own words.
            num_places: Places for visual tokens before it: one for a video, none without.
            preface: What the decoder reads before the question.

        Raises:
            UsageError: A question that is empty, or it or the preface is not text or becomes a
                reserved token.
            DataError: A template that does not give so many places.
        """
        question = self._harmless_question(question)
        model = self._model
        words = question
        if preface := _escaped(checked("preface", preface), self._reserved):
            words = f"{preface}\n\n{question}"
        ids = self._turn(model.chat_template.replace(_PLACE, _PLACE * num_places), words)
        if ids.count(model.image_token_index) != num_places:
            raise DataError(
                f"model {model.name}: its chat template gives {ids.count(model.image_token_index)} "
                f"image tokens (id {model.image_token_index}), expected {num_places}: export it "
                "again"
            )
        return Prompt(self._text_ids(question), ids)

    def build_next(self, question: str) -> Prompt:
        """The ids of one more question: what follows the ids of the answer before it.

        Raises:
            UsageError: See `build`.
        """
        question = self._harmless_question(question)
        ids = self._turn(self._model.next_turn_template, question, begins=False)
        return Prompt(self._text_ids(question), ids)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The decoder's ids of an answer that was given elsewhere; reserved tokens as in `build`.

        Raises:
            UsageError: An answer that is not text or becomes a reserved token.
        """
        words = _escaped(checked("answer", answer), self._reserved)
        ids = self._decoder.encode(words, add_special_tokens=False).ids
        _refuse(ids, (), self._decoder_reserved)
        return tuple(ids)

    def _harmless_question(self, question: str) -> str:
        if not (question := checked("question", question)):
            raise UsageError("the question is empty")
        return _escaped(question, self._reserved)

    def _turn(self, template: str, question: str, *, begins: bool = True) -> tuple[int, ...]:
        """A template's ids with the question in it; the tokenizer's own if the text `begins`."""
        ids, bare = (
            self._decoder.encode(
                template.replace("{question}", words), add_special_tokens=begins
            ).ids
            for words in (question, "")
        )
        _refuse(ids, bare, self._decoder_reserved)
        return tuple(ids)

    def _text_ids(self, question: str) -> NDArray[np.int64]:
        model = self._model
        begin = [] if model.text_bos_token_id is None else [model.text_bos_token_id]
        words = self._text.encode(question, add_special_tokens=False).ids
        _refuse(words, (), self._text_reserved)
        ids = [*(begin + words)[: model.text_positions - 1], model.text_eos_token_id]
        if model.text_pad_token_id is not None:
            ids += [model.text_pad_token_id] * (model.text_positions - len(ids))
        return np.array([ids], np.int64)

    @property
    def decoder_json(self) -> str:
        """The decoder's tokenizer, as the JSON of its file."""
        return self._decoder.to_str()

    def stream(self) -> TextStream:
        """A new stream for one answer."""
        return TextStream(self._decoder)


class TextStream:
    """Turns ids into text as they come, without ever showing half a character.

    All pieces together are the text of all ids, without special tokens, and without white space or
    an unfinished character at its ends.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Spacing depends on the neighbour to the left, so ids are decoded together with those of
        # the piece before: ids[start:done] are of that piece.
        self._start = 0
        self._done = 0
        self._space = ""
        self._begun = False

    def push(self, token: int) -> str:
        """The text that is certain now; often one word, sometimes nothing."""
        self._ids.append(token)
        fresh = self._fresh()
        return "" if fresh.endswith(_INCOMPLETE) else self._show(fresh)

    def finish(self) -> str:
        """The rest, when no more ids come."""
        return self._show(self._fresh().rstrip(_INCOMPLETE))

    def _fresh(self) -> str:
        """The text that has not been shown yet."""
        text, shown = self._decode(self._start), self._decode(self._start, self._done)
        # Bytes that are no UTF-8 can spoil the text of those before them, which cannot be taken
        # back: then what is new is decoded alone.
        return text[len(shown) :] if text.startswith(shown) else self._decode(self._done)

    def _decode(self, start: int, end: int | None = None) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text

    def _show(self, fresh: str) -> str:
        if fresh:
            self._start, self._done = self._done, len(self._ids)
        # White space waits for what follows it, as an answer may not begin or end with it.
        text = self._space + fresh if self._begun else fresh.lstrip()
        piece = text.rstrip()
        self._space = text[len(piece) :]
        self._begun |= bool(piece)
        return piece


def checked(what: str, words: str) -> str:
    """The words without white space around them, when they are text.

    Raises:
        UsageError: They are not.
    """
    words = words.strip()
    try:
        words.encode()
    except UnicodeEncodeError as error:  # what Python makes of bytes that a shell passed on
        raise UsageError(f"the {what} is not text: expected UTF-8") from error
    return words


def _escaped(words: str, reserved: Sequence[str]) -> str:
    """The words with a space after the first character of whatever is reserved.

    Read as text it would be harmless, but tokenizers read it as a command: one more place for an
    image, or the end of the turn. Of a single character nothing is changed, nor where a space
    changes nothing, nor of what a normalizer makes of a text: such ids are refused.
    """
    escapes = {token: f"{token[0]} {token[1:]}" for token in reserved if len(token) > 1}
    # One that begins with a space, or has nothing but spaces behind it, would be found for ever.
    escapes = {token: escape for token, escape in escapes.items() if token not in escape}
    while found := next((token for token in escapes if token in words), None):
        words = words.replace(found, escapes[found])
    return words


def _reserved_by_decoder(
    tokenizer: Tokenizer, model: ModelSpec, eos_token_ids: Iterable[int]
) -> dict[int, str]:
    """The ids that no question may have, with their tokens: the special and the template's."""
    reserved = {id_: tokenizer.id_to_token(id_) or "" for id_ in eos_token_ids}
    place = model.image_token_index
    reserved[place] = tokenizer.id_to_token(place) or ""
    for id_, token in tokenizer.get_added_tokens_decoder().items():
        # White space may be an added token as well, and is in every question.
        if token.special or (token.content.strip() and token.content in model.chat_template):
            reserved[id_] = token.content
    return reserved


def _reserved_by_text(tokenizer: Tokenizer, model: ModelSpec) -> dict[int, str]:
    """The same for the text tower: what begins, ends and, unless it is a word, pads."""
    ids: set[int | None] = {model.text_bos_token_id, model.text_eos_token_id}
    added = tokenizer.get_added_tokens_decoder()
    if (pad := model.text_pad_token_id) in added:
        ids.add(pad)
    return {id_: tokenizer.id_to_token(id_) or "" for id_ in ids if id_ is not None}


def _refuse(ids: Iterable[int], expected: Iterable[int], reserved: dict[int, str]) -> None:
    """Nothing, when `ids` has no more of the reserved ids than `expected` has.

    Normalizers can turn a text that does not contain a token into one that does.
    """
    for id_ in Counter(ids) - Counter(expected):
        if id_ in reserved:
            raise UsageError(
                f"the text is read as containing the reserved {reserved[id_] or id_!r}: leave that "
                "out"
            )


def _load(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokenizer, export it again: {error}") from error
    # What it remembers of each thread's words is some 15 MB at its usual 10,000, which strangers
    # can fill; of what people ask about, this many come again.
    if hasattr(tokenizer.model, "_resize_cache"):
        tokenizer.model._resize_cache(_WORDS_REMEMBERED)
    return tokenizer
