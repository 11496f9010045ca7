"""So many frames a second: how many that is, and which."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppllava_engines.errors import UsageError
from ppllava_runtime import Assistant, MemoryStore
from ppllava_runtime.choosing import Sample, choose_frames
from ppllava_runtime.video import ChosenFrames
from tiny_videos import numbered_frames, write_video


class TestSample:
    @pytest.mark.parametrize(
        ("asked", "count"),
        [
            ({"fps": 2.0}, 20),
            ({"fps": 2.0, "num_frames": 50}, 20),
            ({"fps": 2.0, "num_frames": 6}, 6),
            ({"fps": 2.0, "num_frames": 6, "most": 4}, 4),
            ({"fps": 2.0, "most": 8}, 8),
            ({"fps": 0.001}, 1),
            ({"fps": 25.0}, 250),
            ({"fps": 1e300}, 250),  # of no use more than once
            ({"num_frames": 300}, 300),  # but that is what was asked for
            ({"num_frames": 300, "most": 7}, 7),
            ({}, 250),
            ({"most": 9}, 9),
            ({"fps": 2.0, "start": 6.0}, 8),
            ({"fps": 2.0, "start": 6.0, "end": 7.96}, 4),
            ({"fps": 2.0, "start": 6.0, "end": 6.0}, 1),
        ],
    )
    def test_of_ten_seconds_is_so_many(self, asked: dict[str, Any], count: int) -> None:
        span = [asked.get(name) for name in ("start", "end")]
        expected = choose_frames(250, count, 25, *span) if count != 250 else tuple(range(250))
        assert Sample(**asked).indices(250, 25) == expected

    @given(
        num_frames=st.integers(1, 5000),
        file_fps=st.floats(1e-3, 1e3),
        fps=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        most=st.integers(1, 64),
    )
    def test_at_a_rate_has_no_frame_twice(
        self, num_frames: int, file_fps: float, fps: float, most: int
    ) -> None:
        indices = Sample(fps=fps, most=most).indices(num_frames, file_fps)
        assert 1 <= len(indices) == len(set(indices)) <= most
        assert set(indices) <= set(range(num_frames))

    @pytest.mark.parametrize("sample", [Sample(fps=30.0, most=64), Sample(most=64), Sample(8)])
    def test_of_a_fixed_number_is_the_same_where_it_was_so_many_anyway(
        self, sample: Sample
    ) -> None:
        assert sample.indices(8, 10, 8) == sample.indices(8, 10)

    @pytest.mark.parametrize("sample", [Sample(fps=30.0, most=64), Sample(most=64)])
    def test_of_a_fixed_number_leaves_out_no_frame_there_is_room_for(self, sample: Sample) -> None:
        assert sample.indices(6, 10, 8) == (0, 1, 2, 3, 4, 5, 5, 5)
        assert sample.indices(9, 10, 8) == choose_frames(9, 8)
        of_a_span = dataclasses.replace(sample, start=0.5)
        assert of_a_span.indices(8, 10, 4) == (5, 6, 7, 7)

    @pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf")])
    def test_refuses_a_rate_that_is_none(self, fps: float) -> None:
        with pytest.raises(UsageError, match=f"fps is {fps}, expected more than 0"):
            Sample(fps=fps)

    def test_refuses_what_choosing_does(self) -> None:
        for sample in (Sample(4, start=11), Sample(fps=2, start=11)):
            with pytest.raises(UsageError, match="the span starts at 11 s, but the last frame"):
                sample.indices(250, 25)
        with pytest.raises(UsageError, match="frames is 0, expected 1 or more"):
            Sample(0, fps=2).indices(250, 25)


def damaged(path: Path) -> Path:
    """A video of 60 frames, of which 40 to 49 cannot be decoded, as is found out on the way."""
    import av

    write_video(path, numbered_frames(60), options={"g": "10", "bf": "0"})
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0)]
    data = bytearray(path.read_bytes())
    for place, size in packets[40:50]:
        assert place is not None
        data[place + 4 : place + size] = bytes(size - 4)
    path.write_bytes(data)
    return path


def test_a_file_that_breaks_its_word_keeps_its_number_of_places(tmp_path: Path) -> None:
    chosen = ChosenFrames(damaged(tmp_path / "clip.mp4"), Sample(fps=6.0))
    counts, rows = set(), set[int]()
    for places, _ in chosen:
        counts.add(chosen.num_rows)
        rows.update(places)
    assert chosen.info.damage is not None
    assert chosen.info.num_frames == 50
    # So many of the 60 frames that were announced, and not of the 50 that there are.
    assert counts == {len(chosen.info.indices)} == {round(60 / chosen.info.fps * 6)}
    assert rows == {*range(len(chosen.info.indices))}


@pytest.mark.parametrize("sample", [Sample(fps=1000.0), Sample()])
def test_a_file_that_breaks_its_word_still_shows_all_its_frames(
    tmp_path: Path, sample: Sample
) -> None:
    chosen = ChosenFrames(damaged(tmp_path / "clip.mp4"), sample)
    rows = {row for places, _ in chosen for row in places}
    assert rows == {*range(60)}
    assert chosen.info.indices == (*range(50), *[49] * 10)


def test_watches_at_a_rate(bundle: Path, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered_frames(40), options={"g": "10"})
    assistant = Assistant.open(bundle, store=MemoryStore(1 << 30))
    seen = assistant.watch(path, fps=5)
    rate = seen.info.fps
    assert seen.info.indices == choose_frames(40, round(40 / rate * 5), rate)
    # Of NumPy, which is a number to all but mypy.
    assert assistant.watch(path, fps=np.float32(5)).memory is seen.memory  # type: ignore[arg-type]
    assert assistant.watch(path, len(seen.info.indices)).memory is not seen.memory
    np.testing.assert_allclose(seen.info.timestamps, np.array(seen.info.indices) / rate)
    assert len(assistant.watch(path, 3, fps=5).info.indices) == 3
    few = dataclasses.replace(assistant.model, max_frames=4)
    assistant.model = few
    assert len(assistant.watch(path, fps=5).info.indices) == 4
    with pytest.raises(UsageError, match=r"frames is 5, but .* takes at most 4"):
        assistant.watch(path, 5, fps=5)
    with pytest.raises(UsageError, match=r"fps is 0\.0, expected more than 0"):
        assistant.watch(path, fps=0)


def test_a_picture_has_no_rate(bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(numbered_frames(1, 64, 64)[0]).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"image .*a\.png: fps: of no meaning for a picture"):
        Assistant.open(bundle).watch(tmp_path / "a.png", fps=2)
