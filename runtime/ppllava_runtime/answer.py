"""An answer as it comes: pieces of text, the relevance map behind it, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import IncompatibleError, UsageError
from ppllava_runtime.decoders import FinishReason
from ppllava_runtime.memory import Memory
from ppllava_runtime.prompt import TextStream
from ppllava_runtime.stopping import StopStrings

Stage = Literal["decode", "preprocess", "vision", "text", "pool", "prefill", "generate"]


@dataclass(frozen=True)
class Milliseconds:
    """Time spent per stage, which may wait for others on its device.

    Loading graphs is not in it, nor is the time the caller takes.

    Attributes:
        decode, preprocess, vision: Reading the file to encoding the frames; 0 from the second
            question about a video on.
        text, pool: The question through the text tower, and the pooling that it guides.
        prefill: Making the prompt and what its answer keeps to, and running it to the first id.
        generate: All ids after the first.
    """

    decode: float = 0.0
    preprocess: float = 0.0
    vision: float = 0.0
    text: float = 0.0
    pool: float = 0.0
    prefill: float = 0.0
    generate: float = 0.0

    @property
    def first_token(self) -> float:
        """All that had to happen before the first id was there."""
        return self.total - self.generate

    @property
    def total(self) -> float:
        """All stages together."""
        return sum(float(spent) for spent in vars(self).values())


@dataclass(frozen=True)
class Accounting:
    """What one answer cost.

    Attributes:
        num_frames_sampled: Frames or pictures that the answer looks at.
        num_frames_decoded: Frames decoded for it; 0 from the second question on.
        num_frames_encoded: Frames, or views of a picture, run through the vision tower for it, T; 0
            likewise.
        num_tokens_before, num_tokens_after: Visual tokens before pooling, T·h·w, and in the prompt.
        num_prompt_tokens: Length of the decoder's prompt, the pooled tokens included.
        num_new_tokens: Ids generated so far.
        milliseconds: Time per stage so far.
    """

    num_frames_sampled: int
    num_frames_decoded: int
    num_frames_encoded: int
    num_tokens_before: int
    num_tokens_after: int
    num_prompt_tokens: int
    num_new_tokens: int
    milliseconds: Milliseconds


class Stopwatch:
    """Adds up the time spent per stage."""

    def __init__(self) -> None:
        self.spent: dict[Stage, float] = {}

    @contextmanager
    def time(self, stage: Stage) -> Iterator[None]:
        """Counts the block towards `stage`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = 1000 * (time.perf_counter() - began)
            self.spent[stage] = self.spent.get(stage, 0.0) + elapsed

    def read(self) -> Milliseconds:
        """What has been counted so far."""
        return Milliseconds(**self.spent)


@dataclass(frozen=True)
class Counts:
    """The part of the accounting that is known before the first id."""

    num_frames_decoded: int
    num_frames_encoded: int
    num_tokens_after: int
    num_prompt_tokens: int


class Answer:
    """Iterating gives pieces of text, each computed when it is asked for.

    It may be left half-way, resumed, or iterated again from the start, by several threads too. One
    that failed fails again wherever more of it is read, until it is closed.

    Attributes:
        question: What was asked; empty when it was asked in ids.
        guide: The question that guided the pooling: this one or, where a conversation keeps its
            visual tokens, the first; empty likewise.
        kind: What was looked at; None is nothing.
        relevance: (T,h,w) float32 in [-1,1], how much each patch has to do with `guide`.

    Args:
        question, guide, relevance: See above.
        memory: Of what was looked at.
        ids: Of the decoder, as they come.
        stream: Makes text of them; None where there is no tokenizer.
        counts: What is known of the cost.
        stopwatch: Goes on counting.
        stop: Ends the text; used up by this answer.
    """

    def __init__(
        self,
        question: str,
        guide: str,
        relevance: NDArray[np.float32],
        memory: Memory,
        ids: Generator[int, None, FinishReason],
        stream: TextStream | None,
        counts: Counts,
        stopwatch: Stopwatch,
        stop: StopStrings,
    ) -> None:
        self.question = question
        self.guide = guide
        self.kind = memory.kind
        self.relevance = relevance
        self._memory = memory
        self._coming = ids
        self._stream = stream
        self._stop = stop
        self._counts = counts
        self._stopwatch = stopwatch
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._failure: Exception | None = None
        self._reading = Lock()
        self._left = False

    def __iter__(self) -> Iterator[str]:
        if self._stream is None:
            raise IncompatibleError(
                "answer: the bundle was exported without tokenizers, so there are ids and no text: "
                "export it again without --skip-tokenizer"
            )
        position = 0
        while position < len(self._pieces) or self._advance():
            if position < len(self._pieces):
                yield self._pieces[position]
                position += 1

    @property
    def text(self) -> str:
        """The whole answer; generates what has not been asked for yet.

        It ends before a stop string.

        Raises:
            IncompatibleError: A bundle that was exported without tokenizers; so does iterating.
        """
        return "".join(self)

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the whole answer; generates what has not been asked for yet.

        Those of a stop string are among them, and may be of a few letters after it.
        """
        while self._advance():
            pass
        return tuple(self._ids)

    @property
    def ids_so_far(self) -> tuple[int, ...]:
        """Those of the ids that were generated already."""
        return tuple(self._ids)

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended: "stop", by itself, before a stop string or by `close`; or "length".

        That is for lack of room (`max_new_tokens`, or positions). Generates what has not been asked
        for yet.
        """
        while self._advance():
            pass
        return self._finish_reason or "stop"

    @property
    def was_cut(self) -> bool:
        """Whether it ended for lack of room and not by itself; see `finish_reason`."""
        return self.finish_reason == "length"

    @property
    def accounting(self) -> Accounting:
        """What it cost so far; all of it once the text is complete."""
        t, h, w = self._memory.size
        return Accounting(
            num_frames_sampled=len(self._memory.thumbnails),
            num_frames_decoded=self._counts.num_frames_decoded,
            num_frames_encoded=self._counts.num_frames_encoded,
            num_tokens_before=t * h * w,
            num_tokens_after=self._counts.num_tokens_after,
            num_prompt_tokens=self._counts.num_prompt_tokens,
            num_new_tokens=len(self._ids),
            milliseconds=self._stopwatch.read(),
        )

    @property
    def timestamps(self) -> NDArray[np.float64]:
        """(T,), seconds of the frames since the first one of the file; 0 of pictures."""
        return self._memory.timestamps

    @property
    def thumbnails(self) -> tuple[NDArray[np.uint8], ...]:
        """The frames or pictures (H,W,3) uint8 RGB that were looked at, small."""
        return self._memory.thumbnails

    def curve(self) -> list[float]:
        """The mean relevance of each thumbnail, in [-1,1]."""
        return [float(found.mean()) for found in self._memory.maps(self.relevance)]

    def overlays(self) -> list[bytes]:
        """The relevance over each thumbnail, a PNG to be stretched over it; see `each_overlay`."""
        from ppllava_runtime.heatmap import each_overlay

        return each_overlay(self._memory.maps(self.relevance))

    def save_heatmap(self, path: str | Path) -> None:
        """Writes the relevance over what was seen, with `guide`; see `heatmap.write_heatmap`.

        Raises:
            UsageError: Nothing was seen, or another suffix.
            StorageError: The file cannot be written.
        """
        from ppllava_runtime.heatmap import write_heatmap

        memory = self._memory
        if memory.kind is None:
            raise UsageError(f"heatmap {path}: there is no picture to draw it on")
        maps = memory.maps(self.relevance)
        write_heatmap(path, memory.thumbnails, memory.captions, maps, self.guide)

    def close(self) -> None:
        """Ends the answer where it is and frees what generating holds.

        While another thread reads it, that is after the id being computed; it is not waited for.
        """
        self._left = True
        if self._reading.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._reading.release()

    def _advance(self) -> bool:
        """Whether one more id was generated, or the last piece of text found."""
        try:
            with self._reading:
                if self._left:
                    self._end()
                if self._failure is not None:
                    raise self._failure
                if self._finish_reason is not None:
                    return False
                try:
                    self._generate()
                except Exception as error:
                    # What generates is at its end now, and would pass for an answer at its own.
                    self._failure = error
                    raise
                return True
        finally:
            # Here, as who closed it while this thread had the lock left that to it.
            if self._left:
                self.close()

    def _end(self) -> None:
        self._coming.close()
        self._failure = None

    def _generate(self) -> None:
        """One more id, or the last piece of text."""
        token = None
        with self._stopwatch.time("generate" if self._ids else "prefill"):
            try:
                token = next(self._coming)
            except StopIteration as end:
                self._finish_reason = end.value or "stop"
        if token is not None:
            self._ids.append(token)
        if self._stream is not None:
            text = self._stream.finish() if token is None else self._stream.push(token)
            piece = self._stop.push(text)
            if token is None:
                piece += self._stop.finish()
            if piece:
                self._pieces.append(piece)
            if self._stop.found:
                self._coming.close()
                self._finish_reason = "stop"
