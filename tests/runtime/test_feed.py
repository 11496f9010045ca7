"""What comes between a source and the encoder: a rate, one place to wait, and patience."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from threading import Condition, Event

import numpy as np
import pytest
from numpy.typing import NDArray

from clocks import HandClock, reached
from ppllava_engines.errors import DataError, UnavailableError, UsageError
from ppllava_runtime.feed import Backoff, Clock, Feed, Pace, Patience
from ppllava_runtime.newest import Follower, Newest
from ppllava_runtime.sources import Lost, Recording, Shot
from tiny_videos import numbered_frames, read_number, write_video

PICTURE = np.zeros((4, 4, 3), np.uint8)
SOON = Patience(first=30, silence=0.2, least=0.01, most=0.02)
NEVER_SILENT = replace(SOON, silence=300)


class Script:
    """A source that does at each opening what the next of `acts` says."""

    name = "source of a test"
    is_recorded = False

    def __init__(self, *acts: Callable[[Event], Generator[Shot, None, None]]) -> None:
        self.acts = list(acts)
        self.num_openings = 0

    def shots(self, left: Event) -> Generator[Shot, None, None]:
        act = self.acts[min(self.num_openings, len(self.acts) - 1)]
        self.num_openings += 1
        yield from act(left)


def gives(count: int) -> Callable[[Event], Generator[Shot, None, None]]:
    def act(_: Event) -> Generator[Shot, None, None]:
        for _number in range(count):
            yield Shot(None, lambda: PICTURE)
        raise Lost("it broke off")

    return act


def goes_on(left: Event) -> Generator[Shot, None, None]:
    while not left.wait(0.002):
        yield Shot(None, lambda: PICTURE)


@pytest.mark.parametrize(
    ("source", "fps", "expected"), [(25, 5, 5), (30, 2, 2), (25, 25, 25), (7, 3, 3), (2, 5, 2)]
)
def test_a_pace_takes_so_many_a_second(source: float, fps: float, expected: float) -> None:
    chance, pace = random.Random(0), Pace(fps)
    times = [number / source + chance.uniform(-0.1, 0.1) / source for number in range(1000)]
    taken = [seconds for seconds in times if pace.takes(seconds)]
    seconds = 1000 / source
    assert abs(len(taken) - expected * seconds) <= 0.02 * expected * seconds + 1


def test_a_pace_takes_no_more_after_a_gap() -> None:
    pace = Pace(2)
    assert [pace.takes(second) for second in (0, 0.1, 0.5, 100, 100.1, 100.2, 100.5)] == [
        True, False, True, True, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_pace_is_positive(fps: float) -> None:
    with pytest.raises(UsageError, match="expected more than 0"):
        Pace(fps)


def test_backs_off_longer_and_longer_and_by_chance() -> None:
    patience = Patience(least=0.5, most=15)
    backoff = Backoff(patience, random.Random(1))
    waits = [backoff.next() for _ in range(2000)]
    for tries, wait in enumerate(waits):
        longest = min(15, 0.5 * 2 ** min(tries, 30))
        assert longest / 2 <= wait <= longest
    assert len(set(waits)) == len(waits)
    backoff.reset()
    assert backoff.next() <= 0.5


def test_the_newest_waits_and_the_others_are_counted() -> None:
    newest: Newest[int] = Newest()
    for number in range(5):
        newest.put(number)
    assert newest.take() == 4
    assert (newest.num_put, newest.num_dropped) == (5, 4)
    assert not newest.settle(0.01)  # it is in hand
    newest.put(5)
    newest.close(DataError("the end"))
    newest.put(6)
    assert newest.take() == 5
    with pytest.raises(DataError, match="the end"):
        newest.take()
    assert newest.settle(0)
    assert newest.num_put == 6


def test_a_slow_follower_gets_the_newest() -> None:
    newest: Newest[int] = Newest()
    begun, go_on = Event(), Event()
    done: list[int] = []

    def work(number: int) -> None:
        begun.set()
        assert go_on.wait(20)
        done.append(number)

    follower = Follower(newest, work)
    newest.put(0)
    assert begun.wait(20)
    for number in range(1, 10):
        newest.put(number)
    go_on.set()
    assert newest.settle(20)
    assert done == [0, 9]
    assert newest.num_dropped == 8
    follower.close()
    assert not follower.wait_for(lambda: False)


def test_a_follower_tells_what_ended_it() -> None:
    newest: Newest[int] = Newest()
    told: list[str] = []

    def work(number: int) -> None:
        if number:
            raise DataError(f"frame {number}: it is broken")

    patient = Follower(newest, work, lambda error: told.append(str(error)))
    newest.put(1)
    assert reached(lambda: told == ["frame 1: it is broken"])
    newest.put(0)
    assert newest.settle(20)
    patient.close()
    other: Newest[int] = Newest()
    follower = Follower(other, work)
    other.put(2)
    with pytest.raises(DataError, match="frame 2"):
        follower.wait_for(lambda: False)
    follower.close()


def test_who_waits_for_a_follower_that_failed_is_told() -> None:
    """As soon as nothing is waited for any more, although its thread may do nothing for long."""
    told = Event()

    class Closed(Newest[int]):
        def close(self, error: Exception | None = None) -> None:
            super().close(error)
            assert told.wait(20)

    def fails(number: int) -> None:
        raise DataError(f"frame {number}: it is broken")

    items = Closed()
    follower = Follower(items, fails)
    items.put(1)
    assert items.settle(20)
    try:
        with pytest.raises(DataError, match="frame 1"):
            follower.check()
    finally:
        told.set()
    follower.close()


def test_plays_a_recording_at_its_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered_frames(12), fps=25)
    began = time.monotonic()
    found = []
    with Feed(Recording(path), 100) as feed:
        while (frame := feed.frames.take()) is not None:
            found.append((read_number(frame.picture), round(frame.seconds, 4)))
    assert time.monotonic() - began >= 11 / 25
    numbers = [number for number, _ in found]  # all of them, but on a machine that is busy
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 11
    assert found == [(number, number / 25) for number in numbers]
    assert (feed.num_seen, len(found) + feed.num_dropped, feed.num_lost) == (12, 12, 0)


def test_drops_what_a_slow_encoder_does_not_take(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered_frames(12), fps=100)
    with Feed(Recording(path), 100) as feed:
        first = feed.frames.take()
        assert reached(lambda: feed.frames.num_put == 12)
        shown = [first, *iter(feed.frames.take, None)]
    numbers = [read_number(frame.picture) for frame in shown if frame]
    assert numbers[-1] == 11
    assert len(numbers) <= 2
    assert feed.num_dropped == 12 - len(numbers)


def test_makes_no_pictures_but_those_of_its_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered_frames(50), fps=100)
    with Feed(Recording(path), 20) as feed:
        while feed.frames.take() is not None:
            pass
        assert feed.num_seen == 50
        assert feed.frames.num_put == 11  # a quarter of their distance early, but for the first


def test_comes_back_after_each_loss() -> None:
    told: list[str] = []
    source = Script(*[gives(3)] * 20, goes_on)
    with Feed(source, 1000, patience=NEVER_SILENT, tell=told.append) as feed:
        assert reached(lambda: feed.num_recovered == 20)
    assert feed.num_lost == 20
    assert source.num_openings == 21
    assert "source of a test: lost (it broke off), next try in 0.0 s" in told
    assert told.count("source of a test: here again") == 20


def test_gives_up_a_source_that_is_silent_or_hangs() -> None:
    released = Event()

    def is_silent(left: Event) -> Generator[Shot, None, None]:
        yield Shot(None, lambda: PICTURE)
        left.wait(20)

    def hangs(_: Event) -> Generator[Shot, None, None]:
        yield Shot(None, lambda: PICTURE)
        released.wait(20)
        yield Shot(None, lambda: PICTURE)  # which nobody wants any more

    told: list[str] = []
    source, clock = Script(is_silent, hangs, goes_on), HandClock()
    with Feed(source, 1000, patience=SOON, clock=clock, tell=told.append) as feed:
        assert reached(lambda: feed.num_seen == 1)
        assert clock.loses(feed, SOON.silence)
        assert reached(lambda: feed.num_recovered == 1)
        assert clock.loses(feed, SOON.silence)
        assert reached(lambda: feed.num_recovered == 2)
        assert "source of a test: lost (no picture for 0.2 s), next try in 0.0 s" in told
        before = feed.num_lost
        released.set()
        seen = feed.num_seen
        assert reached(lambda: feed.num_seen > seen + 5)
        assert feed.num_lost == before == 2


def test_gives_up_what_never_gave_a_picture() -> None:
    patience = Patience(silence=300)
    clock = HandClock(patience.most)
    source, chance = Script(gives(0)), random.Random(0)
    feed = Feed(source, 1, patience=patience, clock=clock, chance=chance)
    with feed, pytest.raises(UnavailableError) as error:
        feed.frames.take()
    assert "source of a test: no picture came in" in str(error.value)
    assert 30 <= clock.seconds < 60
    assert feed.num_recovered == 0


def test_ends_with_what_no_new_try_would_change() -> None:
    def is_missing(_: Event) -> Generator[Shot, None, None]:
        raise UnavailableError("cameras need OpenCV")
        yield

    source = Script(is_missing)
    with Feed(source, 1) as feed, pytest.raises(UnavailableError, match="need OpenCV"):
        feed.frames.take()
    assert source.num_openings == 1


def test_a_picture_of_a_connection_that_was_given_up_comes_too_late() -> None:
    wanted, released, ended = Event(), Event(), Event()

    def picture() -> NDArray[np.uint8]:
        wanted.set()
        assert released.wait(20)
        return PICTURE

    def is_late(_: Event) -> Generator[Shot, None, None]:
        try:
            yield Shot(None, picture)
        finally:
            ended.set()

    def gives_one(left: Event) -> Generator[Shot, None, None]:
        yield Shot(None, lambda: PICTURE)
        left.wait(20)

    clock = HandClock()
    with Feed(Script(is_late, gives_one), 1000, patience=SOON, clock=clock) as feed:
        assert wanted.wait(20)
        assert clock.loses(feed, SOON.silence)
        assert reached(lambda: feed.frames.num_put == 1)
        released.set()
        assert ended.wait(20)
        assert feed.frames.num_put == 1


def test_opens_nothing_after_it_was_closed() -> None:
    """As it waits for one of the threads that hang to come to itself."""
    released = Event()

    def hangs(_: Event) -> Generator[Shot, None, None]:
        released.wait(20)
        yield Shot(None, lambda: PICTURE)

    class Noting(Clock):
        def __init__(self) -> None:
            self.waits: list[float | None] = []

        def wait(self, changed: Condition, seconds: float | None) -> None:
            self.waits.append(seconds)
            super().wait(changed, seconds)

    source, clock = Script(hangs), Noting()
    patience = Patience(first=1000, silence=0.01, least=0.001, most=77)
    feed = Feed(source, 1, patience=patience, clock=clock)
    assert reached(lambda: 77 in clock.waits and source.num_openings == 3)
    feed.close()
    released.set()
    assert source.num_openings == 3


def test_keeps_nothing_of_a_connection_that_was_lost() -> None:
    """Not even until garbage is collected: it holds a decoder."""
    held: list[weakref.ref[Event]] = []

    def breaks(_: Event) -> Generator[Shot, None, None]:
        of_the_decoder = Event()
        held.append(weakref.ref(of_the_decoder))
        yield Shot(None, lambda: PICTURE)
        raise Lost("it broke off")

    gc.disable()
    try:
        with Feed(Script(breaks, goes_on), 1000, patience=NEVER_SILENT) as feed:
            assert reached(lambda: feed.num_recovered == 1)
            assert reached(lambda: held[0]() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("script", [goes_on, gives(0)])
def test_closes_while_it_waits(
    script: Callable[[Event], Generator[Shot, None, None]],
) -> None:
    source = Script(script)
    feed = Feed(source, 1, patience=Patience(least=1000, most=1000))
    assert reached(lambda: source.num_openings > 0)
    feed.close()
    assert feed.frames.settle(0)
