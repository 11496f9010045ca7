"""Decoded by one thread and encoded by another: the same as one after the other."""

from __future__ import annotations

import dataclasses
import gc
import threading
import tracemalloc
from collections.abc import Generator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle, ModelSpec
from ppllava_engines.errors import DataError, UsageError
from ppllava_runtime.answer import Stopwatch
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.local import LOCAL, ahead
from ppllava_runtime.memory import thumbnails
from ppllava_runtime.preprocess import pixel_values
from ppllava_runtime.trial import write_clip
from ppllava_runtime.video import ChosenFrames, Sample, each_picture, read_clip
from ppllava_runtime.watching import Seen, watch_clip, watch_pictures
from tiny_videos import numbered_frames, write_video

FRAMES = numbered_frames(60)


class Notes:
    """A recorder whose tower gives back what it is shown."""

    def __init__(self, model: ModelSpec, num_rows: int, coupled: bool, run: int) -> None:
        side = model.image_size
        self.frames_per_run = num_rows if coupled else run
        self.coupled = coupled
        self.values = np.full((num_rows, 3, side, side), np.nan, np.float32)
        self.runs: list[tuple[int, ...]] = []

    def encode(self, rows: Sequence[int], pixel_values: NDArray[np.float32]) -> None:
        assert 0 < len(rows) == len(pixel_values) <= self.frames_per_run
        self.values[list(rows)] = pixel_values
        self.runs.append(tuple(rows))

    def repeat(self, row: int, rows: Sequence[int]) -> None:
        self.values[list(rows)] = self.values[row]

    def finish(self) -> Notes:
        return self


@pytest.fixture(scope="module")
def model(bundle: Path) -> ModelSpec:
    return Bundle.open(bundle).manifest.model


def watch(
    model: ModelSpec,
    path: Path,
    num_frames: int,
    start: float | None = None,
    end: float | None = None,
    *,
    run: int = 3,
    **rest: Any,
) -> Seen[Notes]:
    return watch_clip(
        LOCAL.clip(path, Sample(num_frames, None, start, end), model.image_size, Leaving()),
        recorder_of=lambda count, coupled: Notes(model, count, coupled, run),
        model=model,
        stopwatch=rest.pop("stopwatch", Stopwatch()),
        **rest,
    )


def expected(model: ModelSpec, frames: Any) -> NDArray[np.float32]:
    return pixel_values(frames, model.image_size, model.image_mean, model.image_std)


def decoding() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ppllava-decode"]


class TestClip:
    @pytest.mark.parametrize("run", [1, 3, 64])
    @pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.h264"])
    def test_is_the_frames_that_are_read(
        self, model: ModelSpec, tmp_path: Path, name: str, run: int
    ) -> None:
        path = write_video(tmp_path / name, FRAMES, options={"g": "12", "bf": "3"})
        for asked in ((1, None, None), (8, 0.4, 2.0), (80, None, None)):
            seen, clip = watch(model, path, *asked, run=run), read_clip(path, *asked)
            np.testing.assert_array_equal(seen.arrays.values, expected(model, clip.frames))
            assert seen.info.indices == clip.info.indices
            assert seen.info.num_decoded == clip.info.num_decoded
            np.testing.assert_array_equal(seen.info.timestamps, clip.info.timestamps)
            np.testing.assert_array_equal(np.stack(seen.thumbnails), thumbnails(clip.frames))
            assert seen.num_encoded == len(set(clip.info.indices))
        assert not decoding()

    def test_that_repeats_itself_is_encoded_once(self, model: ModelSpec, tmp_path: Path) -> None:
        pictures = FRAMES[[0, 1, 1, 0, 2, 0, 1, 3]]
        path = write_clip(tmp_path / "clip.mkv", pictures)
        for run in (1, 3, 64):
            seen = watch(model, path, 8, run=run)
            np.testing.assert_array_equal(seen.arrays.values, expected(model, pictures))
            assert seen.num_encoded == sum(map(len, seen.arrays.runs)) == 4
            assert len(seen.thumbnails) == 8

    def test_whose_frames_see_each_other_is_encoded_at_once(
        self, model: ModelSpec, tmp_path: Path
    ) -> None:
        path = write_clip(tmp_path / "clip.mkv", FRAMES[[0, 1, 1, 0, 2]])
        seen = watch(dataclasses.replace(model, frames_coupled=True), path, 5)
        np.testing.assert_array_equal(seen.arrays.values, expected(model, FRAMES[[0, 1, 1, 0, 2]]))
        assert seen.arrays.runs == [(0, 1, 2, 3, 4)]
        assert seen.num_encoded == 5

    def test_that_breaks_its_word_begins_again(self, model: ModelSpec, tmp_path: Path) -> None:
        path = write_video(tmp_path / "clip.mp4", FRAMES, options={"g": "10", "bf": "0"})
        with av.open(str(path)) as container:
            packets = [(packet.pos, packet.size) for packet in container.demux(video=0)]
        data = bytearray(path.read_bytes())
        place, size = packets[40]
        assert place is not None
        data[place + 4 : place + size] = bytes(size - 4)
        path.write_bytes(data)
        for run in (1, 3):
            seen, clip = watch(model, path, 12, run=run), read_clip(path, 12)
            assert clip.info.damage is not None
            assert seen.info.damage == clip.info.damage
            np.testing.assert_array_equal(seen.arrays.values, expected(model, clip.frames))
            np.testing.assert_array_equal(np.stack(seen.thumbnails), thumbnails(clip.frames))
            # Eight were there before the damage; fewer than all are encoded anew.
            assert seen.num_encoded < 8 + 12

    def test_tells_how_far_it_came(self, model: ModelSpec, tmp_path: Path) -> None:
        path = write_clip(tmp_path / "clip.mkv", FRAMES[[0, 1, 2, 3, 4, 5, 0]])
        told: list[tuple[int, int]] = []
        stopwatch = Stopwatch()
        watch(
            model,
            path,
            7,
            stopwatch=stopwatch,
            progress=lambda done, count: told.append((done, count)),
        )
        assert told == [(0, 7), (3, 7), (6, 7), (7, 7)]
        spent = stopwatch.read()
        assert min(spent.decode, spent.preprocess, spent.vision) > 0

    def test_keeps_no_full_frames(self, model: ModelSpec, tmp_path: Path) -> None:
        frames = np.repeat(np.repeat(FRAMES[:24], 8, axis=1), 8, axis=2)
        path = write_video(tmp_path / "clip.mp4", frames, options={"g": "10"})
        watch(model, path, 2)  # brings in what is only imported when needed
        tracemalloc.start()
        try:
            seen = watch(model, path, 24)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        kept = seen.arrays.values.nbytes + sum(small.nbytes for small in seen.thumbnails)
        # One in the thread and its copies on the way to what is kept.
        assert peak < kept + 6 * frames[0].nbytes

    def test_lets_go_of_every_decoded_frame(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "clip.mp4", FRAMES, options={"g": "10"})
        most = 0
        gc.collect()
        gc.disable()  # what is held in a circle would stay, three megabytes each at 1080p
        try:
            for _ in ChosenFrames(path, Sample(30)):
                alive = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
                most = max(most, alive)
        finally:
            gc.enable()
        assert 1 <= most < 12  # those that the decoder hands over together

    def test_of_what_cannot_be_read_is_one_sentence(self, model: ModelSpec, tmp_path: Path) -> None:
        path = tmp_path / "clip.mp4"
        path.write_bytes(b"no video" * 99)
        with pytest.raises(DataError, match=r"clip\.mp4: not a video that can be read"):
            watch(model, path, 4)
        write_video(path, FRAMES[:5])
        with pytest.raises(UsageError, match=r"clip\.mp4: the span starts at 9.0 s"):
            watch(model, path, 4, 9.0)
        assert not decoding()

    @pytest.mark.parametrize("failure", [DataError("no"), KeyboardInterrupt()])
    def test_that_is_left_ends_its_thread(
        self, model: ModelSpec, tmp_path: Path, failure: BaseException
    ) -> None:
        path = write_video(tmp_path / "clip.mp4", FRAMES)

        def fail(done: int, _: int) -> None:
            if done:
                assert decoding()
                raise failure

        with pytest.raises(type(failure)):
            watch(model, path, 60, run=1, progress=fail)
        assert not decoding()


class TestAhead:
    def test_waits_for_who_takes(self) -> None:
        taken = 0
        most = 0

        def count() -> Generator[int, None, None]:
            nonlocal most
            for number in range(50):
                most = max(most, number - taken)
                yield number

        for number in ahead(count(), 3, Event()):
            assert number == taken
            taken += 1
        # Three that wait, one to be put with them, one on its way to the caller.
        assert taken == 50
        assert most <= 5

    def test_ends_what_never_would(self) -> None:
        left, closed = Event(), Event()

        def forever() -> Generator[int, None, None]:
            try:
                while not left.is_set():
                    yield 1
            finally:
                closed.set()

        numbers = ahead(forever(), 2, left)
        assert next(numbers) == 1
        numbers.close()
        assert closed.is_set()
        assert not decoding()


class TestPictures:
    @pytest.mark.parametrize("coupled", [False, True])
    def test_are_what_is_in_their_files(
        self, model: ModelSpec, tmp_path: Path, coupled: bool
    ) -> None:
        from PIL import Image

        shown = [FRAMES[0], FRAMES[1][:40], FRAMES[0]]
        paths = [tmp_path / f"{i}.png" for i in range(3)]
        for path, picture in zip(paths, shown, strict=True):
            Image.fromarray(picture).save(path)
        seen = watch_pictures(
            each_picture(paths),
            3,
            recorder_of=lambda count, together: Notes(model, count, together, 2),
            model=dataclasses.replace(model, frames_coupled=coupled),
            stopwatch=Stopwatch(),
            tiled=True,
        )
        np.testing.assert_array_equal(seen.arrays.values, expected(model, shown))
        assert seen.arrays.runs == ([(0, 1, 2)] if coupled else [(0, 1)])
        assert seen.tiling is None
        assert [small.shape for small in seen.thumbnails] == [picture.shape for picture in shown]
        assert seen.info.is_still

    def test_alone_are_cut_into_views(self, model: ModelSpec) -> None:
        side = model.image_size
        tiled = dataclasses.replace(
            model, frames_coupled=True, image_grid_pinpoints=((2 * side, 2 * side),)
        )
        for cut in (True, False):
            seen = watch_pictures(
                [(FRAMES[0], "a note")],
                1,
                recorder_of=lambda count, together: Notes(model, count, together, 2),
                model=tiled,
                stopwatch=Stopwatch(),
                tiled=cut,
            )
            views = seen.tiling.views(FRAMES[0]) if seen.tiling else FRAMES[:1]
            assert (seen.tiling is not None) == cut
            assert len(views) == (5 if cut else 1)
            np.testing.assert_array_equal(seen.arrays.values, expected(model, views))
            assert not seen.arrays.coupled
            assert seen.info.damage == "a note"
