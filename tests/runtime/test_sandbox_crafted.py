"""Files made to do harm: what they name stays closed, and what they claim is not allocated."""

from __future__ import annotations

import ctypes
import math
import os
import re
import struct
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import av
import pytest

from crafted import jpeg_claiming, vp9_claiming, write_h264, write_long, write_png
from ppllava_engines.errors import MediaError
from ppllava_runtime.choosing import Sample
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.local import LOCAL
from ppllava_runtime.sandbox import Sandbox
from ppllava_runtime.watching import Opener
from tiny_videos import numbered_frames, write_video

HUGE = (16384, 8192)
SMALL = (64, 48)
MOST_MEMORY = 512 << 20
FRAMES = numbered_frames(12, *SMALL)

# Texts that FFmpeg takes for videos elsewhere; TARGET is a video beside them, ROOT their folder.
TEXTS = {
    "list.m3u8": (
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.48,\nTARGET\n#EXT-X-ENDLIST\n"
    ),
    "absolute.m3u8": (
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.48,\nfile://ROOT/TARGET\n#EXT-X-ENDLIST\n"
    ),
    "master.m3u8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9\nlist.m3u8\n",
    "subfile.m3u8": (
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
        "concat:ROOT/TARGET|subfile,,start,0,end,64,,:ROOT/TARGET\n#EXT-X-ENDLIST\n"
    ),
    "list.ffconcat": "ffconcat version 1.0\nfile 'TARGET'\n",
    "absolute.ffconcat": "ffconcat version 1.0\nfile 'ROOT/TARGET'\n",
    "a.mpd": (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4">'
        '<Representation id="0" bandwidth="9"><BaseURL>TARGET</BaseURL>'
        '<SegmentList><SegmentURL media="TARGET"/></SegmentList>'
        "</Representation></AdaptationSet></Period></MPD>"
    ),
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 9 RTP/AVP 96\n",
    "a.idx": "# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\n",
    "a.rtsp": "RTSPtextRTSP://ROOT/TARGET\n",
    "a.asx": '<asx version="3.0"><entry><ref href="file://ROOT/TARGET"/></entry></asx>',
    "a.svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="ROOT/TARGET"/></svg>',
    "a.ffmetadata": ";FFMETADATA1\ntitle=TARGET\n",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opener:
        yield opener


class Watch:
    """Notes whether anybody opens a file, this process or another.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        opened = 0x20
        assert libc.inotify_add_watch(self._descriptor, os.fsencode(path), opened) > 0

    def opened(self) -> bool:
        """Whether somebody did since this was last asked."""
        with suppress(BlockingIOError):
            return bool(os.read(self._descriptor, 4096))
        return False

    def close(self) -> None:
        os.close(self._descriptor)


def decoded(opener: Opener, path: Path, num_frames: int = 4) -> int:
    """How many pictures come of a file."""
    if opener.still(path, Leaving()) is not None:
        return 1
    with closing(opener.clip(path, Sample(num_frames), 56, Leaving())) as frames:
        return len({row for rows, _, _ in frames for row in rows})


def refused(sandbox: Sandbox, path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        decoded(sandbox, path)
    assert str(path) in str(caught.value)
    return str(caught.value)


class TestAPlaylist:
    @pytest.mark.parametrize("suffix", ["", ".mp4"])
    def test_opens_nothing(self, sandbox: Sandbox, tmp_path: Path, suffix: str) -> None:
        target = write_video(tmp_path / "target.ts", FRAMES)
        for name, text in TEXTS.items():
            text = text.replace("TARGET", target.name).replace("ROOT", str(tmp_path))
            (tmp_path / f"{name}{suffix}").write_text(text)
        with closing(Watch(target)) as watch:
            for name in TEXTS:
                refused(sandbox, tmp_path / f"{name}{suffix}")
            assert not watch.opened()
            # FFmpeg by itself does open it.
            with av.open(str(tmp_path / f"list.ffconcat{suffix}")):
                assert watch.opened()

    def test_of_tracks_elsewhere_opens_nothing(self, sandbox: Sandbox, tmp_path: Path) -> None:
        target = write_video(tmp_path / "target.mov", FRAMES, codec="mjpeg")
        content = target.read_bytes()
        # The table of references, whose only one says "in this file", becomes one that names it.
        name = os.fsencode(target)
        padding = bytes(len(name) % 2)
        absolute_path, end = b"\0\2", b"\xff\xff\0\0"
        alias = bytes(150) + absolute_path + len(name).to_bytes(2, "big") + name + padding + end
        entry = (len(alias) + 12).to_bytes(4, "big") + b"alis" + bytes(4) + alias
        before = content.index(b"dref") - 4
        size = int.from_bytes(content[before : before + 4], "big")
        table = (16 + len(entry)).to_bytes(4, "big") + b"dref" + bytes(4) + b"\0\0\0\1" + entry
        changed = bytearray(content[:before] + table + content[before + size :])
        for box in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):
            place = changed.index(box) - 4
            grown = int.from_bytes(changed[place : place + 4], "big") + len(table) - size
            changed[place : place + 4] = grown.to_bytes(4, "big")
        path = tmp_path / "elsewhere.mov"
        path.write_bytes(changed)
        with closing(Watch(target)) as watch:
            with suppress(MediaError):
                decoded(sandbox, path)
            assert not watch.opened()
            options = {"enable_drefs": "1", "use_absolute_path": "1"}
            with suppress(av.FFmpegError), av.open(str(path), options=options):
                pass
            assert watch.opened()


class TestATooLarge:
    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".flv"])
    def test_h264_is_not_decoded(self, sandbox: Sandbox, tmp_path: Path, suffix: str) -> None:
        path = write_h264(tmp_path / f"clip{suffix}", [HUGE], SMALL)
        assert "it is 16384×8192, expected at most 9437184 pixels" in refused(sandbox, path)
        assert sandbox.peak_bytes <= MOST_MEMORY

    def test_vp9_or_mjpeg_is_not_decoded(self, sandbox: Sandbox, tmp_path: Path) -> None:
        for suffix, codec, change in (
            ("webm", "libvpx-vp9", vp9_claiming),
            ("mov", "mjpeg", jpeg_claiming),
            ("avi", "mjpeg", jpeg_claiming),
        ):
            path = write_video(tmp_path / f"clip.{suffix}", FRAMES, codec=codec)
            assert decoded(sandbox, path) == 4
            before = path.read_bytes()
            path.write_bytes(change(before, *HUGE))
            assert path.read_bytes() != before
            assert re.search("it is 16384×8192|no frame that can be dec", refused(sandbox, path))
        assert sandbox.peak_bytes <= MOST_MEMORY

    @pytest.mark.parametrize("suffix", [".mp4", ".ts"])
    def test_part_of_a_video_is_not_decoded(
        self, sandbox: Sandbox, tmp_path: Path, suffix: str
    ) -> None:
        path = write_h264(tmp_path / f"clip{suffix}", [SMALL, HUGE], SMALL)
        with suppress(MediaError):  # where the container says it first
            assert decoded(sandbox, path) <= 4
        assert sandbox.peak_bytes <= MOST_MEMORY

    def test_picture_is_not_decoded(self, sandbox: Sandbox, tmp_path: Path) -> None:
        path = write_png(tmp_path / "a.png", *HUGE)
        assert "it is 16384×8192, expected at most 9437184 pixels" in refused(sandbox, path)
        path = write_png(tmp_path / "bomb.png", 64_000, 64_000)
        assert "pixels" in refused(sandbox, path)
        path = write_png(tmp_path / "more.png", 400, 300, 256 << 20)
        assert decoded(sandbox, path) == 1
        assert sandbox.peak_bytes <= MOST_MEMORY

    def test_canvas_is_not_allocated(self, sandbox: Sandbox, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.gif", FRAMES[:3], codec="gif")
        content = bytearray(path.read_bytes())
        content[6:10] = b"\xff" * 4
        path.write_bytes(content)
        refused(sandbox, path)
        assert sandbox.peak_bytes <= MOST_MEMORY

    def test_file_is_not_opened(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.mp4", FRAMES)
        most = path.stat().st_size
        with Sandbox(MediaLimits(num_bytes=most)) as sandbox:
            assert decoded(sandbox, path) == 4
        with Sandbox(MediaLimits(num_bytes=most - 1)) as sandbox:
            assert f"{most} bytes, expected at most {most - 1}" in refused(sandbox, path)


def test_another_size_on_the_way_is_as_it_is_here(sandbox: Sandbox, tmp_path: Path) -> None:
    for suffix in (".mp4", ".ts"):
        path = write_h264(tmp_path / f"clip{suffix}", [SMALL, (96, 64)], SMALL)
        shown: list[list[bytes]] = []
        for opener in (sandbox, LOCAL):
            with closing(opener.clip(path, Sample(6), 56, Leaving())) as frames:
                shown.append([square.tobytes() for _, square, _ in frames])
        assert len(shown[0]) >= 6
        assert shown[0] == shown[1]


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """216,000 frames, of which all must be decoded for the last."""
    return write_long(tmp_path_factory.mktemp("long") / "hour.mp4", 216_000)


class TestAVeryLong:
    def test_video_is_decoded(self, sandbox: Sandbox, hour: Path) -> None:
        with closing(sandbox.clip(hour, Sample(4, None, 0, 60), 56, Leaving())) as frames:
            assert len(list(frames)) == 4
            assert frames.info.num_frames == 216_000
        assert sandbox.peak_bytes <= MOST_MEMORY

    @pytest.mark.parametrize(
        ("limits", "reason"),
        [
            (MediaLimits(num_frames=200_000), "216000 frames or more, expected at most 200000"),
            (MediaLimits(seconds=3599), "it lasts 3600 s, expected at most 3599"),
            (MediaLimits(wall_seconds=0.05), "takes more than 0.05 s"),
            (MediaLimits(cpu_seconds=1), "takes more than 1 s of a processor's time"),
            (MediaLimits(address_space=1 << 20), "broke its decoder|of memory"),
        ],
        ids=["frames", "seconds", "wall", "cpu", "memory"],
    )
    def test_video_is_refused_by_its_limit(
        self, hour: Path, limits: MediaLimits, reason: str
    ) -> None:
        with (
            Sandbox(limits) as sandbox,
            closing(sandbox.clip(hour, Sample(4), 56, Leaving())) as frames,
            pytest.raises(MediaError, match=reason),
        ):
            list(frames)

    def test_video_of_packets_is_refused_too(self, tmp_path: Path) -> None:
        for suffix in (".mkv", ".avi"):
            path = write_long(tmp_path / f"clip{suffix}", 400)
            with Sandbox(MediaLimits(num_frames=399)) as sandbox:
                assert "frames or more, expected at most 399" in refused(sandbox, path)
            with Sandbox(MediaLimits(num_frames=400)) as sandbox:
                assert decoded(sandbox, path) == 4


def test_as_large_as_may_be_fits_into_its_memory(tmp_path: Path) -> None:
    path = write_h264(tmp_path / "clip.ts", [(4096, 2304)], SMALL)
    with Sandbox() as sandbox:
        assert decoded(sandbox, path, 6) == 6
        # At least the pictures that others refer to and one in colours were in use.
        assert 100 << 20 < sandbox.peak_bytes <= MOST_MEMORY


def test_much_memory_is_told(tmp_path: Path) -> None:
    path = write_h264(tmp_path / "clip.mp4", [(2048, 1536)], SMALL)
    with Sandbox(MediaLimits(address_space=250 << 20)) as sandbox:
        assert re.search("more than 250 MiB of memory|broke its decoder", refused(sandbox, path))
    with Sandbox() as sandbox:
        assert decoded(sandbox, path) > 0


@pytest.mark.parametrize("milliseconds", [0.0, -1.0, 1e15, math.inf, math.nan])
def test_no_duration_or_an_endless_one(
    sandbox: Sandbox, tmp_path: Path, milliseconds: float
) -> None:
    path = write_video(tmp_path / "a.mkv", FRAMES)
    content = bytearray(path.read_bytes())
    place = content.index(b"\x44\x89\x88") + 3
    content[place : place + 8] = struct.pack(">d", milliseconds)
    path.write_bytes(content)
    if milliseconds == 1e15:
        assert "s, expected at most 14400" in refused(sandbox, path)
    else:
        assert decoded(sandbox, path) == 4


def test_a_cover_is_no_video(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = *SMALL, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(FRAMES[0], format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
    assert "it has no video stream" in refused(sandbox, path)
