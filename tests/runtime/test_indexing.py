"""What an MP4's tables say is what its packets say."""

from __future__ import annotations

import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import Any

import av
import numpy as np
import pytest

from ppllava_runtime.decoding import Left, Source, opened
from ppllava_runtime.indexing import Index, read_index
from ppllava_runtime.video import read_clip
from tiny_videos import decode_all, numbered_frames, read_number, write_video

FRAMES = numbered_frames(60)
UNEVEN = [2 * i + (i % 3 == 0) for i in range(60)]


def packets_read(source: Source) -> int:
    """How many packets can still be read from where it stands."""
    return sum(packet.size > 0 for packet in source.packets())


def indexed(path: Path) -> tuple[Index, bool]:
    """The index of a file, and whether its packets were left alone."""
    with opened(path, Event()) as source:
        index = read_index(source)
        return index, packets_read(source) > 0


def from_packets(path: Path) -> tuple[list[int], list[tuple[int, int]]]:
    """Times of pictures and of keyframes, out of the packets alone."""
    with av.open(str(path)) as container:
        packets: list[Any] = [packet for packet in container.demux(video=0) if packet.size]
    times = sorted(packet.pts for packet in packets if not packet.is_discard)
    keys = [packet for packet in packets if packet.is_keyframe]
    return times, [(key.pts, key.pts if key.dts is None else key.dts) for key in keys]


def assert_same_as_packets(path: Path, *, tables: bool) -> Index:
    index, untouched = indexed(path)
    times, keys = from_packets(path)
    assert index.times.tolist() == times
    assert list(map(tuple, index.keys.tolist())) == keys
    assert untouched == tables
    return index


@pytest.mark.parametrize("times", [None, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("name", "options", "movflags", "tables"),
    [
        ("b.mp4", {"g": "12", "bf": "3"}, "", True),
        ("none.mp4", {"g": "12", "bf": "0"}, "", True),
        ("open.mp4", {"x264-params": "open-gop=1:bframes=3:keyint=12"}, "", True),
        ("fast.mov", {"g": "12", "bf": "3"}, "faststart", True),
        ("negative.mp4", {"g": "12", "bf": "3"}, "negative_cts_offsets", True),
        ("fragments.mp4", {"g": "12", "bf": "3"}, "frag_keyframe+empty_moov", False),
        ("begun.mp4", {"g": "12", "bf": "3"}, "frag_keyframe", False),
        ("b.mkv", {"g": "12", "bf": "3"}, None, False),
    ],
)
def test_is_what_the_packets_say(
    tmp_path: Path,
    name: str,
    options: dict[str, str],
    movflags: str | None,
    tables: bool,
    times: list[int] | None,
) -> None:
    path = write_video(
        tmp_path / name,
        FRAMES,
        options=options,
        times=times,
        audio=True,
        container_options={"movflags": movflags} if movflags else {},
    )
    assert assert_same_as_packets(path, tables=tables).trusted


def test_of_an_edit_list_that_cuts_is_the_packets(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "clip.mp4", FRAMES, options={"g": "12"}, times=list(range(-7, 53))
    )
    assert len(assert_same_as_packets(path, tables=False).times) == 53


def test_of_an_edit_list_that_delays_is_the_tables(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", FRAMES, times=[i + 30 for i in range(60)], audio=True)
    index = assert_same_as_packets(path, tables=True)
    with opened(path, Event()) as source:
        assert index.times[0] * source.stream.time_base == Fraction(30, 25)


def test_of_an_edit_list_in_another_order_is_the_packets(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", FRAMES, options={"g": "12", "bf": "0"})
    data = bytearray(path.read_bytes())
    lists = data.index(b"elst") - 4
    scale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    cuts = [(1200, scale * 30 // 25), (1200, 0)]  # the second half, then the first
    entries = b"".join(struct.pack(">IiI", *cut, 1 << 16) for cut in cuts)
    old = struct.unpack_from(">I", data, lists)[0]
    data[lists + 12 : lists + old] = struct.pack(">I", 2) + entries
    for name in (b"elst", b"edts", b"trak", b"moov"):
        place = data.index(name) - 4
        (size,) = struct.unpack_from(">I", data, place)
        struct.pack_into(">I", data, place, size + 16 + len(entries) - old)
    path.write_bytes(data)
    assert not indexed(path)[1]
    sequence = [frame.to_ndarray(format="rgb24") for frame in decode_all(path)]
    clip = read_clip(path, 7)
    assert clip.info.num_frames == len(sequence)
    for place, frame in zip(clip.info.indices, clip.frames, strict=True):
        np.testing.assert_array_equal(frame, sequence[place])


def test_of_what_is_cut_off_is_the_packets(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", FRAMES, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-100])
    index, untouched = indexed(path)
    assert not untouched
    assert len(index.times) in (59, 60)


@pytest.mark.parametrize("change", ["count", "size", "name"])
def test_of_tables_that_lie_is_the_packets(tmp_path: Path, change: str) -> None:
    path = write_video(tmp_path / "clip.mp4", FRAMES, options={"g": "12", "bf": "3"})
    data = bytearray(path.read_bytes())
    place = data.index(b"ctts")
    if change == "count":  # one run of delays is a picture longer
        data[place + 15] += 1
    elif change == "size":
        data[place - 4 : place] = (7).to_bytes(4, "big")
    else:
        data[place : place + 4] = b"free"
    path.write_bytes(data)
    try:
        times, _ = from_packets(path)
    except av.FFmpegError:
        return
    index, _ = indexed(path)
    assert index.times.tolist() == times


def test_of_real_clips_is_what_the_packets_say(real: Path) -> None:
    for path in sorted(real.glob("*.m*")):
        if path.suffix in (".mp4", ".mov", ".mkv") and path.name != "corrupted.mp4":
            index, _ = indexed(path)
            times, keys = from_packets(path)
            assert index.times.tolist() == times
            assert list(map(tuple, index.keys.tolist())) == keys


def test_leaves_out_what_nobody_needs(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", FRAMES, options={"g": "60", "bf": "3"})
    clip = read_clip(path, 1, start=2.2, end=2.2)
    assert [read_number(frame) for frame in clip.frames] == [55]
    assert clip.info.num_decoded < 40  # of 56 up to there, of which most are made of others


def test_ends_when_nobody_waits(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", FRAMES)
    left = Event()
    with opened(path, left) as source:
        left.set()
        with pytest.raises(Left):
            read_index(source)


@pytest.mark.parametrize(("suffix", "most"), [("mkv", 4), ("mp4", 10)])
def test_a_picture_takes_a_few_numbers_of_memory(tmp_path: Path, suffix: str, most: int) -> None:
    """A time as it is collected, put into an array and sorted; of tables, four columns as well.

    That is less than a Python number in a list takes beside them: 40 bytes.
    """
    short, long = 200, 1200
    peaks = []
    for count in (short, long):
        frames = np.zeros((count, 16, 16, 3), np.uint8)
        path = write_video(tmp_path / f"{count}.{suffix}", frames, codec="mpeg4")
        with opened(path, Event()) as source:
            tracemalloc.start()
            try:
                index = read_index(source)
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
        assert len(index.times) == count
    assert (peaks[1] - peaks[0]) / (long - short) <= 8 * most
