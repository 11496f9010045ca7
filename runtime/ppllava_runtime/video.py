"""A video file → the frames that the model looks at, upright and with their times.

A file is read twice. The first reading looks at packets and decodes nothing; it gives the time of
every picture, from which the frames are chosen. The second seeks to the keyframe before each chosen
frame and decodes from there. Whatever comes out must be what the packets announced: a file that
breaks its word (damaged, cut off, without times) is decoded from end to end instead, which is
slower and does not depend on anything the container says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import (
    DataError,
    InternalError,
    NotFoundError,
    UsageError,
)
from ppllava_runtime.decoding import (
    LAST_RESORT_FPS,
    BrokenPromise,
    Decoded,
    expected_frames,
    frame_rate,
    from_keyframes,
    opened,
    read_index,
    upright,
)
from ppllava_runtime.pictures import read_picture

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class ClipInfo:
    """What is known of a file and of the frames chosen from it; or of several pictures' files.

    Attributes:
        timestamps: (T,) float64, seconds since the first frame of the file.
        indices: Place of each among all frames of the file, counted from 0.
        num_frames: How many frames the file has, M.
        num_decoded: How many were decoded to get these.
        fps: Frames per second of the file; 0 for pictures.
        damage: A sentence about frames that are there or announced but not looked at, or None.
    """

    timestamps: NDArray[np.float64]
    indices: tuple[int, ...]
    num_frames: int
    num_decoded: int
    fps: float
    damage: str | None = None

    @property
    def is_still(self) -> bool:
        """Whether this is a picture, or several, and not a video."""
        return self.fps == 0

    @staticmethod
    def of_stills(count: int, damage: str | None = None) -> ClipInfo:
        """What there is to know of `count` pictures."""
        return ClipInfo(np.zeros(count), tuple(range(count)), count, count, 0, damage)


@dataclass(frozen=True)
class Clip:
    """Frames (T,H,W,3) uint8 RGB, upright, and what is known of them."""

    frames: NDArray[np.uint8]
    info: ClipInfo


def read_clip(
    path: str | Path, num_frames: int, start: float | None = None, end: float | None = None
) -> Clip:
    """`num_frames` frames spread over a video file, or the one frame of an image file.

    The frames are those that decoding the whole file in order of presentation would give. Damage in
    a part that is not needed goes unseen; damage that is met costs the frames it destroys, counts
    and times are taken from what can be decoded, and `ClipInfo.damage` says so.

    Args:
        path: A file of any container and codec that FFmpeg knows, or a picture.
        num_frames: How many to choose, T; more than the file has repeats some.
        start: Seconds since the first frame; None is the first frame.
        end: The same; None is the last frame.

    Raises:
        DataError: Not a video, without a video stream, or nothing in it can be decoded.
        NotFoundError: There is no such file.
        StorageError: The file cannot be read.
        UnavailableError: PyAV is missing, or it has no decoder for this codec.
        UsageError: Less than one frame, or a span that is empty or outside the file.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"video {path}: no such file")
    if not path.is_file():
        raise DataError(f"video {path}: not a file")
    if (found := read_picture(path)) is not None:
        picture, note = found
        return Clip(picture[None], ClipInfo.of_stills(1, note))

    with opened(path) as (container, stream):
        index = read_index(container, stream)
        promised = stream.frames - index.num_discarded
        estimate = 0 if stream.frames else expected_frames(container, stream, index.times)
        if index.trusted:
            with suppress(BrokenPromise):
                choice = _Choice.of(path, stream, index.times, num_frames, start, end)
                frames = from_keyframes(container, stream, index, choice.places)
                return choice.clip(frames, _damage(path, len(index.times), promised, estimate))

    with opened(path) as (container, stream):
        everything = Decoded(container, stream)
        times = [frame.pts for frame in everything]
    if not times:
        raise DataError(f"video {path}: it holds no frame that can be decoded")
    if everything.num_errors:  # of a sound file, not every packet need be a picture
        promised = max(promised, len(index.times))
    with opened(path) as (container, stream):
        choice = _Choice.of(path, stream, times, num_frames, start, end)
        frames = enumerate(Decoded(container, stream))
        damage = _damage(path, len(times), promised, estimate)
        return choice.clip(frames, damage, already=len(times))


def read_pictures(paths: Sequence[Path]) -> tuple[list[NDArray[np.uint8]], ClipInfo]:
    """The pictures (H,W,3) uint8 RGB, upright, in files that are not videos.

    Raises:
        DataError: A file that is none, or is damaged.
        NotFoundError, StorageError: See `pictures.read_picture`.
    """
    pictures: list[NDArray[np.uint8]] = []
    notes: list[str] = []
    for path in paths:
        if (found := read_picture(path)) is None:
            raise DataError(f"image {path}: not an image, give a video alone")
        pictures.append(found[0])
        notes += [found[1]] if found[1] else []
    return pictures, ClipInfo.of_stills(len(pictures), "; ".join(notes) or None)


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
    segment = (last - first) / num_chosen
    return tuple(first + int(segment / 2 + round(segment * i)) for i in range(num_chosen))


@dataclass(frozen=True)
class _Choice:
    """Which frames of a file to take, and when they are shown."""

    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    num_frames: int
    fps: float

    @staticmethod
    def of(
        path: Path,
        stream: VideoStream,
        times: Sequence[int | None],
        num_chosen: int,
        start: float | None,
        end: float | None,
    ) -> _Choice:
        unit = float(stream.time_base or 0)
        origin = times[0]
        seconds = [
            None if time is None or origin is None else (time - origin) * unit for time in times
        ]
        fps = frame_rate(stream, seconds)
        try:
            indices = choose_frames(len(times), num_chosen, fps, start, end)
        except UsageError as error:
            raise UsageError(f"video {path}: {error}") from None
        shown = (i / fps if (second := seconds[i]) is None else second for i in indices)
        return _Choice(indices, tuple(shown), len(times), fps)

    @property
    def places(self) -> list[int]:
        """The indices, each once, sorted."""
        return sorted(set(self.indices))

    def clip(
        self, frames: Iterable[tuple[int, VideoFrame]], damage: str | None, already: int = 0
    ) -> Clip:
        """The clip, out of frames with their places, of which no more are taken than needed.

        Only the chosen pictures are kept, once; `already` frames were decoded before.

        Raises:
            InternalError: Some chosen frame is not among them.
        """
        places = np.array(self.indices)
        wanted = set(self.indices)
        last = max(wanted)
        pictures: NDArray[np.uint8] | None = None
        size: tuple[int, int] | None = None
        num_decoded = already
        for place, frame in frames:
            num_decoded += 1
            if place in wanted:
                size = size or (frame.width, frame.height)
                picture = upright(frame, *size)
                if pictures is None:
                    pictures = np.empty((len(places), *picture.shape), np.uint8)
                pictures[places == place] = picture
                wanted.remove(place)
            if place == last:
                break
        if pictures is None or wanted:
            raise InternalError(f"frames {sorted(wanted)} were announced, but did not come")
        info = ClipInfo(
            timestamps=np.array(self.timestamps),
            indices=self.indices,
            num_frames=self.num_frames,
            num_decoded=num_decoded,
            fps=self.fps,
            damage=damage,
        )
        return Clip(pictures, info)


def _damage(path: Path, found: int, promised: int, estimate: int) -> str | None:
    if found >= max(promised, estimate):
        return None
    whole = f"its {promised}" if promised >= estimate else f"about {estimate}"
    return f"video {path}: only {found} of {whole} frames can be decoded, the rest is lost"
