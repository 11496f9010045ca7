"""A video file → the frames that the model looks at, upright and with their times.

A file is read twice. The first reading looks at packets and decodes nothing; it gives the time of
every picture, from which the frames are chosen. The second seeks to the keyframe before each chosen
frame and decodes from there. Whatever comes out must be what the packets announced: a file that
breaks its word (damaged, cut off, without times) is decoded from end to end instead, which is
slower and does not depend on anything the container says.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import (
    DataError,
    NotFoundError,
    StorageError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_LAST_RESORT_FPS = 25.0


@dataclass(frozen=True)
class ClipInfo:
    """What is known of a file and of the frames chosen from it.

    Attributes:
        timestamps: (T,) float64, seconds since the first frame of the file.
        indices: Place of each among all frames of the file, counted from 0.
        num_frames: How many frames the file has, M.
        num_decoded: How many were decoded to get these.
        fps: Frames per second of the file; 0 for a still image.
        damage: A sentence about frames that are announced but not there, or None.
    """

    timestamps: NDArray[np.float64]
    indices: tuple[int, ...]
    num_frames: int
    num_decoded: int
    fps: float
    damage: str | None = None

    @property
    def is_still(self) -> bool:
        """Whether this is an image and not a video."""
        return self.fps == 0


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
        path: A file of any container and codec that FFmpeg knows, or one of IMAGE_SUFFIXES.
        num_frames: How many to choose, T; more than the file has repeats some.
        start, end: Seconds since the first frame; None is the first and the last frame.

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
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _read_image(path)

    with _opened(path) as (container, stream):
        index = _read_index(container, stream)
        promised = stream.frames - index.num_discarded
        if index.trusted:
            with suppress(_BrokenPromise):
                choice = _Choice.of(path, stream, index.times, num_frames, start, end)
                frames = _from_keyframes(container, stream, index, choice.places)
                return choice.clip(frames, _damage(path, len(index.times), promised))

    with _opened(path) as (container, stream):
        everything = _Decoded(container, stream)
        times = [frame.pts for frame in everything]
    if not times:
        raise DataError(f"video {path}: it holds no frame that can be decoded")
    if everything.num_errors:  # of a sound file, not every packet need be a picture
        promised = max(promised, len(index.times))
    with _opened(path) as (container, stream):
        choice = _Choice.of(path, stream, times, num_frames, start, end)
        frames = enumerate(_Decoded(container, stream))
        return choice.clip(frames, _damage(path, len(times), promised), already=len(times))


def choose_frames(
    num_frames: int,
    num_chosen: int,
    fps: float = _LAST_RESORT_FPS,
    start: float | None = None,
    end: float | None = None,
) -> tuple[int, ...]:
    """Indices of `num_chosen` frames of a video of `num_frames`, from the middle of equal segments.

    This is the rule of the published model, its rounding included: Python's, half to even.

    Args:
        num_frames: How many there are, M ≥ 1.
        num_chosen: How many to choose, N; indices repeat when N > M.
        fps: Frames per second, by which seconds become indices.
        start, end: The span in seconds; None is the first and the last frame.

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


class _BrokenPromise(Exception):
    """A file does not hold what its packets announced."""


@dataclass(frozen=True)
class _Index:
    """What the packets of a stream say, without decoding.

    Attributes:
        times: When each picture is shown, in the stream's time base, sorted.
        keys: Time of presentation and of decoding of every keyframe, sorted.
        num_discarded: Packets that only help to decode others and are never shown.
        trusted: Whether pictures can be found by their times.
    """

    times: list[int]
    keys: list[tuple[int, int]]
    num_discarded: int
    trusted: bool


def _read_index(container: InputContainer, stream: VideoStream) -> _Index:
    import av

    times: list[int] = []
    keys: list[tuple[int, int]] = []
    num_discarded = 0
    sound = True
    try:
        for packet in container.demux(stream):
            if packet.size == 0:  # the end, or a picture that was dropped when recording
                continue
            sound &= packet.pts is not None and not packet.is_corrupt
            pts = packet.pts or 0
            if packet.is_keyframe:
                keys.append((pts, packet.dts if packet.dts is not None else pts))
            sound &= bool(keys)
            if packet.is_discard:
                num_discarded += 1
            else:
                times.append(pts)
    except av.FFmpegError:
        sound = False
    times.sort()
    sound = (
        sound
        and len(set(times)) == len(times) > 0
        # Pictures shown before the first keyframe need something that is not in the file.
        and keys == sorted(keys)
        and keys[0][0] <= times[0]
    )
    return _Index(times, keys, num_discarded, sound)


def _from_keyframes(
    container: InputContainer, stream: VideoStream, index: _Index, wanted: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their places: from the keyframe before each run of wanted places to its last."""
    import av

    starts = [pts for pts, _ in index.keys]
    last_of: dict[int, int] = {}
    for place in sorted(wanted):
        last_of[bisect_right(starts, index.times[place]) - 1] = place
    for key, last in last_of.items():
        start = index.keys[key]
        place = bisect_left(index.times, start[0])
        try:
            for packet in _packets_from(container, stream, start):
                for frame in stream.decode(packet):
                    if frame.pts is not None and frame.pts < start[0]:
                        continue  # shown before the keyframe and made from what came before it
                    if frame.is_corrupt or frame.pts != index.times[place]:
                        raise _BrokenPromise
                    yield place, frame
                    place += 1
                    if place > last:
                        break
                if place > last:
                    break
        except av.FFmpegError as error:
            raise _BrokenPromise from error
        if place <= last:
            raise _BrokenPromise


def _packets_from(
    container: InputContainer, stream: VideoStream, key: tuple[int, int]
) -> Iterator[Packet[VideoStream]]:
    """Packets from the keyframe on. Where a container can only seek roughly, those before it are
    read and not decoded."""
    pts, dts = key
    container.seek(dts, stream=stream)
    reached = False
    for packet in container.demux(stream):
        reached = reached or (packet.is_keyframe and packet.pts == pts)
        if reached:
            yield packet
        elif packet.dts is not None and packet.dts > dts:
            break
    if not reached:
        raise _BrokenPromise


class _Decoded:
    """All frames of a stream in order of presentation; what cannot be decoded is left out."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.num_errors = 0
        self._container = container
        self._stream = stream

    def __iter__(self) -> Iterator[VideoFrame]:
        import av

        for packet in self._packets():
            try:
                yield from self._stream.decode(packet)
            except av.EOFError:  # the decoder had been drained already
                return
            except av.FFmpegError:
                self.num_errors += 1

    def _packets(self) -> Iterator[Packet[VideoStream] | None]:
        import av

        try:
            yield from self._container.demux(self._stream)
        except av.FFmpegError:
            self.num_errors += 1
        yield None  # drains the decoder when the file broke off


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
        fps = _frame_rate(stream, seconds)
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

        Only the chosen pictures are kept; `already` frames were decoded before.
        """
        wanted = set(self.indices)
        last = max(wanted)
        pictures: dict[int, NDArray[np.uint8]] = {}
        size: tuple[int, int] | None = None
        num_decoded = already
        for place, frame in frames:
            num_decoded += 1
            if place in wanted:
                size = size or (frame.width, frame.height)
                pictures[place] = _upright(frame, *size)
            if place == last:
                break
        info = ClipInfo(
            timestamps=np.array(self.timestamps),
            indices=self.indices,
            num_frames=self.num_frames,
            num_decoded=num_decoded,
            fps=self.fps,
            damage=damage,
        )
        return Clip(np.stack([pictures[i] for i in self.indices]), info)


def _frame_rate(stream: VideoStream, seconds: Sequence[float | None]) -> float:
    """Frames per second: the container's, unless the frames' own times contradict it grossly."""
    claimed = float(stream.average_rate or stream.guessed_rate or 0)
    first, last = seconds[0], seconds[-1]
    if first is None or last is None or last <= first:
        return claimed or _LAST_RESORT_FPS
    measured = (len(seconds) - 1) / (last - first)
    return claimed if measured / 2 <= claimed <= measured * 2 else measured


def _upright(frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    """The picture as RGB, turned and mirrored as its display matrix says.

    Given a size because a stream may change its own on the way.
    """
    picture: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", width=width, height=height)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # A point goes from (x,y) to (a·x + c·y, b·x + d·y).
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32, count=5))
    quarter_turn = abs(b) > abs(a)
    if quarter_turn:
        picture = picture.transpose(1, 0, 2)
    flip_x, flip_y = (c < 0, b < 0) if quarter_turn else (a < 0, d < 0)
    return picture[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _damage(path: Path, found: int, promised: int) -> str | None:
    if found >= promised:
        return None
    return f"video {path}: only {found} of its {promised} frames can be decoded, the rest is lost"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        import av
    except ImportError as error:
        raise UnavailableError(f"reading videos needs PyAV: pip install av ({error})") from error
    try:
        # Absolute, so that no name can pass for a protocol such as "concat:".
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except PermissionError as error:
        raise StorageError(f"video {path}: no permission to read it") from error
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"video {path}: not a video that can be read ({reason})") from error
    with container:
        # The cover of a piece of music is kept as a video stream of one picture.
        cover = av.stream.Disposition.attached_pic
        videos = (stream for stream in container.streams.video if not stream.disposition & cover)
        stream = next(videos, None)
        if stream is None:
            kinds = sorted({stream.type for stream in container.streams})
            raise DataError(f"video {path}: it has no video stream, only {', '.join(kinds)}")
        if stream.codec_context is None:
            raise UnavailableError(f"video {path}: FFmpeg here has no decoder for its codec")
        stream.thread_type = "AUTO"
        yield container, stream


def _read_image(path: Path) -> Clip:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except PermissionError as error:
        raise StorageError(f"image {path}: no permission to read it") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path}: not an image that can be read ({error})") from error
    info = ClipInfo(np.zeros(1), (0,), num_frames=1, num_decoded=1, fps=0)
    return Clip(picture[None], info)
