"""Who reads files can be chosen: what an assistant asks of it, and what it makes of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppllava_engines.errors import DataError, InternalError, MediaError, UsageError
from ppllava_runtime import Assistant, MemoryStore, Video
from ppllava_runtime.choosing import Sample, choose_frames
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.local import LOCAL
from ppllava_runtime.video import ClipInfo
from ppllava_runtime.watching import ClipFrames, Picture, Shown
from tiny_videos import numbered_frames, write_video

QUESTION = "What colour is the circle?"


class Noting:
    """An Opener that reads as LOCAL does and notes what it is asked for.

    Args:
        change: Makes other frames of those of a clip.
    """

    def __init__(self, change: Callable[[Iterator[Shown]], Iterator[Shown]] = iter) -> None:
        self.stills: list[Path] = []
        self.samples: list[tuple[Path, Sample, int]] = []
        self.num_open = 0
        self.change = change

    def still(self, path: Path, leaving: Leaving) -> tuple[Picture, str | None] | None:
        self.stills.append(path)
        return LOCAL.still(path, leaving)

    def clip(self, path: Path, sample: Sample, size: int, leaving: Leaving) -> ClipFrames:
        self.samples.append((path, sample, size))
        self.num_open += 1
        return _NotedFrames(self, LOCAL.clip(path, sample, size, leaving))


class _NotedFrames:
    def __init__(self, opener: Noting, frames: ClipFrames) -> None:
        self._opener = opener
        self._frames = frames

    @property
    def num_rows(self) -> int:
        return self._frames.num_rows

    @property
    def info(self) -> ClipInfo:
        return self._frames.info

    def __iter__(self) -> Iterator[Shown]:
        return self._opener.change(iter(self._frames))

    def close(self) -> None:
        self._opener.num_open -= 1
        self._frames.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return write_video(path, numbered_frames(24), options={"g": "10"})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven, of three sizes."""
    folder, sizes = tmp_path_factory.mktemp("pictures"), [(64, 64), (96, 48), (48, 80)]
    paths = [folder / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.fromarray(numbered_frames(7, *sizes[number % 3])[number]).save(path)
    return paths


def same(first: Video, second: Video) -> None:
    for name, array in first.memory.arrays.items():
        np.testing.assert_array_equal(array, second.memory.arrays[name])
    np.testing.assert_array_equal(first.info.timestamps, second.info.timestamps)
    for one, other in zip(first.memory.thumbnails, second.memory.thumbnails, strict=True):
        np.testing.assert_array_equal(one, other)


def test_reads_all_that_is_watched(bundle: Path, clip: Path, pictures: list[Path]) -> None:
    opener = Noting()
    plain, other = Assistant.open(bundle), Assistant.open(bundle, decoding=opener)
    same(plain.watch(clip, 6, 0.1), other.watch(clip, 6, 0.1))
    same(plain.watch(pictures[0]), other.watch(pictures[0]))
    same(plain.look(pictures[:3]), other.look(pictures[:3]))
    assert opener.samples == [(clip, Sample(6, None, 0.1), other.model.image_size)]
    assert opener.stills == [clip, pictures[0], *pictures[:3]]
    assert opener.num_open == 0


def test_is_closed_by_what_progress_raises(bundle: Path, clip: Path) -> None:
    opener = Noting()
    assistant = Assistant.open(bundle, store=MemoryStore(1 << 30), decoding=opener)

    class Gone(Exception):
        pass

    def progress(done: int, total: int) -> None:
        del total
        assert opener.num_open == 1
        if done:
            raise Gone

    for _ in range(2):  # nothing was kept of it
        with pytest.raises(Gone):
            assistant.watch(clip, 6, progress=progress)
        assert opener.num_open == 0
    assert len(opener.samples) == 2
    assert assistant.watch(clip, 6).ask(QUESTION, max_new_tokens=2).ids


def test_that_fails_is_closed(bundle: Path, clip: Path) -> None:
    def fail(frames: Iterator[Shown]) -> Iterator[Shown]:
        yield next(frames)
        raise MediaError("video: decoding it took too long")

    opener = Noting(fail)
    assistant = Assistant.open(bundle, decoding=opener)
    with pytest.raises(MediaError, match="decoding it took too long"):
        assistant.watch(clip, 6)
    assert opener.num_open == 0
    opener.change = iter
    assert len(assistant.watch(clip, 6).memory.timestamps) == 6


@pytest.mark.parametrize("count", [0, 3])
def test_that_leaves_places_empty_is_not_believed(bundle: Path, clip: Path, count: int) -> None:
    def stop(frames: Iterator[Shown]) -> Iterator[Shown]:
        for _ in range(count):
            yield next(frames)

    assistant = Assistant.open(bundle, decoding=Noting(stop))
    with pytest.raises(InternalError, match=f"watching: {count} frames of a clip came"):
        assistant.watch(clip, 6)


class TestPicturesAsFrames:
    def test_are_a_video(self, bundle: Path, pictures: list[Path]) -> None:
        assistant = Assistant.open(bundle, store=MemoryStore(1 << 30))
        seen = assistant.look(pictures, fps=2)
        assert seen.memory.kind == "video"
        assert seen.info.indices == tuple(range(7))
        np.testing.assert_array_equal(seen.info.timestamps, np.arange(7) / 2)
        assert (seen.info.fps, seen.info.num_frames, seen.info.num_decoded) == (2, 7, 7)
        assert not seen.info.is_still
        shapes = [small.shape[:2] for small in seen.memory.thumbnails]
        assert shapes[:3] == [(64, 64), (48, 96), (80, 48)]
        together = assistant.look(pictures)
        assert together.memory.kind == "images"
        for name, array in seen.memory.arrays.items():
            np.testing.assert_array_equal(array, together.memory.arrays[name])
        answer = seen.ask(QUESTION, max_new_tokens=3)
        assert (answer.kind, len(answer.curve())) == ("video", 7)
        np.testing.assert_array_equal(answer.timestamps, np.arange(7) / 2)
        assert assistant.look(pictures, fps=2).memory is seen.memory
        assert assistant.look(pictures, fps=4).memory is not seen.memory

    @pytest.mark.parametrize("count", [1, 3, 10])
    def test_are_chosen_as_frames_of_a_file(
        self, bundle: Path, pictures: list[Path], count: int
    ) -> None:
        opener = Noting()
        seen = Assistant.open(bundle, decoding=opener).look(pictures, fps=2, num_frames=count)
        indices = choose_frames(7, count)
        assert seen.info.indices == indices
        assert opener.stills == [pictures[place] for place in sorted(set(indices))]
        assert seen.info.num_decoded == len(opener.stills)
        np.testing.assert_array_equal(seen.memory.timestamps, np.array(indices) / 2)
        assert len(seen.memory.thumbnails) == count

    def test_may_be_one(self, bundle: Path, pictures: list[Path]) -> None:
        seen = Assistant.open(bundle).look(pictures[:1], fps=2)
        assert (seen.memory.kind, seen.memory.size[0], seen.memory.tiling) == ("video", 1, None)

    def test_refuse_what_makes_no_sense(
        self, bundle: Path, pictures: list[Path], clip: Path
    ) -> None:
        assistant = Assistant.open(bundle)
        with pytest.raises(UsageError, match="frames: of no meaning for pictures without fps"):
            assistant.look(pictures, num_frames=3)
        with pytest.raises(UsageError, match=r"fps is 0\.0, expected more than 0"):
            assistant.look(pictures, fps=0)
        with pytest.raises(UsageError, match="frames is 0, expected 1 or more"):
            assistant.look(pictures, fps=1, num_frames=0)
        with pytest.raises(UsageError, match="frames is 999, but checkpoint takes at most 64"):
            assistant.look(pictures, fps=1, num_frames=999)
        with pytest.raises(DataError, match=r"clip\.mp4: not an image"):
            assistant.look([*pictures, clip], fps=1)
