"""One watches a clip, and others want the same while it does: it is encoded once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Barrier, Event

import pytest

from ppllava_engines.errors import DataError
from ppllava_runtime import Assistant, MemoryStore
from ppllava_runtime.conversation import Video
from ppllava_runtime.leaving import Leaving, Left
from ppllava_runtime.watching import Progress

QUESTION = "What colour is the circle?"


def run(assistant: Assistant, clip: Path, first: Progress, second: Progress) -> list[Future[Video]]:
    """What becomes of both; the other one comes when the tower has nothing yet."""
    with ThreadPoolExecutor(2) as pool:
        others: list[Future[Video]] = []

        def told(done: int, total: int) -> None:
            if not others:
                others.append(pool.submit(assistant.watch, clip, 6, progress=second))
            first(done, total)

        one = pool.submit(assistant.watch, clip, 6, progress=told)
        wait([one])
        return [one, *others]


def test_one_is_enough(assistant: Assistant, clip: Path) -> None:
    hears = Event()
    heard: list[tuple[int, int]] = []

    def listen(done: int, total: int) -> None:
        heard.append((done, total))
        hears.set()

    def go_on(_done: int, _total: int) -> None:
        assert hears.wait(30)

    one, other = run(assistant, clip, go_on, listen)
    assert one.result().memory is other.result().memory
    answers = [video.result().ask(QUESTION, max_new_tokens=1) for video in (one, other)]
    assert [answer.accounting.num_frames_encoded for answer in answers] == [6, 0]
    assert heard[0] == (0, 6)
    assert heard == sorted(set(heard))


def test_where_one_fails_the_other_watches(assistant: Assistant, clip: Path) -> None:
    hears = Event()

    def listen(_done: int, _total: int) -> None:
        hears.set()

    def leave(_done: int, _total: int) -> None:
        assert hears.wait(30)
        raise InterruptedError

    one, other = run(assistant, clip, leave, listen)
    with pytest.raises(InterruptedError):
        one.result()
    answer = other.result().ask(QUESTION, max_new_tokens=1)
    assert answer.accounting.num_frames_encoded == 6


def test_who_waits_may_leave(assistant: Assistant, clip: Path) -> None:
    leaves = Event()

    def leave(_done: int, _total: int) -> None:
        leaves.set()
        raise InterruptedError

    def go_on(_done: int, _total: int) -> None:
        assert leaves.wait(30)

    one, other = run(assistant, clip, go_on, leave)
    with pytest.raises(InterruptedError):
        other.result()
    assert len(one.result().memory.timestamps) == 6


def test_who_waits_may_leave_before_more_is_heard(assistant: Assistant, clip: Path) -> None:
    inside, heard, left, leaving = Event(), Event(), Event(), Leaving()

    def stay(_done: int, _total: int) -> None:
        inside.set()
        assert left.wait(30)

    def listen(_done: int, _total: int) -> None:
        heard.set()

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(assistant.watch, clip, 6, progress=stay)
        assert inside.wait(30)
        other = pool.submit(assistant.watch, clip, 6, progress=listen, leaving=leaving)
        assert heard.wait(30)
        leaving.leave()
        leaving.end()
        with pytest.raises(Left):
            other.result(30)
        assert not one.done()
        left.set()


def run_three(assistant: Assistant, clip: Path, end: Callable[[], None]) -> list[Future[Video]]:
    """What becomes of one that `end` happens to, and of two that waited for it.

    Those two have to be at it at the same time.
    """
    inside, heard, together = Event(), Barrier(3, timeout=30), Barrier(2, timeout=30)

    def first(_done: int, _total: int) -> None:
        if not inside.is_set():
            inside.set()
            heard.wait()
            end()

    def listening() -> Progress:
        begins = [heard, together]  # the one that is waited for, and then one's own

        def told(done: int, _total: int) -> None:
            if done == 0 and begins:
                begins.pop(0).wait()

        return told

    with ThreadPoolExecutor(3) as pool:
        one = pool.submit(assistant.watch, clip, 6, progress=first)
        assert inside.wait(30)
        others = [pool.submit(assistant.watch, clip, 6, progress=listening()) for _ in range(2)]
    return [one, *others]


def test_what_cannot_be_watched_is_not_waited_for_twice(assistant: Assistant, clip: Path) -> None:
    def fail() -> None:
        raise DataError("video: it is damaged")

    one, *others = run_three(assistant, clip, fail)
    with pytest.raises(DataError):
        one.result()
    assert all(other.result().memory for other in others)


def test_what_has_no_room_is_not_waited_for_twice(bundle: Path, clip: Path) -> None:
    assistant = Assistant.open(bundle, store=MemoryStore(1))
    assert all(each.result().memory for each in run_three(assistant, clip, lambda: None))


def test_what_changes_meanwhile_is_not_waited_for_twice(
    assistant: Assistant, clip: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(clip, tmp_path / "clip.mp4"))
    found = run_three(assistant, path, lambda: os.utime(path, (1, 1)))
    assert all(each.result().memory for each in found)


def test_others_are_not_waited_for(assistant: Assistant, clip: Path) -> None:
    inside, outside = Event(), Event()

    def stay(_done: int, _total: int) -> None:
        inside.set()
        assert outside.wait(30)

    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(assistant.watch, clip, 6, progress=stay)
        assert inside.wait(30)
        assistant.watch(clip, 5)
        assistant.watch(clip, 6, owner="another")
        assert not one.done()
        outside.set()
