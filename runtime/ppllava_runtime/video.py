"""A video file → the frames that the model looks at, upright and with their times.

A file is read twice. The first reading decodes nothing; from an MP4's tables, or else from every
packet, it takes the time of every picture, by which the frames are chosen. The second seeks to the
keyframe before each chosen frame and decodes from there, leaving out pictures that no other is made
from. Whatever comes out must be what was announced: a file that breaks its word (damaged, cut off,
without times) is decoded from end to end instead, which is slower and does not depend on anything
the container says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import (
    DataError,
    InternalError,
    NotFoundError,
    UsageError,
)
from ppllava_runtime.choosing import Sample as Sample
from ppllava_runtime.choosing import choose_frames as choose_frames
from ppllava_runtime.decoding import (
    BrokenPromise,
    Decoded,
    can_be_sparing,
    frame_rate,
    from_keyframes,
    opened,
    upright,
)
from ppllava_runtime.indexing import expected_frames, read_index
from ppllava_runtime.pictures import read_picture

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

    from ppllava_runtime.guard import Guard


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
    if (found := read_still(path)) is not None:
        picture, note = found
        return Clip(picture[None], ClipInfo.of_stills(1, note))
    chosen = ChosenFrames(Path(path), Sample(num_frames, None, start, end))
    pictures: NDArray[np.uint8] | None = None
    for rows, picture in chosen:
        if pictures is None or pictures.shape[1:] != picture.shape:
            pictures = np.empty((num_frames, *picture.shape), np.uint8)
        pictures[list(rows)] = picture
    assert pictures is not None
    return Clip(pictures, chosen.info)


def read_still(path: str | Path) -> tuple[NDArray[np.uint8], str | None] | None:
    """The picture (H,W,3) in a file and what there is to note; None of a video.

    Raises:
        DataError: Not a file, or a damaged picture.
        NotFoundError: There is no such file.
        StorageError: The file cannot be read.
    """
    check_file(Path(path))
    return read_picture(Path(path))


def check_file(path: Path) -> None:
    """Nothing, when there is such a file.

    Raises:
        DataError: Not a file.
        NotFoundError: There is no such file.
    """
    if not path.exists():
        raise NotFoundError(f"video {path}: no such file")
    if not path.is_file():
        raise DataError(f"video {path}: not a file")


class ChosenFrames:
    """The frames of `read_clip` one at a time, so that no more than one of them is kept.

    Iterating yields the places in the clip that show a frame, and the frame (H,W,3) uint8, upright.
    A file that breaks its word begins again: of a place that comes twice the later frame counts.

    Args:
        path: A video file that is there.
        sample: Which frames.
        alone: Whether all cores may decode; else one does.
        left: Set by another thread to make the iteration end early.
        guard: How the file is read where it comes from a stranger.

    Attributes:
        num_rows: How many places there are, T, once the first frame is there.
        info: What is known of the file, once the iteration has ended.

    Raises:
        DataError, StorageError, UnavailableError, UsageError: See `read_clip`; by iterating.
    """

    num_rows: int
    info: ClipInfo

    def __init__(
        self,
        path: Path,
        sample: Sample,
        *,
        alone: bool = True,
        left: Event | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._path = path
        self._sample = sample
        self._fixed: int | None = None
        self._open = partial(opened, path, left or Event(), alone, guard)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], NDArray[np.uint8]]]:
        path = self._path
        with self._open() as source:
            index = read_index(source)
            stream = source.stream
            promised = stream.frames - index.num_discarded
            estimate = 0 if stream.frames else expected_frames(source, index.times)
            if index.trusted:
                choice = _Choice.of(path, stream, index.times, self._sample, self._fixed)
                damage = _damage(path, len(index.times), promised, estimate)
                # Left-out pictures may confuse a decoder about the order of those around them.
                for sparing in (True, False) if can_be_sparing(stream) else (False,):
                    with suppress(BrokenPromise):
                        frames = from_keyframes(source, index, choice.places, sparing)
                        yield from self._taken(choice, frames, damage)
                        return

        with self._open() as source:
            everything = Decoded(source)
            times = [frame.pts for frame in everything]
        if not times:
            raise DataError(f"video {path}: it holds no frame that can be decoded")
        if everything.num_errors:  # of a sound file, not every packet need be a picture
            promised = max(promised, len(index.times))
        with self._open() as source:
            choice = _Choice.of(path, source.stream, times, self._sample, self._fixed)
            frames = enumerate(Decoded(source))
            damage = _damage(path, len(times), promised, estimate)
            yield from self._taken(choice, frames, damage, already=len(times))

    def _taken(
        self,
        choice: _Choice,
        frames: Iterable[tuple[int, VideoFrame]],
        damage: str | None,
        already: int = 0,
    ) -> Iterator[tuple[tuple[int, ...], NDArray[np.uint8]]]:
        """Yields the chosen ones of frames with their places, and takes no more than needed.

        `already` frames were decoded before.

        Raises:
            InternalError: Some chosen frame is not among them.
        """
        rows_of: dict[int, list[int]] = {}
        for row, place in enumerate(choice.indices):
            rows_of.setdefault(place, []).append(row)
        size: tuple[int, int] | None = None
        num_decoded = already
        for place, frame in frames:
            num_decoded += 1
            if rows := rows_of.pop(place, None):
                self._fix(len(choice.indices))
                size = size or (frame.width, frame.height)
                yield tuple(rows), upright(frame, *size)
            if not rows_of:
                break
        if rows_of:
            raise InternalError(f"frames {sorted(rows_of)} were announced, but did not come")
        self.info = ClipInfo(
            timestamps=np.array(choice.timestamps),
            indices=choice.indices,
            num_frames=choice.num_frames,
            num_decoded=num_decoded,
            fps=choice.fps,
            damage=damage,
        )

    def _fix(self, num_rows: int) -> None:
        """From now on it is so many: one that begins again may find more or fewer frames."""
        self.num_rows = self._fixed = num_rows


def each_picture(
    paths: Iterable[Path],
    read: Callable[[Path], tuple[NDArray[np.uint8], str | None] | None] = read_picture,
) -> Iterator[tuple[NDArray[np.uint8], str | None]]:
    """Yields the picture (H,W,3) uint8 RGB, upright, in each file and what there is to note.

    Args:
        paths: The files.
        read: Reads one, as `pictures.read_picture` does.

    Raises:
        DataError: A file that is no picture, or is damaged.
        NotFoundError, StorageError: See `pictures.read_picture`.
    """
    for path in paths:
        if (found := read(path)) is None:
            raise DataError(f"image {path}: not an image, give a video alone")
        yield found


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
        times: Sequence[int | None] | NDArray[np.int64],
        sample: Sample,
        num_rows: int | None = None,
    ) -> _Choice:
        unit = float(stream.time_base or 0)
        origin = times[0]

        def shown(place: int) -> float | None:
            time = times[place]
            return None if time is None or origin is None else int(time - origin) * unit

        fps = frame_rate(stream, len(times), shown(-1))
        try:
            indices = sample.indices(len(times), fps, num_rows)
        except UsageError as error:
            raise UsageError(f"video {path}: {error}") from None
        seconds = (i / fps if (second := shown(i)) is None else second for i in indices)
        return _Choice(indices, tuple(seconds), len(times), fps)

    @property
    def places(self) -> list[int]:
        """The indices, each once, sorted."""
        return sorted(set(self.indices))


def _damage(path: Path, found: int, promised: int, estimate: int) -> str | None:
    if found >= max(promised, estimate):
        return None
    whole = f"its {promised}" if promised >= estimate else f"about {estimate}"
    return f"video {path}: only {found} of {whole} frames can be decoded, the rest is lost"
