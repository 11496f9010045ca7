"""Damage costs the frames that it hits and is told; what is no video is one clear sentence."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from ppllava_engines.errors import (
    DataError,
    NotFoundError,
    PPLLaVAError,
    StorageError,
    UnavailableError,
)
from ppllava_runtime.video import read_clip
from tiny_videos import numbered_frames, read_number, write_audio, write_video

FRAMES = numbered_frames(60)


class TestDamage:
    def test_in_the_middle_costs_what_it_hits(self, real: Path) -> None:
        clip = read_clip(real / "corrupted.mp4", 8)
        assert clip.info.num_frames == 49
        assert clip.info.damage is not None
        assert clip.info.damage.endswith(
            "only 49 of its 50 frames can be decoded, the rest is lost"
        )

    def test_at_the_end_costs_the_end(self, tmp_path: Path) -> None:
        whole = write_video(
            tmp_path / "whole.mp4",
            FRAMES,
            options={"g": "12"},
            container_options={"movflags": "faststart"},
        ).read_bytes()
        path = tmp_path / "half.mp4"
        path.write_bytes(whole[: len(whole) * 6 // 10])
        clip = read_clip(path, 4)
        assert 10 < clip.info.num_frames < 50
        assert [read_number(frame) for frame in clip.frames] == list(clip.info.indices)
        assert clip.info.damage == (
            f"video {path}: only {clip.info.num_frames} of its 60 frames can be decoded, the rest "
            "is lost"
        )

    @pytest.mark.parametrize(
        ("name", "codec", "options", "told"),
        [
            ("clip.mkv", "libx264", {}, True),
            ("clip.webm", "libvpx", {}, True),
            ("clip.flv", "libx264", {}, True),
            (
                "indexed.mp4",
                "libx264",
                {"movflags": "frag_keyframe+empty_moov+default_base_moof+global_sidx"},
                True,
            ),
            ("fragments.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}, False),
            ("live.mkv", "libx264", {"live": "1"}, False),
            ("clip.ts", "libx264", {}, False),
            ("clip.mpg", "mpeg2video", {}, False),
        ],
    )
    @pytest.mark.parametrize("times", [None, [3 * i + i % 2 for i in range(60)]])
    def test_is_estimated_where_only_a_duration_is_stated(
        self,
        tmp_path: Path,
        name: str,
        codec: str,
        options: dict[str, str],
        told: bool,
        times: list[int] | None,
    ) -> None:
        path = write_video(
            tmp_path / name,
            FRAMES,
            codec=codec,
            options={"g": "12", "bf": "0"},
            times=times,
            container_options=options,
        )
        assert read_clip(path, 4).info.damage is None
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 6 // 10])
        info = read_clip(path, 4).info
        assert 20 < info.num_frames < 50
        if not told:
            assert "about" not in str(info.damage)
            return
        sentence = re.fullmatch(
            rf"video .*: only {info.num_frames} of about (\d+) frames can be decoded, the rest is "
            "lost",
            str(info.damage),
        )
        assert sentence
        assert 54 <= int(sentence[1]) <= 66

    def test_is_not_seen_in_a_longer_sound(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "clip.mkv", FRAMES[:9], audio=True)
        assert read_clip(path, 4).info.damage is None

    def test_is_not_seen_in_a_last_picture_that_stays(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "clip.mkv", FRAMES[:4], times=[0, 50, 100, 150])
        assert read_clip(path, 4).info.damage is None

    def test_in_the_count_is_told(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "lie.avi", FRAMES, codec="mjpeg")
        data = bytearray(path.read_bytes())
        struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, 500)
        path.write_bytes(data)
        clip = read_clip(path, 4)
        assert clip.info.num_frames == 60
        assert str(clip.info.damage).endswith(
            "only 60 of its 500 frames can be decoded, the rest is lost"
        )

    def test_in_the_rate_is_mended(self, tmp_path: Path) -> None:
        # Matroska keeps times in milliseconds and here no duration of a frame.
        path = write_video(tmp_path / "clip.mkv", FRAMES[:20], times=[i * 50 for i in range(20)])
        assert read_clip(path, 2).info.fps == pytest.approx(0.5)


def _text(path: Path) -> None:
    path.write_text("This is not a video.\n" * 99, encoding="utf-8")


def _cut_before_its_index(path: Path) -> None:
    data = write_video(path, FRAMES).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _garbage(path: Path) -> None:
    data = bytearray(write_video(path, FRAMES).read_bytes())
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[begin:end] = np.random.default_rng(0).bytes(end - begin)
    path.write_bytes(data)


def _unknown_codec(path: Path) -> None:
    data = write_video(path, FRAMES[:9]).read_bytes()
    path.write_bytes(data.replace(b"avc1\0\0\0", b"zzzz\0\0\0"))


CANNOT_READ = "not a video that can be read (Invalid data found when processing input)"


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "kind", "sentence"),
        [
            (_text, DataError, CANNOT_READ),
            (lambda path: path.write_bytes(b""), DataError, CANNOT_READ),
            (_cut_before_its_index, DataError, CANNOT_READ),
            (write_audio, DataError, "it has no video stream (there is audio)"),
            (
                lambda path: write_video(path, FRAMES[:0]),
                DataError,
                "it has no video stream (there is no stream)",
            ),
            (
                lambda path: write_video(
                    path, FRAMES[:0], container_options={"movflags": "empty_moov"}
                ),
                DataError,
                "it holds no frame that can be decoded",
            ),
            (_garbage, DataError, "it holds no frame that can be decoded"),
            (_unknown_codec, UnavailableError, "FFmpeg here has no decoder for its codec"),
            (lambda _: None, NotFoundError, "no such file"),
            (lambda path: path.mkdir(), DataError, "not a file"),
        ],
    )
    def test_is_one_clear_sentence(
        self,
        tmp_path: Path,
        make: Callable[[Path], object],
        kind: type[PPLLaVAError],
        sentence: str,
    ) -> None:
        path = tmp_path / "clip.mp4"
        make(path)
        with pytest.raises(kind) as caught:
            read_clip(path, 4)
        assert type(caught.value) is kind
        assert str(caught.value) == f"video {path}: {sentence}"

    def test_music_with_a_cover_is_no_video(self, tmp_path: Path) -> None:
        path = tmp_path / "song.mp4"
        with av.open(str(path), "w") as container:
            cover: Any = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            picture = av.VideoFrame.from_ndarray(FRAMES[0], format="rgb24")
            container.mux(cover.encode(picture))
            container.mux(cover.encode(None))
        with pytest.raises(DataError, match="it has no video stream"):
            read_clip(path, 4)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
    def test_without_permission(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "clip.mp4", FRAMES[:3])
        path.chmod(0)
        with pytest.raises(StorageError, match="no permission to read it"):
            read_clip(path, 4)

    def test_a_name_is_never_a_protocol(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_video(Path("clip.mp4"), FRAMES[:9]).rename("concat:clip.mp4")
        assert read_clip("concat:clip.mp4", 2).info.num_frames == 9
