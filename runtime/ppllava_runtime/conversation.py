"""Questions one after the other: what each is asked with, and what the next one finds done."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import InternalError, UsageError
from ppllava_runtime.answer import Answer, Counts, Stopwatch
from ppllava_runtime.asking import Asker, Options
from ppllava_runtime.decoders import Constraint, FinishReason
from ppllava_runtime.memories import Watched
from ppllava_runtime.memory import Memory
from ppllava_runtime.prompt import Prompt, checked
from ppllava_runtime.stopping import StopStrings
from ppllava_runtime.window import Window

if TYPE_CHECKING:
    from ppllava_runtime.assistant import Assistant

Turns = Literal["re-pool", "keep"]
TURNS: tuple[Turns, ...] = get_args(Turns)

# A text with more of them to each token that the decoder holds is not even read: no vocabulary
# makes so few tokens of what people write.
_CHARACTERS_PER_POSITION = 64


@dataclass(frozen=True)
class Cost:
    """What was done to see something: frames decoded and encoded, and the time it took."""

    num_decoded: int
    num_encoded: int
    stopwatch: Stopwatch


class Video(Asker):
    """A video, a picture or several that an assistant has looked at.

    Attributes:
        assistant: Who looked.
        memory: What is kept of it.
        info: About the file and the frames chosen from it.
        key: Under which `Assistant.recall` finds it again, while there is room for it; None where
            nothing is kept for that.
    """

    def __init__(
        self, assistant: Assistant, watched: Watched, cost: Cost, key: str | None = None
    ) -> None:
        self.assistant = assistant
        self.memory = watched.memory
        self.info = watched.info
        self.key = key
        self._unpaid = [cost]

    def answer(self, question: str | Prompt, options: Options) -> Answer:
        """The answer to a question by itself; see `ask`."""
        return self.converse().answer(question, options)

    def converse(
        self, turns: Turns = "re-pool", preface: str = "", owner: str = ""
    ) -> Conversation:
        """Questions one after the other, each asked behind those before it; see `Conversation`.

        Args:
            turns: "re-pool", where each question guides the pooling, or "keep", where the first
                one's visual tokens stay.
            preface: What the decoder reads before the first question, a blank line between them; no
                pooling is guided by it.
            owner: For whom; nothing that was run for others makes an answer come sooner.

        Raises:
            UsageError: Another word for `turns`; or a preface that is no text.
        """
        return Conversation(self, turns, preface, owner)

    def pay(self) -> Cost:
        """What watching cost, for the answer that asks first; nothing for the others."""
        try:
            return self._unpaid.pop()  # one of several threads gets it
        except IndexError:
            return Cost(0, 0, Stopwatch())


@dataclass(frozen=True)
class _View:
    """What a question made of what was seen.

    Attributes:
        guide: The question, in words; empty when it was asked in ids.
        window: By which was pooled.
        splices: What goes into each place of the prompt, (n,D).
        relevance: (T,h,w).
    """

    guide: str
    window: Window
    splices: list[NDArray[Any]]
    relevance: NDArray[np.float32]


@dataclass(frozen=True)
class _Turn:
    """A question that was asked."""

    question: str | Prompt
    ids: tuple[int, ...]
    answer: Answer | tuple[int, ...]

    @property
    def said(self) -> tuple[int, ...]:
        """The ids of the answer, as far as it came."""
        return self.answer.ids_so_far if isinstance(self.answer, Answer) else self.answer

    def close(self) -> None:
        """Ends the answer where it is."""
        if isinstance(self.answer, Answer):
            self.answer.close()


class Conversation(Asker):
    """Questions about what was seen, each asked behind the questions and answers before it.

    Two ways to go on are offered:

    - "re-pool": each question guides the pooling anew, so that the visual tokens are those that
      matter to it. The text before them is not run again; they and all turns behind them are.
    - "keep": the visual tokens and the relevance of the first question stay. Only what is new is
      run, the end of the last answer and the question, unless the decoder answered others in
      between; then all of it is, and ids of answers are rounded as part of a prompt.

    An answer that was not read to its end when the next question is asked ends where it is: the
    conversation goes on from what was read. Its ids stay as they were generated, and are not made
    of its text again.

    Args:
        video: What was seen.
        turns: "re-pool" or "keep".
        preface: See `Video.converse`.
        owner: See `Video.converse`.

    Raises:
        UsageError: Another word for `turns`; or a preface that is no text.
    """

    def __init__(
        self, video: Video, turns: Turns = "re-pool", preface: str = "", owner: str = ""
    ) -> None:
        if turns not in TURNS:
            raise UsageError(f"turns is {turns!r}, expected one of {', '.join(TURNS)}")
        self._video = video
        # Where nothing was seen there is nothing to pool anew.
        self._keeps = turns == "keep" or video.memory.record is None
        self._turns: list[_Turn] = []
        self._view: _View | None = None
        self._check_size(preface)
        self._preface = checked("preface", preface)
        self._owner = owner

    def recall(self, question: str, answer: str) -> None:
        """One more turn, that took place elsewhere: the next question goes on from it.

        Args:
            question: What was asked, in words.
            answer: What was answered, whose ids are made of this text.

        Raises:
            UsageError: See `ask`, of both.
            IncompatibleError: A bundle without tokenizers.
        """
        self._check_size(question + answer)
        said = self._video.assistant.prompts.answer_ids(answer)
        prompt = self._prompt(question, 0, first=not self._turns, guides=False)
        answers = self._said()
        self._check_fits(self._length(answers) + len(prompt.ids) + len(said))
        self._add(_Turn(question, prompt.ids, said), answers)

    def answer(
        self, question: str | Prompt, options: Options, constraint: Constraint | None = None
    ) -> Answer:
        """The answer to one more question; see `ask`.

        A question in ids that is not the first has no place for what was seen, and begins with the
        token that ends the answer before it. `constraint` is that of the options, where it was made
        before.

        Raises:
            UsageError: See `ask`; or another window than that of the first question, where its
                visual tokens are kept.
            IncompatibleError, UnavailableError: See `ask`.
        """
        video, assistant = self._video, self._video.assistant
        memory, stopwatch = video.memory, Stopwatch()
        decoder, stop = assistant.decoder, StopStrings(options.stop)
        if assistant.bundle.manifest.tokenizers:
            _ = assistant.prompts  # to load them takes time that is not the answer's
        elif options.stop:
            raise UsageError(
                "stop: the bundle was exported without tokenizers, so there is no text to end: "
                "leave it out, or export it again without --skip-tokenizer"
            )
        window = self._window(options)
        view = self._view if self._keeps else None
        with stopwatch.time("prefill"):
            num_places = memory.num_places(window)
            guides = view is None and memory.record is not None
            self._check_size(_words(question))
            prompt = self._prompt(question, num_places, first=not self._turns, guides=guides)
            # Before the work, and before any embedding of a text that may be megabytes.
            self._check_fits(self._length(self._said()) + len(prompt.ids))
            if constraint is None:
                constraint = assistant.constraint(options.json_schema, options.regex)
        if view is None:
            guide, read = question, prompt
            if self._keeps and self._turns:  # of turns that took place elsewhere
                guide = self._turns[0].question
                read = self._prompt(guide, num_places, first=True, guides=True)
            splices, relevance = pooled(assistant, memory, guide, read, window, stopwatch)
            view = _View(_words(guide), window, splices, relevance)
        with stopwatch.time("prefill"):
            answers = self._said()
            parts = self._parts(prompt, view, answers)
        length = sum(map(len, parts))
        if self._turns:
            self._check_fits(length)
        most = options.max_new_tokens
        ids = decoder.generate(parts, most, options.sampling, constraint, self._owner)
        answer = self._answer(question, stop, view, ids, length, stopwatch)
        self._view = view
        self._add(_Turn(question, prompt.ids, answer), answers)
        return answer

    def _check_size(self, text: str) -> None:
        """Passes a text that may fit, before it is made into ids."""
        most = self._video.assistant.bundle.manifest.decoder.max_positions
        if len(text) > _CHARACTERS_PER_POSITION * most:
            raise UsageError(
                f"the text is {len(text)} characters long, far more than the {most} tokens that "
                "the model holds: shorten it"
            )

    def _check_fits(self, length: int) -> None:
        """Passes a conversation of so many tokens that leaves room for an answer."""
        most = self._video.assistant.decoder.max_positions
        if length >= most:
            raise UsageError(
                f"the conversation is {length} tokens long and the model holds {most} with its "
                "answer: begin another one, shorten it, or pool the video to fewer tokens"
            )

    def _said(self) -> list[tuple[int, ...]]:
        """The ids of each answer, as far as it came."""
        return [turn.said for turn in self._turns]

    def _length(self, answers: Sequence[tuple[int, ...]]) -> int:
        """The tokens of all turns, visual ones left out."""
        return sum(len(turn.ids) for turn in self._turns) + sum(map(len, answers))

    def _add(self, turn: _Turn, answers: Sequence[tuple[int, ...]]) -> None:
        """One more turn, behind these ids of the answers before it.

        The last of them ends. To one that another thread reads some ids may have come since: the
        next prompt is without them, as this one was.
        """
        if self._turns:
            last = self._turns[-1]
            last.close()
            self._turns[-1] = replace(last, answer=answers[-1])
        self._turns.append(turn)

    def _window(self, options: Options) -> Window:
        """The window of this question; where visual tokens are kept, it is theirs."""
        memory = self._video.memory
        if memory.record is None and options.has_window:
            raise UsageError(
                "num_tokens, kernel, stride: of no meaning where nothing was seen, leave them out"
            )
        if self._keeps and self._view is not None and not options.has_window:
            return self._view.window
        window = memory.window(
            self._video.assistant.model, options.kernel, options.stride, options.num_tokens
        )
        if self._keeps and self._view is not None and window != self._view.window:
            raise UsageError(
                "the visual tokens of the first question are kept, so another window has no "
                "meaning: leave it out, or converse with turns 're-pool'"
            )
        return window

    def _prompt(
        self, question: str | Prompt, num_places: int, *, first: bool, guides: bool
    ) -> Prompt:
        """The question's ids; the first has so many places for visual tokens."""
        assistant = self._video.assistant
        if isinstance(question, str):
            builder = assistant.prompts
            if first:
                return builder.build(question, num_places, self._preface)
            return builder.build_next(question)
        if first and self._preface:
            raise UsageError(
                "preface: of no meaning before a question in ids: put it among them, or ask in "
                "words"
            )
        places = num_places if first else 0
        question.check(assistant.bundle.manifest, places, guides=guides)
        return question

    def _parts(
        self, prompt: Prompt, view: _View, answers: Sequence[tuple[int, ...]]
    ) -> list[NDArray[Any]]:
        """The embeddings of the whole prompt, in the pieces of which later turns share some."""
        assistant = self._video.assistant
        decoder, place = assistant.decoder, assistant.model.image_token_index
        opening = prompt
        later: list[tuple[int, ...]] = []
        if self._turns:
            # Another window may take another number of places.
            num_places = self._video.memory.num_places(view.window)
            first = self._turns[0].question
            opening = self._prompt(first, num_places, first=True, guides=False)
            ends = [*(turn.ids for turn in self._turns[1:]), prompt.ids]
            later = [(*said, *ids) for said, ids in zip(answers, ends, strict=True)]
        before, *others = opening.parts(place)
        seen = []
        for splice, after in zip(view.splices, others, strict=True):
            words = decoder.embed(after)
            seen += [splice.astype(words.dtype, copy=False), words]
        turns = [decoder.embed(ids) for ids in later]
        groups = [[decoder.embed(before)], seen, *([turn] for turn in turns)]
        if not self._keeps:
            groups = [groups[0], [*seen, *turns]]
        return [np.concatenate(group) for group in groups if any(map(len, group))]

    def _answer(
        self,
        question: str | Prompt,
        stop: StopStrings,
        view: _View,
        ids: Generator[int, None, FinishReason],
        length: int,
        stopwatch: Stopwatch,
    ) -> Answer:
        video, assistant = self._video, self._video.assistant
        cost = video.pay()
        stopwatch.spent |= cost.stopwatch.spent
        counts = Counts(
            num_frames_decoded=cost.num_decoded,
            num_frames_encoded=cost.num_encoded,
            num_tokens_after=sum(map(len, view.splices)),
            num_prompt_tokens=length,
        )
        has_text = bool(assistant.bundle.manifest.tokenizers)
        return Answer(
            _words(question),
            view.guide,
            view.relevance,
            video.memory,
            ids,
            assistant.prompts.stream() if has_text else None,
            counts,
            stopwatch,
            stop,
        )


def _words(question: str | Prompt) -> str:
    return question if isinstance(question, str) else ""


def pooled(
    assistant: Assistant,
    memory: Memory,
    question: str | Prompt,
    prompt: Prompt,
    window: Window,
    stopwatch: Stopwatch,
) -> tuple[list[NDArray[Any]], NDArray[np.float32]]:
    """What goes into each place of the prompt, (n,D); and the relevance (T,h,w)."""
    if memory.record is None:
        return [], np.empty(memory.size, np.float32)
    text, pool, weigh = assistant.text, assistant.pool, assistant.weigh
    with stopwatch.time("text"):
        try:
            text_embed = text.run({"input_ids": prompt.text_ids})["text_embed"]
        except InternalError as error:
            if isinstance(question, str):
                raise
            # The graph alone knows how many ids there are.
            raise UsageError(
                f"the prompt's text_ids go up to {prompt.text_ids.max()} and the text graph does "
                f"not take them, expected its tokenizer's: {error}"
            ) from error
    with stopwatch.time("pool"):
        found, relevance = memory.record.pool(text_embed, window, pool, weigh)
        splices = memory.splices(found, window, assistant.newline)
    return splices, relevance
