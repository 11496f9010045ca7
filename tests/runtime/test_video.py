"""Exactly the right frames out of any file."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ppllava_engines.errors import UsageError
from ppllava_runtime.video import Clip, choose_frames, read_clip
from tiny_videos import decode_all, numbered_frames, read_number, write_video

FRAMES = numbered_frames(60)
SPANS = ((1, None, None), (8, None, None), (3, 0.9, 1.1), (5, 2.0, None), (80, None, 1.0))


def assert_same_as_decoding_all(path: Path, *, numbered: bool = True) -> list[Clip]:
    sequence = [frame.to_ndarray(format="rgb24") for frame in decode_all(path)]
    clips = []
    for num_frames, start, end in SPANS:
        if start is not None and round(start * 25) >= len(sequence):
            continue
        clip = read_clip(path, num_frames, start, end)
        assert clip.info.num_frames == len(sequence)
        assert len(clip.frames) == num_frames == len(clip.info.timestamps)
        for index, frame in zip(clip.info.indices, clip.frames, strict=True):
            np.testing.assert_array_equal(frame, sequence[index])
            assert not numbered or read_number(frame) == index
        clips.append(clip)
    return clips


class TestChoice:
    def test_is_the_rule_of_the_published_model(self) -> None:
        # Worked out by hand: seg = 9/4 = 2.25, int(1.125 + round(2.25 i)), round half to even.
        assert choose_frames(10, 4) == (1, 3, 5, 8)
        # seg = 2.5 and round(2.5) = 2, round(7.5) = 8.
        assert choose_frames(11, 4) == (1, 3, 6, 9)
        assert choose_frames(1, 3) == (0, 0, 0)

    def test_repeats_frames_of_a_video_shorter_than_the_choice(self) -> None:
        # seg = 2/8, and 0.125 + round(0.25 i).
        assert choose_frames(3, 8) == (0, 0, 0, 1, 1, 1, 2, 2)

    def test_stays_in_the_span(self) -> None:
        # round(1.02 * 25) = round(25.5) = 26, round(2 * 25) = 50, seg = 24 / 4.
        assert choose_frames(100, 4, 25, 1.02, 2) == (29, 35, 41, 47)
        assert choose_frames(100, 2, 25, 3, 1000) == (81, 93)
        assert choose_frames(100, 2, 25, 1, 1) == (25, 25)

    @given(
        num_frames=st.integers(1, 5000),
        num_chosen=st.integers(1, 64),
        fps=st.floats(1, 120),
        start=st.none() | st.floats(0, 100),
        length=st.none() | st.floats(0, 100),
    )
    def test_is_in_order_and_in_range(
        self,
        num_frames: int,
        num_chosen: int,
        fps: float,
        start: float | None,
        length: float | None,
    ) -> None:
        end = None if length is None else (start or 0) + length
        try:
            chosen = choose_frames(num_frames, num_chosen, fps, start, end)
        except UsageError:
            assert start is not None
            assert round(start * fps) > num_frames - 1
            return
        assert len(chosen) == num_chosen
        assert list(chosen) == sorted(chosen)
        assert chosen[0] >= round((start or 0) * fps)
        assert chosen[-1] <= num_frames - 1

    @pytest.mark.parametrize(
        ("num_chosen", "start", "end", "sentence"),
        [
            (0, None, None, "frames is 0, expected 1 or more"),
            (4, -1, None, "the span starts at -1 s, expected 0 or more"),
            (4, float("nan"), None, "the span starts at nan s, expected 0 or more"),
            (4, 2, 1, "the span ends at 1 s, expected its start 2 s or more"),
            (4, 9, None, "the span starts at 9 s, but the last frame of the video is at 3.96 s"),
        ],
    )
    def test_refuses(
        self, num_chosen: int, start: float | None, end: float | None, sentence: str
    ) -> None:
        with pytest.raises(UsageError) as caught:
            choose_frames(100, num_chosen, 25, start, end)
        assert str(caught.value) == sentence


class TestFrames:
    @pytest.mark.parametrize(
        ("name", "codec", "options"),
        [
            ("one_gop.mp4", "libx264", {"g": "250", "bf": "3"}),
            ("many_gops.mp4", "libx264", {"g": "12", "bf": "3"}),
            ("open_gops.mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12"}),
            ("open_gops.mkv", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12"}),
            ("open_gops.ts", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12"}),
            ("fields.mp4", "libx264", {"x264-params": "interlaced=1:bframes=3:keyint=12"}),
            ("pyramid.mp4", "libx264", {"x264-params": "bframes=7:b-pyramid=normal:ref=6"}),
            ("strict.ts", "libx264", {"x264-params": "bframes=3:b-pyramid=strict:keyint=30"}),
            ("no_keyframes.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=20"}),
            ("flash.flv", "libx264", {"g": "12", "bf": "3"}),
            ("no_times.h264", "libx264", {"g": "12", "bf": "3"}),
            ("old.avi", "mpeg4", {"g": "12", "bf": "2"}),
            ("broadcast.ts", "mpeg2video", {"g": "12", "bf": "2"}),
            ("motion.avi", "mjpeg", {}),
            ("drawing.gif", "gif", {}),
            ("hidden.webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10"}),
            ("new.mp4", "libx265", {"x265-params": "keyint=12:open-gop=1:log-level=none"}),
        ],
    )
    def test_are_those_of_decoding_all(
        self, tmp_path: Path, name: str, codec: str, options: dict[str, str]
    ) -> None:
        path = write_video(tmp_path / name, FRAMES, codec=codec, options=options)
        assert_same_as_decoding_all(path)

    def test_with_uneven_times_carry_their_own(self, tmp_path: Path) -> None:
        times = [2 * i + (i % 3 == 0) for i in range(60)]
        path = write_video(tmp_path / "clip.mp4", FRAMES, options={"g": "12"}, times=times)
        for clip in assert_same_as_decoding_all(path):
            expected = [(times[index] - times[0]) / 25 for index in clip.info.indices]
            np.testing.assert_allclose(clip.info.timestamps, expected, atol=1e-9)

    def test_before_an_edit_list_begins_do_not_count(self, tmp_path: Path) -> None:
        times = list(range(-7, 53))
        path = write_video(tmp_path / "clip.mp4", FRAMES, options={"g": "12"}, times=times)
        clip = assert_same_as_decoding_all(path, numbered=False)[0]
        assert clip.info.num_frames == 53
        assert clip.info.damage is None

    def test_are_found_by_seeking(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "clip.mp4", FRAMES, options={"g": "6", "bf": "0"})
        info = read_clip(path, 4).info
        assert info.num_decoded == sum(index % 6 + 1 for index in info.indices)

    def test_are_not_all_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_video(tmp_path / "clip.mp4", FRAMES, options={"g": "250"})
        converted: list[av.VideoFrame] = []

        def convert(frame: av.VideoFrame, width: int, height: int) -> np.ndarray[Any, Any]:
            converted.append(frame)
            return np.zeros((height, width, 3), np.uint8)

        monkeypatch.setattr("ppllava_runtime.video.upright", convert)
        read_clip(path, 5)
        assert len(converted) == 5

    def test_are_kept_once(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "clip.mp4", FRAMES)
        read_clip(path, 1)  # brings in what is only imported when needed
        tracemalloc.start()
        try:
            frames = read_clip(path, 60).frames
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1.5 * frames.nbytes

    def test_come_with_times_and_rate(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "clip.mp4", FRAMES, fps=10, audio=True)
        info = read_clip(path, 3, start=1).info
        assert info.fps == 10
        # round(1 · 10) = 10, last 59, seg = 49/3: int(8.17 + round(16.33 i)).
        assert info.indices == (18, 34, 51)
        np.testing.assert_allclose(info.timestamps, [1.8, 3.4, 5.1])

    # Where the nine numbers send a pixel, and what a player's turn is in numpy's words.
    @pytest.mark.parametrize(
        ("a", "b", "c", "d", "turn"),
        [
            (0, 1, -1, 0, lambda x: np.rot90(x, -1)),
            (0, -1, 1, 0, lambda x: np.rot90(x, 1)),
            (-1, 0, 0, -1, lambda x: np.rot90(x, 2)),
            (-1, 0, 0, 1, np.fliplr),
            (1, 0, 0, -1, np.flipud),
            (0, 1, 1, 0, lambda x: x.transpose(1, 0, 2)),
            (0, -1, -1, 0, lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
        ],
    )
    def test_are_turned_upright(
        self, tmp_path: Path, a: int, b: int, c: int, d: int, turn: Callable[[Any], Any]
    ) -> None:
        one = 1 << 16
        matrix = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
        plain = read_clip(write_video(tmp_path / "plain.mp4", FRAMES[:9]), 2).frames
        path = write_video(tmp_path / "turned.mp4", FRAMES[:9], display_matrix=matrix)
        turned = read_clip(path, 2).frames
        np.testing.assert_array_equal(turned, np.stack([turn(frame) for frame in plain]))

    def test_are_turned_upright_by_the_exif_of_each(self, tmp_path: Path) -> None:
        path, exif = tmp_path / "clip.mjpeg", Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise
        with path.open("wb") as stream:
            for frame in FRAMES[:4]:
                Image.fromarray(frame).save(stream, "JPEG", exif=exif, quality=95)
        clip = read_clip(path, 4)
        assert not clip.info.is_still
        numbers = [read_number(np.rot90(frame)) for frame in clip.frames]
        assert numbers == list(clip.info.indices)

    def test_of_real_clips_are_those_of_decoding_all(self, real: Path) -> None:
        counts = {
            "av1_video.mkv": 125,
            "h264_10bits.mp4": 30,
            "h265_video.mp4": 10,
            "nasa_13013.mp4": 325,
            "unordered.mov": 4,
        }
        for name, count in counts.items():
            for clip in assert_same_as_decoding_all(real / name, numbered=False):
                assert clip.info.num_frames == count
                assert clip.info.damage is None

    def test_of_real_phones_are_upright(self, real: Path) -> None:
        # Three shots of one keyboard, held three ways: the letters must stand on their feet, and
        # the light falls from the top left in all three.
        for name, turns in (("video_0", 0), ("video_90", -1), ("video_270", 1)):
            path = real / f"{name}.mov"
            expected = [
                np.rot90(frame.to_ndarray(format="rgb24"), turns) for frame in decode_all(path)
            ]
            np.testing.assert_array_equal(read_clip(path, 3).frames[0], expected[0])
