"""The frames of one file by their places: sought, or decoded from end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import DataError, StorageError, UnavailableError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

    from ppllava_runtime.guard import Guard
    from ppllava_runtime.indexing import Index

LAST_RESORT_FPS = 25.0

# Of others FFmpeg cannot leave such pictures out, or leaves out more.
_TELLING_CODECS = ("h264",)


class BrokenPromise(Exception):
    """A file does not hold what its packets announced."""


class Left(Exception):
    """Nobody waits for what is being read any more."""


@dataclass(frozen=True)
class Source:
    """A file that is open.

    Attributes:
        path: The file.
        container: It, as FFmpeg reads it.
        stream: Its first stream of moving pictures.
        left: Set by another thread that wants no more of it.
        guard: How it is read where it comes from a stranger.
    """

    path: Path
    container: InputContainer
    stream: VideoStream
    left: Event
    guard: Guard | None = None

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """Yields the stream's packets from where it stands.

        Raises:
            Left: Nobody wants them.
            MediaError: There are too many.
        """
        for count, packet in enumerate(self.container.demux(self.stream)):
            if self.left.is_set():
                raise Left
            if self.guard:  # the last packet only says that there are no more
                self.guard.check_count(self.path, count)
            yield packet

    def file(self) -> BufferedIOBase:
        """The file itself, from its beginning."""
        return BufferedReader(self.guard.file(self.path)) if self.guard else self.path.open("rb")

    def check_length(self, num_frames: int, first: int, last: int) -> None:
        """Raises MediaError where these are too many frames, or too long; times in its unit."""
        if self.guard:
            self.guard.check_count(self.path, num_frames)
            unit = float(self.stream.time_base or 0)
            self.guard.check_seconds(self.path, (last - first) * unit)


@contextmanager
def opened(
    path: Path, left: Event, alone: bool = True, guard: Guard | None = None
) -> Iterator[Source]:
    """The file `path` and its first stream of moving pictures, until the block ends.

    Args:
        path: The file.
        left: See `Source`.
        alone: Whether all cores may decode; else one does.
        guard: See `Source`; then `path` is but a name.

    Raises:
        DataError: Not a video, or no video stream in it.
        MediaError: More than the guard lets pass.
        MemoryError: There is too little for it.
        StorageError: The file may not be read.
        UnavailableError: PyAV is missing, or it has no decoder for this codec.
    """
    try:
        import av
    except ImportError as error:
        raise UnavailableError(f"reading videos needs PyAV: pip install av ({error})") from error
    try:
        # Absolute, so that no name can pass for a protocol such as "concat:".
        name = str(path.absolute())
        container = guard.container(path) if guard else av.open(name, metadata_errors="replace")
    except MemoryError:  # one of FFmpeg's errors as well
        raise
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
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no stream"
            raise DataError(f"video {path}: it has no video stream (there is {kinds})")
        if stream.codec_context is None:
            raise UnavailableError(f"video {path}: FFmpeg here has no decoder for its codec")
        stream.thread_type = "AUTO"
        if not alone:
            stream.codec_context.thread_count = 1
        if guard:
            guard.restrain(path, container, stream)
        yield Source(path, container, stream, left, guard)


def can_be_sparing(stream: VideoStream) -> bool:
    """Whether its codec tells of a picture that no other is made from it."""
    return stream.codec_context.name in _TELLING_CODECS


def from_keyframes(
    source: Source, index: Index, wanted: Sequence[int], sparing: bool
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their places: from the keyframe before each run of wanted places to its last.

    Args:
        source: The file.
        index: What its packets say; a trusted one.
        wanted: Places, counted from 0, sorted.
        sparing: Whether to leave out what is not wanted and no other picture is made from.

    Raises:
        BrokenPromise: Another frame came out than the index says, or none.
    """
    import av

    runs: dict[int, list[int]] = {}
    for place in wanted:
        runs.setdefault(index.keyframe_before(place), []).append(place)
    try:
        for key, places in runs.items():
            shown, decoded = (int(time) for time in index.keys[key])
            times = {int(index.times[place]): place for place in places}
            frames = _frames_from(source, (shown, decoded), set(times) if sparing else None)
            place = int(np.searchsorted(index.times, shown))
            while times:
                frame = next(frames, None)
                if frame is None or frame.is_corrupt or frame.pts is None:
                    raise BrokenPromise
                if sparing:
                    place = max(place, int(np.searchsorted(index.times, frame.pts)))
                if place >= len(index.times) or frame.pts != index.times[place]:
                    raise BrokenPromise
                times.pop(frame.pts, None)
                if any(time < frame.pts for time in times):
                    raise BrokenPromise
                yield place, frame
                place += 1
    except av.FFmpegError as error:
        raise BrokenPromise from error


def _frames_from(
    source: Source, key: tuple[int, int], wanted: set[int] | None
) -> Iterator[VideoFrame]:
    """Yields what is decoded from a keyframe on; only what it takes for those wanted, if given."""
    decoder = source.stream.codec_context
    try:
        for packet in _packets_from(source, key):
            if wanted is not None:
                decoder.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in source.stream.decode(packet):
                # What is shown before the keyframe was made from frames before it, which are not
                # here.
                if frame.pts is None or frame.pts >= key[0]:
                    yield frame
    finally:
        decoder.skip_frame = "DEFAULT"


def _packets_from(source: Source, key: tuple[int, int]) -> Iterator[Packet[VideoStream]]:
    pts, dts = key
    source.container.seek(dts, stream=source.stream)
    reached = False
    for packet in source.packets():
        # Some containers can only seek roughly: what comes before the keyframe is not decoded.
        reached = reached or (packet.is_keyframe and packet.pts == pts)
        if reached:
            yield packet
        elif packet.dts is not None and packet.dts > dts:
            raise BrokenPromise  # sought too far


class Decoded:
    """All frames of a stream in order of presentation; what cannot be decoded is left out.

    Attributes:
        num_errors: How often something could not be decoded so far.
    """

    def __init__(self, source: Source) -> None:
        # With whole frames on several threads, what damage does to the next ones is left to chance.
        source.stream.thread_type = "SLICE"
        self.num_errors = 0
        self._source = source

    def __iter__(self) -> Iterator[VideoFrame]:
        import av

        for packet in self._packets():
            try:
                yield from self._source.stream.decode(packet)
            except av.EOFError:  # the decoder had been drained already
                return
            except MemoryError:  # one of FFmpeg's errors as well, but no damage
                raise
            except av.FFmpegError:
                self.num_errors += 1

    def _packets(self) -> Iterator[Packet[VideoStream] | None]:
        import av

        try:
            yield from self._source.packets()
        except av.FFmpegError:
            self.num_errors += 1
        yield None  # drains the decoder when the file broke off


def upright(frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    """The picture as RGB, turned and mirrored as its display matrix says.

    Args:
        frame: As decoded.
        width: To be scaled to before it is turned, since a stream may change its size on the way.
        height: The same.
    """
    from av.sidedata.sidedata import SideDataContainer

    picture = frame.to_ndarray(format="rgb24", width=width, height=height).view(np.uint8)
    try:
        # Not the frame's own, which would hold the frame that holds it, until they are collected.
        side_data: Any = SideDataContainer  # whose stub takes nothing
        matrix = side_data(frame).get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows fewer kinds of side data than FFmpeg, EXIF is not among them
        return np.rot90(picture, frame.rotation // 90)
    if matrix is None:
        return picture
    # A point goes from (x,y) to (a·x + c·y, b·x + d·y).
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32, count=5))
    quarter_turn = abs(b) > abs(a)
    if quarter_turn:
        picture = picture.transpose(1, 0, 2)
    flip_x, flip_y = (c < 0, b < 0) if quarter_turn else (a < 0, d < 0)
    return picture[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def frame_rate(stream: VideoStream, num_frames: int, seconds: float | None) -> float:
    """Frames per second: the container's, unless the frames' own times contradict it grossly.

    Args:
        stream: The stream.
        num_frames: How many frames it has.
        seconds: From the first to the last, None where that is not known.
    """
    claimed = float(stream.average_rate or stream.guessed_rate or 0)
    if seconds is None or seconds <= 0:
        return claimed or LAST_RESORT_FPS
    measured = (num_frames - 1) / seconds
    return claimed if measured / 2 <= claimed <= measured * 2 else measured
