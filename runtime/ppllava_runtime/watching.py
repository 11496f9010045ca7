"""A clip on its way into the vision tower: an Opener decodes and shrinks, the caller encodes.

A full frame is a square for the tower and a thumbnail for people as soon as it is decoded, so that
hardly more than one is ever there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import ModelSpec
from ppllava_engines.errors import InternalError
from ppllava_runtime.answer import Stopwatch
from ppllava_runtime.anyres import Tiling
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.memory import thumbnails
from ppllava_runtime.preprocess import normalised, squared
from ppllava_runtime.video import ClipInfo, Sample, each_picture

Kept = TypeVar("Kept")
Kept_co = TypeVar("Kept_co", covariant=True)
Item = TypeVar("Item")

Progress = Callable[[int, int], None]
Picture = NDArray[np.uint8]
Shown = tuple[tuple[int, ...], Picture, Picture]  # places, square, thumbnail


class Recorder(Protocol[Kept_co]):
    """Runs the tower on some frames of a video and stores what comes out, row by row."""

    @property
    def frames_per_run(self) -> int:
        """How many frames at a time are worth waiting for; all of those that see each other."""

    def encode(self, rows: Sequence[int], pixel_values: NDArray[np.float32]) -> None:
        """Stores what the tower makes of the frames (n,3,S,S) in n rows."""

    def repeat(self, row: int, rows: Sequence[int]) -> None:
        """Copies a row that is there into others."""

    def finish(self) -> Kept_co:
        """What is kept, once every row is there."""


class ClipFrames(Protocol):
    """The frames of a clip as they come; to be closed, however many of them were taken.

    Iterating yields the places in the clip that show a frame, the frame as a square (S,S,3) uint8
    RGB, see `preprocess.squared`, and its thumbnail, see `memory.thumbnails`. At least one comes,
    and in the end there is one for every place; of a place that comes twice the later one counts.
    """

    @property
    def num_rows(self) -> int:
        """How many places there are, T, once the first frame is there."""
        ...

    @property
    def info(self) -> ClipInfo:
        """What is known of the file, once the last frame was there."""
        ...

    def __iter__(self) -> Iterator[Shown]:
        """Yields what is shown, and where; raises what is wrong with the file."""
        ...

    def close(self) -> None:
        """Ends the decoding, and frees what it holds."""
        ...


class Opener(Protocol):
    """Reads what is in files: the only one that does, of all that is watched.

    Raises:
        DataError: From any of these: a file that is damaged or no such thing; MediaError is one.
        NotFoundError, StorageError, UnavailableError: The same; see `video.read_clip`.
    """

    def still(self, path: Path, leaving: Leaving) -> tuple[Picture, str | None] | None:
        """The picture (H,W,3) in a file and what there is to note; None of a video.

        See `pictures.read_picture`. Who leaves may end it before, with Left.
        """
        ...

    def clip(self, path: Path, sample: Sample, size: int, leaving: Leaving) -> ClipFrames:
        """The frames of a video, in squares of `size`; what is wrong is raised by iterating.

        So is Left, where who leaves ends it.
        """
        ...


@dataclass(frozen=True)
class Seen(Generic[Kept]):
    """What was seen of a clip, of a picture or of several.

    Attributes:
        info: About the file and the frames chosen from it.
        thumbnails: The frames or pictures (H,W,3) uint8 RGB, small, for people.
        arrays: What the recorder kept, as its `finish` gives it.
        num_encoded: Frames or views that went through the tower.
        tiling: How a picture was cut into views; None where nothing was.
    """

    info: ClipInfo
    thumbnails: tuple[Picture, ...]
    arrays: Kept
    num_encoded: int
    tiling: Tiling | None = None


def watch_clip(
    frames: ClipFrames,
    *,
    recorder_of: Callable[[int, bool], Recorder[Kept]],
    model: ModelSpec,
    stopwatch: Stopwatch,
    progress: Progress | None = None,
) -> Seen[Kept]:
    """What the model sees of a video.

    Frames that look the same to the tower go through it once, unless frames see each other. How
    frames are decoded has no influence on what comes out, nor has who does it.

    Args:
        frames: Of the video; they are closed.
        recorder_of: Makes the recorder of so many rows, and of whether their frames see each other:
            then it is given all at once. Called when the first frame is there.
        model: What frames must look like.
        stopwatch: Counts as "decode" how long the tower had to wait for frames.
        progress: Called with the number of rows that are there and of all, first with none. What it
            raises ends this, and the decoding.

    Raises:
        DataError, StorageError, UnavailableError, UsageError: See `video.read_clip`.
    """
    small: dict[int, Picture] = {}
    rows_of: _Rows[Kept] | None = None
    with closing(frames):
        for rows, square, thumbnail in _timed(stopwatch, frames):
            if rows_of is None:
                rows_of = _Rows(
                    recorder_of, frames.num_rows, model.frames_coupled, model, stopwatch, progress
                )
            small.update(dict.fromkeys(rows, thumbnail))
            rows_of.take(rows, square)
        if rows_of is None or len(small) != frames.num_rows:
            raise InternalError(f"watching: {len(small)} frames of a clip came, expected all")
        info = frames.info
    thumbnails = tuple(small[row] for row in range(len(small)))
    return Seen(info, thumbnails, rows_of.finish(), rows_of.num_encoded)


class PictureFrames:
    """Pictures that are the frames of a video, as ClipFrames; they may differ in size.

    Args:
        paths: Of all frames.
        sample: Which of them are looked at; the others are not read.
        fps: So many frames are a second.
        size: Side of a square.
        still: Reads one, see `Opener.still`.

    Raises:
        UsageError: See `Sample.indices`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        sample: Sample,
        fps: float,
        size: int,
        still: Callable[[Path], tuple[Picture, str | None] | None],
    ) -> None:
        self._paths = paths
        self._indices = sample.indices(len(paths), fps)
        self._fps = fps
        self._size = size
        self._still = still
        self._notes: list[str] = []

    @property
    def num_rows(self) -> int:
        """How many places there are."""
        return len(self._indices)

    @property
    def info(self) -> ClipInfo:
        """What is known of the pictures, once they were read."""
        return ClipInfo(
            timestamps=np.array(self._indices) / self._fps,
            indices=self._indices,
            num_frames=len(self._paths),
            num_decoded=len(set(self._indices)),
            fps=self._fps,
            damage="; ".join(self._notes) or None,
        )

    def __iter__(self) -> Iterator[Shown]:
        """Yields the places in which a picture is shown, its square and its thumbnail."""
        places = sorted(set(self._indices))
        pictures = each_picture((self._paths[place] for place in places), self._still)
        for place, (picture, note) in zip(places, pictures, strict=True):
            self._notes += [note] if note else []
            rows = tuple(row for row, index in enumerate(self._indices) if index == place)
            (thumbnail,) = thumbnails([picture])
            yield rows, squared(picture, self._size), thumbnail

    def close(self) -> None:
        """Nothing: no file stays open."""


def watch_pictures(
    pictures: Iterable[tuple[Picture, str | None]],
    count: int,
    *,
    recorder_of: Callable[[int, bool], Recorder[Kept]],
    model: ModelSpec,
    stopwatch: Stopwatch,
    tiled: bool = False,
    progress: Progress | None = None,
) -> Seen[Kept]:
    """What the model sees of pictures; see `watch_clip`.

    Args:
        pictures: (H,W,3) uint8 RGB, upright, each with what there is to note.
        count: How many there are, 1 or more.
        recorder_of: See `watch_clip`.
        model: What pictures must look like.
        stopwatch: Counts reading them as "decode".
        tiled: Whether a single picture is cut into views, where it is large enough.
        progress: See `watch_clip`.

    Raises:
        DataError, NotFoundError, StorageError: What reading the pictures raises.
    """
    small: list[Picture] = []
    notes: list[str] = []
    tiling: Tiling | None = None
    rows = _Rows(recorder_of, count, model.frames_coupled and count > 1, model, stopwatch, progress)
    for row, (picture, note) in enumerate(_timed(stopwatch, pictures)):
        with stopwatch.time("preprocess"):
            small += thumbnails([picture])
            notes += [note] if note else []
            if tiled and count == 1:
                height, width, _ = picture.shape
                tiling = Tiling.of((height, width), model.image_grid_pinpoints, model.image_size)
                views = list(tiling.views(picture))
                rows = _Rows(recorder_of, len(views), False, model, stopwatch, progress)
            else:
                views = [squared(picture, model.image_size)]
        for view, square in enumerate(views, row):
            rows.take((view,), square)
    info = ClipInfo.of_stills(count, "; ".join(notes) or None)
    return Seen(info, tuple(small), rows.finish(), rows.num_encoded, tiling)


def _timed(stopwatch: Stopwatch, items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items; how long each takes to come counts as "decode"."""
    iterator = iter(items)
    while True:
        with stopwatch.time("decode"):
            found = list(islice(iterator, 1))
        if not found:
            return
        yield found[0]


class _Rows(Generic[Kept]):
    """The rows of a recorder: each content is encoded once and copied to all rows that show it.

    What a row shows may change until the end; what was encoded for it serves others meanwhile.
    """

    def __init__(
        self,
        recorder_of: Callable[[int, bool], Recorder[Kept]],
        num_rows: int,
        coupled: bool,
        model: ModelSpec,
        stopwatch: Stopwatch,
        progress: Progress | None,
    ) -> None:
        self.num_encoded = 0
        self._make = recorder_of
        self._recorder: Recorder[Kept] | None = None
        self._coupled = coupled
        self._model = model
        self._stopwatch = stopwatch
        self._progress = progress
        self._stored: list[bytes | None] = [None] * num_rows  # digests
        self._waiting: dict[bytes, tuple[Picture, list[int]]] = {}
        self._together: dict[int, Picture] = {}

    def take(self, rows: Sequence[int], square: Picture) -> None:
        """From now on these rows show what is (S,S,3)."""
        recorder = self._open()
        if self._coupled:
            self._together.update(dict.fromkeys(rows, square))
            return
        for digest, (_, others) in list(self._waiting.items()):
            others[:] = [row for row in others if row not in rows]
            if not others:
                del self._waiting[digest]
        digest = sha256(square.tobytes()).digest()
        changed = [row for row in rows if self._stored[row] != digest]
        if digest in self._waiting:
            self._waiting[digest][1].extend(changed)
        elif changed and digest in self._stored:
            with self._stopwatch.time("vision"):
                recorder.repeat(self._stored.index(digest), changed)
            self._note(digest, changed)
        elif changed:
            self._waiting[digest] = (square, changed)
        if len(self._waiting) >= recorder.frames_per_run:
            self._encode()

    def finish(self) -> Kept:
        """What the recorder keeps, now that every row has been taken."""
        recorder = self._open()
        if self._coupled:
            rows = sorted(self._together)
            self._run(recorder, rows, [self._together[row] for row in rows])
            self._note(b"", rows)
        elif self._waiting:
            self._encode()
        return recorder.finish()

    def _open(self) -> Recorder[Kept]:
        if self._recorder is None:
            self._recorder = self._make(len(self._stored), self._coupled)
            self._note(b"", ())
        return self._recorder

    def _encode(self) -> None:
        """Runs the tower on what waits for it."""
        recorder = self._open()
        squares, rows = zip(*self._waiting.values(), strict=True)
        self._run(recorder, [first for first, *_ in rows], squares)
        for digest, (_, (first, *others)) in self._waiting.items():
            if others:
                with self._stopwatch.time("vision"):
                    recorder.repeat(first, others)
            for row in (first, *others):
                self._stored[row] = digest
        self._waiting.clear()
        self._note(b"", ())

    def _run(
        self, recorder: Recorder[Kept], rows: Sequence[int], squares: Sequence[Picture]
    ) -> None:
        with self._stopwatch.time("preprocess"):
            values = normalised(squares, self._model.image_mean, self._model.image_std)
        with self._stopwatch.time("vision"):
            recorder.encode(rows, values)
        self.num_encoded += len(rows)

    def _note(self, digest: bytes, rows: Sequence[int]) -> None:
        """Says what rows show, and to the caller how many are there."""
        for row in rows:
            self._stored[row] = digest
        if self._progress:
            self._progress(sum(stored is not None for stored in self._stored), len(self._stored))
