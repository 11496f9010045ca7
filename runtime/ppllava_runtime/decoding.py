"""The frames of one file by their places: sought, or decoded from end to end."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import DataError, StorageError, UnavailableError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

LAST_RESORT_FPS = 25.0

# Those that write down how long they are. Of others FFmpeg finds it out from what is there, or
# guesses it from the bit rate.
_TIMED_FORMATS = ("matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "flv")
_ENOUGH = 0.9  # of the duration; less of it is damage


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file `path` and its first stream of moving pictures, until the block ends.

    Raises:
        DataError: Not a video, or no video stream in it.
        StorageError: The file may not be read.
        UnavailableError: PyAV is missing, or it has no decoder for this codec.
    """
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
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no stream"
            raise DataError(f"video {path}: it has no video stream (there is {kinds})")
        if stream.codec_context is None:
            raise UnavailableError(f"video {path}: FFmpeg here has no decoder for its codec")
        stream.thread_type = "AUTO"
        yield container, stream


class BrokenPromise(Exception):
    """A file does not hold what its packets announced."""


@dataclass(frozen=True)
class Index:
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


def read_index(container: InputContainer, stream: VideoStream) -> Index:
    """What all packets of the stream say; reads the file to its end."""
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
    return Index(times, keys, num_discarded, sound)


def expected_frames(container: InputContainer, stream: VideoStream, times: Sequence[int]) -> int:
    """About how many frames there must have been, by the duration that the container states.

    0 says that nothing is missing, or that it cannot be known: in a transport or program stream, a
    raw stream, a live recording, a fragmented MP4 without an index of its fragments, and in a file
    with sound which does not say how long the pictures alone are.

    Args:
        container: The file.
        stream: Its stream.
        times: Of the pictures that are there, in the stream's time base, sorted.
    """
    stated = _stated_seconds(container, stream)
    if stated is None or len(times) < 2:
        return 0
    # The last picture may stay as long as any other did. Counted from 0, as durations are.
    longest = max(after - before for before, after in pairwise(times))
    covered = (times[-1] + longest) * float(stream.time_base or 0)
    return round(len(times) * stated / covered) if 0 < covered < _ENOUGH * stated else 0


def _stated_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    if container.format.name not in _TIMED_FORMATS:
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if not container.duration:
        return None
    whole = container.duration / 1_000_000  # microseconds
    try:
        hours, minutes, seconds = map(float, stream.metadata["DURATION"].split(":"))
    except (KeyError, ValueError):
        return whole if len(container.streams) == 1 else None
    return min(whole, hours * 3600 + minutes * 60 + seconds)


def from_keyframes(
    container: InputContainer, stream: VideoStream, index: Index, wanted: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their places: from the keyframe before each run of wanted places to its last.

    Args:
        container: The file.
        stream: Its stream.
        index: What its packets say; a trusted one.
        wanted: Places, counted from 0.

    Raises:
        BrokenPromise: Another frame came out than the index says, or none.
    """
    import av

    starts = [pts for pts, _ in index.keys]
    last_of: dict[int, int] = {}
    for place in sorted(wanted):
        last_of[bisect_right(starts, index.times[place]) - 1] = place
    try:
        for key, last in last_of.items():
            frames = _frames_from(container, stream, index.keys[key])
            for place in range(bisect_left(index.times, starts[key]), last + 1):
                frame = next(frames, None)
                if frame is None or frame.is_corrupt or frame.pts != index.times[place]:
                    raise BrokenPromise
                yield place, frame
    except av.FFmpegError as error:
        raise BrokenPromise from error


def _frames_from(
    container: InputContainer, stream: VideoStream, key: tuple[int, int]
) -> Iterator[VideoFrame]:
    for packet in _packets_from(container, stream, key):
        for frame in stream.decode(packet):
            # What is shown before the keyframe was made from frames before it, which are not here.
            if frame.pts is None or frame.pts >= key[0]:
                yield frame


def _packets_from(
    container: InputContainer, stream: VideoStream, key: tuple[int, int]
) -> Iterator[Packet[VideoStream]]:
    pts, dts = key
    container.seek(dts, stream=stream)
    reached = False
    for packet in container.demux(stream):
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

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        # With whole frames on several threads, what damage does to the next ones is left to chance.
        stream.thread_type = "SLICE"
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


def upright(frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    """The picture as RGB, turned and mirrored as its display matrix says.

    Args:
        frame: As decoded.
        width: To be scaled to before it is turned, since a stream may change its size on the way.
        height: The same.
    """
    picture = frame.to_ndarray(format="rgb24", width=width, height=height).view(np.uint8)
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
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


def frame_rate(stream: VideoStream, seconds: Sequence[float | None]) -> float:
    """Frames per second: the container's, unless the frames' own times contradict it grossly.

    Args:
        stream: The stream.
        seconds: When each frame is shown, None where that is not known.
    """
    claimed = float(stream.average_rate or stream.guessed_rate or 0)
    first, last = seconds[0], seconds[-1]
    if first is None or last is None or last <= first:
        return claimed or LAST_RESORT_FPS
    measured = (len(seconds) - 1) / (last - first)
    return claimed if measured / 2 <= claimed <= measured * 2 else measured
