"""Videos that come again: what is found in a store, and what it holds."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from ppllava_engines.errors import DataError, UsageError
from ppllava_runtime import Assistant, MemoryStore
from ppllava_runtime.memories import Source, Watched
from ppllava_runtime.memory import Memory
from ppllava_runtime.video import ClipInfo
from tiny_videos import numbered_frames

QUESTION = "What colour is the circle?"


def of_bytes(size: int) -> Watched:
    small = (np.zeros((1, size, 1), np.uint8),)
    return Watched(Memory("video", None, (1, 1), np.zeros(1), small), ClipInfo.of_stills(1))


class TestStore:
    def test_drops_what_is_longest_unused(self) -> None:
        store = MemoryStore(100)
        for key in "abc":
            store.put(key, of_bytes(30))
        assert store.get("a") is not None
        store.put("d", of_bytes(30))
        assert [key for key in "abcd" if store.get(key)] == ["a", "c", "d"]
        store.put("e", of_bytes(70))
        assert [key for key in "acde" if store.get(key)] == ["d", "e"]
        assert (len(store), store.nbytes) == (2, 100)

    def test_keeps_nothing_larger_than_itself(self) -> None:
        store = MemoryStore(100)
        store.put("a", of_bytes(100))
        store.put("b", of_bytes(101))
        assert store.get("a")
        assert store.get("b") is None

    def test_takes_the_later_of_two(self) -> None:
        store, later = MemoryStore(100), of_bytes(60)
        store.put("a", of_bytes(70))
        store.put("a", later)
        assert store.get("a") is later
        assert store.nbytes == 60

    def test_counts_a_picture_that_is_shown_twice_once(self) -> None:
        small = np.zeros((1, 30, 1), np.uint8)
        assert Memory("video", None, (1, 1), np.zeros(2), (small, small)).nbytes == 30

    def test_refuses_no_budget(self) -> None:
        with pytest.raises(UsageError, match="the budget of memories is 0 bytes"):
            MemoryStore(0)

    def test_many_may_share_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = MemoryStore(100)
        measure = Memory.nbytes.fget  # type: ignore[attr-defined]

        def slowly(memory: Memory) -> int:
            time.sleep(0)  # another thread's turn, in the middle of what this one does
            return int(measure(memory))

        monkeypatch.setattr(Memory, "nbytes", property(slowly))

        def work(seed: int) -> None:
            random = Random(seed)
            for _ in range(500):
                key, size = random.choice("abcdef"), random.randint(1, 60)
                store.put(key, of_bytes(size))
                found = store.get(random.choice("abcdef"))
                assert found is None or found.memory.nbytes <= 60
                assert store.nbytes <= 100

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        left = [found for key in "abcdef" if (found := store.get(key))]
        assert store.nbytes == sum(found.memory.nbytes for found in left)


class TestSource:
    def key(self, paths: Sequence[Path], *sampling: object, seer: str = "a") -> str | None:
        return Source(paths, sampling, (seer,)).key()

    def test_is_known_by_content_sampling_and_seer(self, tmp_path: Path) -> None:
        first, same, other = (tmp_path / name for name in "abc")
        for path, content in ((first, b"1"), (same, b"1"), (other, b"2")):
            path.write_bytes(content)
        key = self.key([first], 8, None)
        assert key is not None
        assert key == self.key([same], 8, None)
        others = [
            self.key([other], 8, None),
            self.key([first], 9, None),
            self.key([first], 8, 0.5),
            self.key([first], 8, None, seer="b"),
            self.key([first, other], 8, None),
            self.key([other, first], 8, None),
        ]
        assert len({key, *others}) == 7

    def test_is_none_where_nothing_can_be_read_twice(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for name in ("pipe", "none", "."):
            assert self.key([tmp_path / name]) is None

    def test_tells_when_a_file_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "growing"
        path.write_bytes(b"1")
        source = Source([path], (), ())
        assert source.is_unchanged()
        path.write_bytes(b"12")
        assert not source.is_unchanged()


def test_what_was_seen_is_not_looked_at_again(
    assistant: Assistant, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = assistant.watch(clip, 6).ask(QUESTION, max_new_tokens=5)
    assert first.accounting.num_frames_encoded == 6
    monkeypatch.setattr(assistant, "vision", None)
    again = assistant.watch(shutil.copy(clip, tmp_path / "other.mp4"), 6)
    answer = again.ask(QUESTION, max_new_tokens=5)
    assert answer.text == first.text
    cost = answer.accounting
    assert (cost.num_frames_decoded, cost.num_frames_encoded) == (0, 0)
    assert cost.num_frames_sampled == 6
    assert cost.milliseconds.vision == 0 < cost.milliseconds.decode  # the file was read
    with pytest.raises(AttributeError):
        assistant.watch(clip, 5)


def test_pictures_come_again_too(
    assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, frame in zip(paths, numbered_frames(2, 64, 64), strict=True):
        Image.fromarray(frame).save(path)
    together, alone = assistant.look(paths), assistant.watch(paths[0])
    monkeypatch.setattr(assistant, "vision", None)
    assert assistant.look(paths).memory is together.memory
    assert assistant.watch(paths[0]).memory is alone.memory
    with pytest.raises(UsageError, match="frames: of no meaning for a picture"):
        assistant.watch(paths[0], assistant.model.default_frames)
    with pytest.raises(AttributeError):
        assistant.look(paths[::-1])


def test_a_file_that_changes_while_it_is_watched_is_not_kept(
    assistant: Assistant, clip: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(clip, tmp_path / "clip.mp4"))

    def rewritten(_done: int, _total: int) -> None:
        os.utime(path, (1, 1))

    assistant.watch(path, 4, progress=rewritten)
    assert assistant.store is not None
    assert len(assistant.store) == 0


def test_what_another_kind_of_memory_kept_is_not_taken(assistant: Assistant, clip: Path) -> None:
    seen = assistant.watch(clip, 4)
    other = Assistant(assistant.bundle, memory="tokens", store=assistant.store).watch(clip, 4)
    assert set(seen.memory.arrays) == {"keys", "hidden"}
    assert set(other.memory.arrays) == {"tokens", "norms"}


def test_a_store_without_room_changes_nothing(bundle: Path, clip: Path) -> None:
    assistant = Assistant.open(bundle, store=MemoryStore(1))
    for _ in range(2):
        answer = assistant.watch(clip, 4).ask(QUESTION, max_new_tokens=1)
        assert answer.accounting.num_frames_encoded == 4


def test_a_suffix_that_says_how_to_read_a_file_tells_two_apart(
    assistant: Assistant, tmp_path: Path
) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(numbered_frames(1, 64, 64)[0]).save(path)
    seen = assistant.watch(path)
    assert (seen.memory.kind, seen.info.is_still) == ("image", True)
    moving = assistant.watch(shutil.copy(path, tmp_path / "x.mjpeg"))
    assert (moving.memory.kind, moving.info.is_still) == ("video", False)
    again = assistant.watch(shutil.copy(path, tmp_path / "y.JPG"))
    assert again.memory is seen.memory


def test_what_is_told_of_a_file_names_the_one_that_was_asked_for(
    assistant: Assistant, tmp_path: Path
) -> None:
    pictures = [Image.fromarray(frame) for frame in numbered_frames(3, 64, 64)]
    paths = [tmp_path / name for name in ("a.tif", "b.png", "c.tif")]
    for path in paths:
        more = pictures[1:] if path.suffix == ".tif" else []
        pictures[0].save(path, save_all=bool(more), append_images=more)

    def told(paths: list[Path]) -> str:
        sentences = [
            f"image {path}: only the first of its 3 pictures is looked at"
            for path in paths
            if path.suffix == ".tif"
        ]
        return "; ".join(sentences)

    # The same content twice, each under the name that the other one had.
    others = [paths[2], Path(shutil.copy(paths[1], tmp_path / "d.png")), paths[0]]
    for asked in (paths, others, paths):
        seen = assistant.look(asked)
        assert seen.info.damage == told(asked)
    assert assistant.store is not None
    assert len(assistant.store) == 1
    assert assistant.watch(paths[0]).info.damage == told(paths[:1])
    assert assistant.watch(paths[2]).info.damage == told(paths[2:])


def test_numbers_may_be_those_of_numpy(assistant: Assistant, clip: Path) -> None:
    seen = assistant.watch(clip, np.int64(4), np.float32(0), np.float64(0.5))  # type: ignore[arg-type]
    assert assistant.watch(clip, 4, 0, 0.5).memory is seen.memory


def test_one_picture_is_the_same_alone_and_in_a_list(
    assistant: Assistant, clip: Path, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, frame in zip(paths, numbered_frames(2, 64, 64), strict=True):
        Image.fromarray(frame).save(path)
    assert assistant.look(paths[:1]).memory is assistant.watch(paths[0]).memory
    assert assistant.watch(paths[1]).memory is assistant.look(paths[1:]).memory
    assistant.watch(clip)
    with pytest.raises(DataError, match=r"clip\.mp4: not an image, give a video alone"):
        assistant.look([clip])
