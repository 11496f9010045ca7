"""When every picture of a file is shown and which of them stand alone, without decoding any."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ppllava_runtime.decoding import Source, opened

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Those that write down how long they are. Of others FFmpeg finds it out from what is there, or
# guesses it from the bit rate.
_TABLED_FORMAT = "mov,mp4,m4a,3gp,3g2,mj2"
_TIMED_FORMATS = ("matroska,webm", _TABLED_FORMAT, "flv")
_ENOUGH = 0.9  # of the duration; less of it is damage
_KEY, _DISCARD = 1, 2  # of FFmpeg's index entries
_NUM_PROBED = 16
_MOST_TABLES = 64 << 20  # bytes, those of many hours


@dataclass(frozen=True)
class Index:
    """What the packets of a stream say, without decoding.

    Attributes:
        times: (M,) int64, when each picture is shown, in the stream's time base, sorted.
        keys: (K,2) int64, time of presentation and of decoding of every keyframe, sorted.
        num_discarded: Packets that only help to decode others and are never shown.
        trusted: Whether pictures can be found by their times.
    """

    times: NDArray[np.int64]
    keys: NDArray[np.int64]
    num_discarded: int
    trusted: bool

    @staticmethod
    def of(
        times: NDArray[np.int64], keys: NDArray[np.int64], num_discarded: int, sound: bool
    ) -> Index:
        """The index of packets in order of decoding; `sound` says that every one had a time."""
        times = np.sort(times)
        trusted = (
            sound
            and len(times) > 0
            and len(keys) > 0
            and bool((np.diff(times) > 0).all())
            # Pictures shown before the first keyframe need something that is not in the file.
            and bool((np.diff(keys[:, 0]) > 0).all())
            and bool(keys[0, 0] <= times[0])
        )
        return Index(times, keys, num_discarded, trusted)

    def keyframe_before(self, place: int) -> int:
        """Which keyframe to decode from for the picture at a place, both counted from 0."""
        return int(np.searchsorted(self.keys[:, 0], self.times[place], side="right")) - 1


def read_index(source: Source) -> Index:
    """What the packets of the stream say: from the tables of an MP4, else from the packets.

    The latter reads the file to its end.

    Raises:
        MediaError: More than the source's guard lets pass.
    """
    index = _read_tables(source) or _read_packets(source)
    if len(index.times):
        source.check_length(len(index.times), int(index.times[0]), int(index.times[-1]))
    return index


def _read_packets(source: Source) -> Index:
    import av

    times, keys = array("q"), array("q")
    num_discarded = 0
    sound = True
    try:
        for packet in source.packets():
            if packet.size == 0:  # the end, or a picture that was dropped when recording
                continue
            sound &= packet.pts is not None and not packet.is_corrupt
            pts = packet.pts or 0
            if packet.is_keyframe:
                keys.extend((pts, packet.dts if packet.dts is not None else pts))
            sound &= bool(keys)
            if packet.is_discard:
                num_discarded += 1
            else:
                times.append(pts)
    except av.FFmpegError:
        sound = False
    pairs = np.array(keys, np.int64).reshape(-1, 2)
    return Index.of(np.array(times, np.int64), pairs, num_discarded, sound)


def _read_tables(source: Source) -> Index | None:
    """The same from a whole MP4 in one piece, without reading its pictures; else None.

    FFmpeg's index of the file, in which its edit lists are accounted for, says when pictures are
    decoded. How much later each is shown it keeps to itself, so that is read from the file. Their
    sum is right but for one number, which the first packets tell, and more than they need.
    """
    stream = source.stream
    entries = getattr(stream, "index_entries", ())  # PyAV has it since 17
    if source.container.format.name != _TABLED_FORMAT or not len(entries):
        return None
    fields = [("dts", np.int64), ("end", np.int64), ("size", np.int64), ("flags", np.int64)]
    source.check_length(len(entries), 0, 0)
    table = np.fromiter(
        ((e.timestamp, e.pos + e.size, e.size, e.flags) for e in entries), fields, len(entries)
    )
    with source.file() as file:
        whole = table["end"].max() <= file.seek(0, os.SEEK_END)
    if not whole or table["size"].min() < 1 or (table["flags"] & _DISCARD).any():
        return None
    with source.file() as file:
        delays = _read_delays(file, stream.id, len(table))
    if delays is None:
        return None
    shown = table["dts"] + delays
    origin: int | None = None
    with opened(
        source.path, source.left, guard=source.guard
    ) as probe:  # whose packets nobody else misses
        for packet, dts, pts in zip(
            islice(probe.packets(), _NUM_PROBED), table["dts"], shown, strict=False
        ):
            if packet.pts is None or packet.size == 0:
                break
            origin = packet.pts - pts if origin is None else origin
            if packet.dts != dts or packet.pts != pts + origin or packet.is_discard:
                return None
    if origin is None:
        return None
    shown += origin
    is_key = (table["flags"] & _KEY) > 0
    keys = np.stack([shown[is_key], table["dts"][is_key]], axis=1)
    return Index.of(shown, keys, 0, bool(is_key[0]))


def _read_delays(file: BufferedIOBase, track: int, count: int) -> NDArray[np.int64] | None:
    """(count,) from decoding to presentation, of each picture of an MP4's track; None if unclear.

    Args:
        file: The MP4.
        track: Its number in the file.
        count: How many pictures there must be.
    """
    movie = _read_movie(file)
    if movie is None or _box(movie, b"mvex") is not None:  # of fragments there are more tables
        return None
    for header, content in _boxes(movie):
        head = _box(content, b"tkhd") if header == b"trak" else None
        if head is None or len(head) < 24:
            continue
        if int.from_bytes(head[20:24] if head[0] else head[12:16], "big") != track:
            continue
        table = _box(content, b"mdia", b"minf", b"stbl")
        if table is None or _num_cuts(content) > 1:  # which may change the order
            return None
        delays = _box(table, b"ctts")
        if delays is None:
            return np.zeros(count, np.int64)
        runs = np.frombuffer(delays[8 : 8 + (len(delays) - 8) // 8 * 8], ">u4").reshape(-1, 2)
        if len(runs) < int.from_bytes(delays[4:8], "big") or int(runs[:, 0].sum()) != count:
            return None
        return np.repeat(runs[:, 1].astype(np.int32).astype(np.int64), runs[:, 0])
    return None


def _num_cuts(track: memoryview) -> int:
    """How many pieces of a track its edit list shows."""
    edits = _box(track, b"edts", b"elst")
    if edits is None or len(edits) < 8:
        return 1
    size = 20 if edits[0] == 1 else 12
    entries = (edits[place : place + size] for place in range(8, len(edits) - size + 1, size))
    # An empty piece, which delays what follows, begins at -1.
    return sum(entry[size // 2 - 2 : size - 4] != b"\xff" * (size // 2 - 2) for entry in entries)


def _read_movie(file: BufferedIOBase) -> memoryview | None:
    """The box with the tables; that with the pictures is skipped."""
    end = file.seek(0, os.SEEK_END)
    place = 0
    while place + 16 <= end:
        file.seek(place)
        head = file.read(16)
        size, length = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, length = int.from_bytes(head[8:], "big"), 16
        size = size or end - place
        if size < length or place + size > end:
            return None
        if head[4:8] == b"moov" and size > _MOST_TABLES:
            return None
        if head[4:8] == b"moov":
            file.seek(place + length)
            return memoryview(file.read(size - length))
        place += size
    return None


def _boxes(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yields name and content of every box of less than 4 GB, up to one that is cut off."""
    place = 0
    while place + 8 <= len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        if size < 8 or place + size > len(content):
            return
        yield bytes(content[place + 4 : place + 8]), content[place + 8 : place + size]
        place += size


def _box(content: memoryview, *path: bytes) -> memoryview | None:
    """The content of the box that is found by a name inside each box; None where there is none."""
    found: memoryview | None = content
    for name in path:
        inside = () if found is None else _boxes(found)
        found = next((inner for given, inner in inside if given == name), None)
    return found


def expected_frames(source: Source, times: NDArray[np.int64]) -> int:
    """About how many frames there must have been, by the duration that the container states.

    0 says that nothing is missing, or that it cannot be known: in a transport or program stream, a
    raw stream, a live recording, a fragmented MP4 without an index of its fragments, and in a file
    with sound which does not say how long the pictures alone are.

    Args:
        source: The file.
        times: Of the pictures that are there, in the stream's time base, sorted.
    """
    stated = _stated_seconds(source.container, source.stream)
    if stated is None or len(times) < 2:
        return 0
    # The last picture may stay as long as any other did. Counted from 0, as durations are.
    longest = int(np.diff(times).max())
    covered = (int(times[-1]) + longest) * float(source.stream.time_base or 0)
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
