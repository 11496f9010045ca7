"""Clips watched by the real assistant, with everything on the way to the answer written down.

The same clip forwards and backwards, and one with nothing in it: what makes no difference to the
model, or gets lost on the way to it, shows in the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import UnavailableError
from ppllava_runtime.assistant import Assistant
from ppllava_runtime.conversation import Video
from ppllava_runtime.decoders import Constraint, Decoder, FinishReason, Sampling
from ppllava_runtime.memory import Memory, thumbnails
from ppllava_runtime.prompt import Prompt
from ppllava_runtime.window import Window

MAX_NEW_TOKENS = 16
_HEIGHT, _WIDTH = 240, 320
_FPS = 8
_CODEC, _FORMAT = "ffv1", "bgr0"  # without loss, so that backwards the pictures are the same
# Each picture is shown so often that one of each is chosen when as many frames are wanted.
_SHOWN = 3


@dataclass(frozen=True)
class Seen:
    """A clip, as far as it came.

    Attributes:
        memory: What is kept of it.
        window: By which it was pooled.
        prompt_embeds: (n,D), the decoder's prompt.
        logits: (steps,V) float32, those of the first id first.
        ids: The answer.
        text: The same for people; empty in a bundle without tokenizers.
        frame_error: Mean difference from what was written into the file, in levels of 256.
    """

    memory: Memory
    window: Window
    prompt_embeds: NDArray[Any]
    logits: NDArray[np.float32]
    ids: tuple[int, ...]
    text: str
    frame_error: float

    @property
    def is_finite(self) -> bool:
        """Whether nothing on the way to the answer was NaN or infinite."""
        found = (*self.memory.arrays.values(), self.prompt_embeds, self.logits)
        return all(bool(np.isfinite(array).all()) for array in found)

    @property
    def spread(self) -> float:
        """How far the first id's logits are apart, as a share of the largest magnitude."""
        first = self.logits[0]
        return float(np.ptp(first) / max(np.abs(first).max(), np.finfo(np.float32).tiny))


def moving_frames(num_frames: int) -> NDArray[np.uint8]:
    """(T,240,320,3) uint8: a bright disc crosses a coloured ground from left to right."""
    y, x = np.mgrid[:_HEIGHT, :_WIDTH]
    ground = np.stack([60 + x // 4, 40 + y // 3, 120 - x // 8], axis=-1).astype(np.uint8)
    frames = np.repeat(ground[None], num_frames, axis=0)
    for place, frame in enumerate(frames):
        centre = _WIDTH * (place + 0.5) / num_frames
        disc = np.hypot(x - centre, y - _HEIGHT / 2) < _HEIGHT / 5
        frame[disc] = (240, 220, 40)
    return frames


def blank_frames(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames of the same number and size, all of them grey."""
    return np.full_like(frames, 128)


def num_frames_for(assistant: Assistant) -> int:
    """As few frames as show an order in time: two windows of them, where the model takes so many.

    A model with a fixed number of windows gets the number of frames it was trained with.
    """
    model = assistant.model
    two_windows = max(4, model.kernel[0] + model.stride[0])
    wanted = two_windows if model.pooling is None else model.default_frames
    return min(wanted, assistant.max_frames)


def write_clip(path: Path, frames: NDArray[np.uint8]) -> Path:
    """The video file `path` that shows `frames` (T,H,W,3) one after the other, three times each.

    Raises:
        UnavailableError: PyAV is missing, or it cannot write videos.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise UnavailableError("videos are written by a package: pip install av") from error
    try:
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(_CODEC, rate=_FPS)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = _FORMAT
            for number, picture in enumerate(np.repeat(frames, _SHOWN, axis=0)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, _FPS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (av.FFmpegError, ValueError) as error:  # the latter of a codec that is not there
        raise UnavailableError(
            f"this PyAV writes no {_CODEC} video: pip install av: {error}"
        ) from error
    return path


def watch(
    assistant: Assistant, path: Path, frames: NDArray[np.uint8], question: str | Prompt
) -> Seen:
    """What the assistant makes of a file that shows `frames`, of a question about it.

    Args:
        assistant: The one to try; its decoder is watched meanwhile.
        path: Where the clip goes.
        frames: (T,H,W,3) uint8, as many as are to be looked at.
        question: In words, or as ids.

    Raises:
        PPLLaVAError: See `Assistant.watch` and `Video.ask`.
    """
    video = assistant.watch(write_clip(path, frames), len(frames))
    shown = thumbnails(frames[np.array(video.info.indices) // _SHOWN])
    return _ask(assistant, video, shown, question)


def look(
    assistant: Assistant, path: Path, picture: NDArray[np.uint8], question: str | Prompt
) -> Seen:
    """What the assistant makes of a picture (H,W,3) uint8, written to the file `path`.

    Raises:
        PPLLaVAError: See `Assistant.watch` and `Video.ask`.
    """
    from PIL import Image

    Image.fromarray(picture).save(path)
    return _ask(assistant, assistant.watch(path), thumbnails([picture]), question)


def _ask(
    assistant: Assistant,
    video: Video,
    shown: Sequence[NDArray[np.uint8]],
    question: str | Prompt,
) -> Seen:
    decoder = assistant.decoder
    witness = _Witness(decoder)
    assistant.decoder = witness
    try:
        window = _fitting_window(assistant, video.memory, question)
        answer = video.ask(
            question, kernel=window.kernel, stride=window.stride, max_new_tokens=MAX_NEW_TOKENS
        )
        ids = answer.ids
    finally:
        assistant.decoder = decoder
    return Seen(
        memory=video.memory,
        window=window,
        prompt_embeds=witness.prompt_embeds,
        logits=np.stack(witness.logits),
        ids=ids,
        text=answer.text if assistant.bundle.manifest.tokenizers else "",
        frame_error=mean_error(np.stack(shown), np.stack(video.memory.thumbnails)),
    )


def difference(first: Seen, second: Seen) -> float:
    """How far the logits of two answers are apart, as a share of the largest magnitude.

    The largest over all steps that follow the same ids; 0 is not at all.
    """
    largest = 0.0
    for step, (a, b) in enumerate(zip(first.logits, second.logits, strict=False)):
        if first.ids[:step] != second.ids[:step]:
            break
        largest = max(largest, share(a, b))
    return largest


def share(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest difference of two arrays, as a share of the largest magnitude; inf for NaN."""
    if a.shape != b.shape:
        return math.inf
    wide = a.astype(np.float64), b.astype(np.float64)
    peak = max(float(np.abs(array).max(initial=0.0)) for array in wide)
    apart = float(np.abs(wide[0] - wide[1]).max(initial=0.0))
    if not math.isfinite(peak) or not math.isfinite(apart):
        return math.inf
    return apart / peak if peak else 0.0


def mean_error(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """The mean difference of two pictures, in levels of 256; inf when their sizes differ."""
    if first.shape != second.shape:
        return math.inf
    return float(np.abs(first.astype(np.int16) - second).mean())


def _fitting_window(assistant: Assistant, memory: Memory, question: str | Prompt) -> Window:
    """The model's own window, or the largest that leaves the decoder room for an answer."""
    window = memory.window(assistant.model)
    if isinstance(question, str):
        question = assistant.prompts.build(question)
    room = assistant.decoder.max_positions - len(question.ids) - MAX_NEW_TOKENS
    if window.num_tokens(memory.size) <= room:
        return window
    return memory.window(assistant.model, num_tokens=max(1, room))


@dataclass(frozen=True)
class _Noting(Sampling):
    """Takes the likeliest id, and keeps the logits it was picked from."""

    logits: list[NDArray[np.float32]] = field(default_factory=list)

    def pick(self, logits: NDArray[Any], random: np.random.Generator) -> int:
        self.logits.append(logits.astype(np.float32))
        return super().pick(logits, random)


class _Witness:
    """A Decoder that keeps the prompt it is given and the logits it answers with."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.prompt_embeds: NDArray[Any] = np.empty((0, 0))
        self.logits: list[NDArray[np.float32]] = []

    @property
    def max_positions(self) -> int:
        return self._decoder.max_positions

    def embed(self, ids: Sequence[int]) -> NDArray[Any]:
        return self._decoder.embed(ids)

    def generate(
        self,
        parts: Sequence[NDArray[Any]],
        max_new_tokens: int,
        sampling: Sampling,
        constraint: Constraint | None = None,
        owner: str = "",
    ) -> Generator[int, None, FinishReason]:
        noting = _Noting(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
        self.prompt_embeds, self.logits = np.concatenate(parts), noting.logits
        return self._decoder.generate(parts, max_new_tokens, noting, constraint, owner)
