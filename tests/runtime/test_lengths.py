"""One bundle for any number of frames, and videos of any length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppllava_runtime import Assistant
from ppllava_runtime.preprocess import pixel_values
from ppllava_runtime.video import read_clip
from tiny_checkpoint import write_checkpoint
from tiny_videos import numbered_frames, read_number, write_video

QUESTION = "What moves?"


@pytest.fixture(scope="module", params=["each frame alone", "frames coupled"])
def assistant(
    request: pytest.FixtureRequest, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Assistant:
    if request.param == "each frame alone":
        return Assistant.open(bundle, memory="hidden-fp32")
    from ppllava_export import export_bundle

    folder = tmp_path_factory.mktemp("coupled")
    export_bundle(write_checkpoint(folder, btadapter=True), folder / "bundle", "fp32")
    coupled = Assistant.open(folder / "bundle", memory="hidden-fp32")
    assert coupled.model.frames_coupled
    return coupled


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", numbered_frames(70))


def test_every_number_of_frames_up_to_the_most(assistant: Assistant, clip: Path) -> None:
    assert assistant.model.max_frames == 64
    for num_frames in range(1, 65):
        answer = assistant.watch(clip, num_frames).ask(QUESTION, max_new_tokens=2)
        assert len(answer.ids) == 2
        assert answer.relevance.shape == (num_frames, 4, 4)
        assert np.abs(answer.relevance).max() <= 1 + 1e-5  # a cosine
        assert answer.accounting.num_frames_encoded == num_frames
        # By kernel and stride (2,2,2), which shrink to a video of one frame.
        assert answer.accounting.num_tokens_after == max(1, num_frames // 2) * 4


def test_what_a_frame_tells_depends_on_the_others_where_they_are_coupled(
    assistant: Assistant, clip: Path
) -> None:
    many, few = (assistant.watch(clip, count, end=count / 25) for count in (16, 8))
    shared = set(many.info.indices) & set(few.info.indices)
    assert len(shared) > 3
    for index in shared:
        one, other = (
            np.asarray(seen.memory.arrays["keys"])[seen.info.indices.index(index)]
            for seen in (many, few)
        )
        same = np.allclose(one, other, atol=1e-5)
        assert same != assistant.model.frames_coupled


def test_the_time_of_three_coupled_frames_is_not_taken_for_their_colours(
    assistant: Assistant, clip: Path
) -> None:
    model = assistant.model
    values = pixel_values(
        read_clip(clip, 3).frames, model.image_size, model.image_mean, model.image_std
    )
    swapped = np.ascontiguousarray(values.swapaxes(0, 1))
    as_given, as_times = (
        assistant.vision.run({"pixel_values": each})["keys"] for each in (values, swapped)
    )
    expected, other = (as_times, as_given) if model.frames_coupled else (as_given, as_times)
    keys = assistant.watch(clip, 3).memory.arrays["keys"]
    np.testing.assert_allclose(keys, expected, atol=1e-5)
    assert not np.allclose(keys, other, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_video_of_few_frames_shows_some_again(
    assistant: Assistant, tmp_path: Path, count: int
) -> None:
    path = write_video(tmp_path / "short.mp4", numbered_frames(count))
    video = assistant.watch(path)
    answer = video.ask(QUESTION, num_tokens=64, max_new_tokens=5)
    assert video.info.num_frames == count
    assert len(video.info.indices) == assistant.model.default_frames
    assert sorted(set(video.info.indices)) == list(range(count))
    assert len(answer.ids) == 5


def test_a_video_of_ten_thousand_frames(assistant: Assistant, long: Path) -> None:
    video = assistant.watch(long, 12)
    answer = video.ask(QUESTION, num_tokens=64, max_new_tokens=5)
    assert video.info.num_frames == 10_000
    assert video.info.num_decoded < 1000
    assert video.info.damage is None
    assert answer.relevance.shape == (12, 4, 4)
    assert len(answer.ids) == 5


def test_frames_of_a_long_video_are_the_right_ones(long: Path) -> None:
    clip = read_clip(long, 9, start=100, end=390)
    for index, frame in zip(clip.info.indices, clip.frames, strict=True):
        assert 2500 <= index <= 9750
        assert read_number(frame) == index % 1000


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 tiny frames, a thousand different ones ten times over."""
    path = tmp_path_factory.mktemp("videos") / "long.mp4"
    frames = numbered_frames(1000, 80, 16)
    repeated = np.broadcast_to(frames, (10, *frames.shape)).reshape(-1, *frames.shape[1:])
    return write_video(path, repeated, options={"g": "50", "preset": "ultrafast"})
