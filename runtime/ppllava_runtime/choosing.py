"""Which frames of a video are looked at: the rule of the published model, or so many a second."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ppllava_engines.errors import UsageError
from ppllava_runtime.decoding import LAST_RESORT_FPS


@dataclass(frozen=True)
class Sample:
    """Which frames of a video to look at; without a number of them it is as many as it can be.

    Attributes:
        num_frames: How many, T; with `fps` it is the most.
        fps: So many per second of the span, at least 1 and at most those that it has.
        start: Where the span begins, in seconds since the first frame; None is the first frame.
        end: Where it ends; None is the last frame.
        most: More are never chosen; None is no bound.

    Raises:
        UsageError: A rate that is none.
    """

    num_frames: int | None = None
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UsageError(f"fps is {self.fps}, expected more than 0")

    def indices(self, num_frames: int, fps: float, num_rows: int | None = None) -> tuple[int, ...]:
        """Those it chooses of a video, see `choose_frames`.

        Args:
            num_frames: How many there are.
            fps: Frames per second of the video.
            num_rows: So many it shall be, where that was said before the video was known as well as
                now; None is as many as it says itself.

        Raises:
            UsageError: See `choose_frames`.
        """
        found = self._indices(num_frames, fps)
        if num_rows is None or num_rows == len(found):
            return found
        first, last = _span(num_frames, fps, self.start, self.end)
        missing = num_rows - (last - first + 1)
        if missing >= 0:
            return (*range(first, last + 1), *(last for _ in range(missing)))
        return choose_frames(num_frames, num_rows, fps, self.start, self.end)

    def _indices(self, num_frames: int, fps: float) -> tuple[int, ...]:
        bounds = [count for count in (self.num_frames, self.most) if count is not None]
        if self.fps is None and self.num_frames is not None:
            return choose_frames(num_frames, min(bounds), fps, self.start, self.end)
        first, last = _span(num_frames, fps, self.start, self.end)
        there = last - first + 1
        wanted = there if self.fps is None else min(there, there / fps * self.fps)
        count = min(max(1, round(wanted)), *bounds, there)
        if count == there:  # of which the rule would leave out the last
            return tuple(range(first, last + 1))
        return choose_frames(num_frames, count, fps, self.start, self.end)


def choose_frames(
    num_frames: int,
    num_chosen: int,
    fps: float = LAST_RESORT_FPS,
    start: float | None = None,
    end: float | None = None,
) -> tuple[int, ...]:
    """Indices of `num_chosen` frames of a video of `num_frames`, from the middle of equal segments.

    This is the rule of the published model, its rounding included: Python's, half to even.

    Args:
        num_frames: How many there are, M ≥ 1.
        num_chosen: How many to choose, N; indices repeat when N > M.
        fps: Frames per second, by which seconds become indices.
        start: Where the span begins, in seconds; None is the first frame.
        end: Where it ends; None is the last frame.

    Raises:
        UsageError: Less than one frame, or a span that is empty or outside the video.
    """
    if num_chosen < 1:
        raise UsageError(f"frames is {num_chosen}, expected 1 or more")
    first, last = _span(num_frames, fps, start, end)
    segment = (last - first) / num_chosen
    return tuple(first + int(segment / 2 + round(segment * i)) for i in range(num_chosen))


def _span(num_frames: int, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
    """The first and the last frame of a span; see `choose_frames`."""
    last_second = (num_frames - 1) / fps
    first, last = 0, num_frames - 1
    if start is not None:
        if not 0 <= start < math.inf:
            raise UsageError(f"the span starts at {start} s, expected 0 or more")
        first = round(start * fps)
    if end is not None:
        if not (start or 0) <= end < math.inf:
            raise UsageError(f"the span ends at {end} s, expected its start {start or 0} s or more")
        last = min(round(end * fps), last)
    if first > last:
        raise UsageError(
            f"the span starts at {start} s, but the last frame of the video is at "
            f"{last_second:.2f} s"
        )
    return first, last
