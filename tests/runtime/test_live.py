"""The ring of encoded frames: a window of it is what a video of those frames would be."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from ppllava_engines.errors import UsageError
from ppllava_engines.memory_layout import MEMORY_KINDS, MemoryKind
from ppllava_runtime import Assistant
from ppllava_runtime.asking import Schema
from ppllava_runtime.decoders import Constraint
from ppllava_runtime.live import LiveVideo
from ppllava_runtime.memory import THUMBNAIL_SIDE
from tiny_videos import numbered_frames

FRAMES = numbered_frames(40)
QUESTION = "What moves?"


@pytest.fixture(scope="module")
def assistant(bundle: Path) -> Assistant:
    return Assistant.open(bundle).load()


@pytest.fixture(scope="module")
def coupled(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    from ppllava_export import export_bundle
    from tiny_checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("coupled")
    export_bundle(write_checkpoint(folder / "checkpoint", btadapter=True), folder / "bundle")
    return Assistant.open(folder / "bundle").load()


def fill(live: LiveVideo, first: int, end: int, fps: float = 2.0) -> None:
    for number in range(first, end):
        live.add(FRAMES[number], number / fps)


# The lengths around one and two times round the ring, and one that breaks off in the middle.
@pytest.mark.parametrize("num_frames", [2, 7, 8, 9, 15, 16, 17, 29])
def test_a_window_is_a_video_of_its_frames(assistant: Assistant, num_frames: int) -> None:
    live = LiveVideo(assistant, 4, 2)
    fill(live, 0, num_frames)
    first = max(0, num_frames - 8)
    fresh = LiveVideo(assistant, 4, 2)
    fill(fresh, first, num_frames)
    answer, expected = (
        one.ask(QUESTION, max_new_tokens=6, kernel=(1, 2, 2)) for one in (live, fresh)
    )
    np.testing.assert_array_equal(answer.relevance, expected.relevance)
    assert answer.ids == expected.ids
    assert answer.timestamps.tolist() == [number / 2 for number in range(first, num_frames)]
    for number, thumbnail in zip(range(first, num_frames), answer.thumbnails, strict=True):
        np.testing.assert_array_equal(thumbnail, FRAMES[number])
    assert live.num_encoded == num_frames
    assert answer.accounting.num_frames_encoded == 0


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_a_full_window_is_what_watching_pictures_gives(
    bundle: Path, kind: MemoryKind, tmp_path: Path
) -> None:
    from PIL import Image

    assistant = Assistant.open(bundle, memory=kind)
    paths = [tmp_path / f"{number:02}.png" for number in range(8)]
    for number, path in enumerate(paths):
        Image.fromarray(FRAMES[number]).save(path)
    expected = assistant.look(paths, fps=2).ask(QUESTION, max_new_tokens=6)
    live = LiveVideo(assistant, 4, 2)
    fill(live, 20, 25)
    for place, second in enumerate(expected.timestamps, 25):  # of which one comes twice
        live.add(FRAMES[round(second * 2)], place / 2)
    answer = live.ask(QUESTION, max_new_tokens=6)
    # Frames are encoded one at a time here, and several at once there.
    np.testing.assert_allclose(answer.relevance, expected.relevance, atol=2e-3)
    assert answer.relevance.shape == expected.relevance.shape
    assert answer.accounting.num_tokens_after == expected.accounting.num_tokens_after
    assert answer.accounting.num_prompt_tokens == expected.accounting.num_prompt_tokens


def test_takes_no_more_memory_than_it_says(assistant: Assistant) -> None:
    live = LiveVideo(assistant, 4, 2)
    size = live.nbytes
    arrays = {id(array) for array in live._record.arrays.values()}
    fill(live, 0, 40)
    live.ask(QUESTION, max_new_tokens=2)
    assert live.nbytes == size
    assert {id(array) for array in live._record.arrays.values()} == arrays
    assert size >= 2 * assistant.layout.num_bytes(8) + 8 * FRAMES[0].nbytes
    assert f"{size / 1e6:.1f} MB" in live.describe()
    assert "each frame encoded once" in live.describe()


def test_counts_what_the_tower_gets(assistant: Assistant, coupled: Assistant) -> None:
    for one, num_frames in ((assistant, 1), (coupled, 8)):
        live = LiveVideo(one, 4, 2)
        held = 2 * one.layout.num_bytes(8) if one is assistant else one.layout.num_bytes(8)
        side = one.model.image_size
        squares = 8 * 3 * side**2 if one is coupled else 0
        small = 8 * 3 * THUMBNAIL_SIDE**2
        assert live.nbytes >= held + squares + small + num_frames * 4 * 3 * side**2


def test_frames_come_while_a_schema_is_understood(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveVideo(assistant, 4, 2)
    fill(live, 0, 2)
    understood = assistant.constraint
    came: list[int] = []

    def slow(json_schema: Schema | None, regex: str | None) -> Constraint | None:
        coming = Thread(target=fill, args=(live, 2, 3), daemon=True)
        coming.start()
        coming.join(10)
        came.append(live.num_seen)
        return understood(json_schema, regex)

    monkeypatch.setattr(assistant, "constraint", slow)
    live.ask(QUESTION, max_new_tokens=2, regex="[a-z]+")
    assert came == [3]


def test_pools_the_ring_without_a_copy(assistant: Assistant) -> None:
    live = LiveVideo(assistant, 4, 2)
    fill(live, 0, 13)
    record, _ = live._seen(live._rows())
    for name, array in record.arrays.items():
        assert len(array) == 8
        assert np.shares_memory(np.asarray(array), np.asarray(live._record.arrays[name]))


def test_frames_that_look_the_same_are_encoded_once(assistant: Assistant) -> None:
    live, other = (LiveVideo(assistant, 4, 2) for _ in range(2))
    shown = [0, 0, 1, 0, *[2] * 8, 1, 0, 0]
    for place, number in enumerate(shown):
        live.add(FRAMES[number], place / 2)
    # 1 and 0 had left the ring when they came again.
    assert live.num_encoded == 5
    for place, number in list(enumerate(shown))[-8:]:
        other.add(FRAMES[number], place / 2)
    one, two = (video.ask(QUESTION, max_new_tokens=4) for video in (live, other))
    np.testing.assert_array_equal(one.relevance, two.relevance)
    assert one.ids == two.ids


def test_what_was_long_ago_is_not_in_the_window(assistant: Assistant) -> None:
    live = LiveVideo(assistant, 4, 2)
    fill(live, 0, 12)
    live.add(FRAMES[12], 8.5)  # after three seconds of nothing
    assert live.ask(QUESTION).timestamps.tolist() == [5.0, 5.5, 8.5]
    live.add(FRAMES[13], 100)
    live.add(FRAMES[14], 100.5)
    assert live.ask(QUESTION).timestamps.tolist() == [100, 100.5]
    assert live.num_frames == 2
    assert live.span == 0.5


def test_is_asked_from_other_threads_while_frames_come(assistant: Assistant) -> None:
    live = LiveVideo(assistant, 4, 2)
    fill(live, 0, 8)
    stop = Event()
    found: list[list[float]] = []
    failures: list[BaseException] = []

    def come() -> None:
        number = 8
        while not stop.is_set():
            live.add(FRAMES[number % 40], number / 2)
            number += 1

    def ask() -> None:
        try:
            for _ in range(6):
                answer = live.ask(QUESTION, max_new_tokens=3, kernel=(1, 2, 2))
                times = answer.timestamps.tolist()
                alone = LiveVideo(assistant, 4, 2)
                for second in times:
                    alone.add(FRAMES[int(second * 2) % 40], second)
                expected = alone.ask(QUESTION, max_new_tokens=3, kernel=(1, 2, 2))
                np.testing.assert_array_equal(answer.relevance, expected.relevance)
                assert answer.ids == expected.ids
                found.append(times)
        except BaseException as error:
            failures.append(error)

    comes, *askers = Thread(target=come), Thread(target=ask), Thread(target=ask)
    for thread in (comes, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    comes.join()
    assert not failures
    assert len(found) == 12
    for times in found:
        assert len(times) == 8
        assert {later - sooner for sooner, later in pairwise(times)} == {0.5}
    # Frames came meanwhile: neither side waited for the other to be done.
    assert len({times[0] for times in found}) > 2


def test_a_tower_that_couples_frames_sees_the_window_again(coupled: Assistant) -> None:
    live = LiveVideo(coupled, 4, 2)
    assert "encodes the window again" in live.describe()
    fill(live, 0, 11)
    assert live.num_encoded == 0
    answer = live.ask(QUESTION, max_new_tokens=4)
    again = LiveVideo(coupled, 4, 2)
    fill(again, 3, 11)
    expected = again.ask(QUESTION, max_new_tokens=4)
    np.testing.assert_array_equal(answer.relevance, expected.relevance)
    assert answer.ids == expected.ids
    assert answer.accounting.num_frames_encoded == live.num_encoded == 8
    assert answer.accounting.milliseconds.vision > 0
    assert live.ask(QUESTION).accounting.num_frames_encoded == 8
    # The frame before the window has a say in no frame of it.
    fill(live, 11, 12)
    assert live.ask(QUESTION).timestamps.tolist() == [number / 2 for number in range(4, 12)]


def test_a_frame_that_fails_leaves_no_trace(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveVideo(assistant, 4, 2)
    fill(live, 0, 9)

    def fail(rows: list[int], _: object) -> None:
        for array in live._record.arrays.values():
            np.asarray(array)[rows] = 1  # half-way
        raise UsageError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(live._recorder, "encode", fail)
        with pytest.raises(UsageError, match="too large"):
            fill(live, 9, 10)
    answer = live.ask(QUESTION, max_new_tokens=4, kernel=(1, 2, 2))
    assert answer.timestamps.tolist() == [number / 2 for number in range(2, 9)]
    fresh = LiveVideo(assistant, 4, 2)
    fill(fresh, 2, 9)
    expected = fresh.ask(QUESTION, max_new_tokens=4, kernel=(1, 2, 2))
    np.testing.assert_array_equal(answer.relevance, expected.relevance)
    fill(live, 9, 10)
    assert live.num_frames == 8


@pytest.mark.parametrize(
    ("seconds", "fps", "said"),
    [
        (0.5, 2, "is 1 frames, expected 2 to"),
        (1e9, 2, "is 2000000000 frames, expected 2 to"),
        (0, 2, "seconds is 0, expected more than 0"),
        (float("inf"), 2, "seconds is inf"),
        (4, float("nan"), "fps is nan"),
        (4, -1, "fps is -1"),
    ],
)
def test_refuses_windows_that_are_none(
    assistant: Assistant, seconds: float, fps: float, said: str
) -> None:
    with pytest.raises(UsageError) as error:
        LiveVideo(assistant, seconds, fps)
    assert said in str(error.value)


def test_refuses_what_cannot_be(assistant: Assistant) -> None:
    live = LiveVideo(assistant, 4, 2)
    with pytest.raises(UsageError, match="no frame has come yet"):
        live.ask(QUESTION)
    live.add(FRAMES[0], 1.0)
    for time in (1.0, 0.5, float("nan")):
        with pytest.raises(UsageError, match="expected a later one"):
            live.add(FRAMES[1], time)
    assert live.num_frames == 1
