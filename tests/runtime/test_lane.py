"""Several threads and one device: who waits is served in turn, and nobody disturbs another."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_double import CudaDouble
from ppllava_engines.bundle import Bundle
from ppllava_runtime import Assistant, MemoryStore, Video
from ppllava_runtime.conversation import TURNS, Turns
from ppllava_runtime.decoders.caching import Cache, CachingDecoder
from ppllava_runtime.lane import Lane, LoadedOnce
from tensorrt_double import install, write_plans
from tiny_videos import numbered_frames, write_video

QUESTIONS = ("What colour is the circle?", "And the square?", "Who said so?", "Why is it red?")
LONG = 60.0  # seconds; nothing that is waited for takes a tenth of it
MOST = 12


def waited_for(lane: Lane, count: int) -> None:
    """Returns when so many threads wait for it."""
    pause = Event()
    for _ in range(int(LONG / 0.001)):
        if lane.num_waiting == count:
            return
        pause.wait(0.001)
    raise AssertionError(f"{lane.num_waiting} wait, expected {count}")


# Another thread holds the lane; Ctrl-C comes to the one that waits for it.
INTERRUPTED = """
import os, signal, threading
from ppllava_runtime.lane import Lane
def interrupt(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupt)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
lane, entered, leave = Lane(), threading.Event(), threading.Event()
def hold():
    with lane:
        entered.set()
        pause = threading.Event()
        while not lane.num_waiting:
            pause.wait(0.001)
        while lane.num_waiting:  # one that comes just before the other blocks is not noticed
            os.kill(os.getpid(), signal.SIGINT)
            pause.wait(0.1)
        assert leave.wait(60)
holder = threading.Thread(target=hold)
holder.start()
assert entered.wait(60)
try:
    with lane:
        raise SystemExit("it was entered")
except KeyboardInterrupt:
    assert lane.num_waiting == 0
leave.set()
holder.join()
with lane:
    pass
"""


class TestLane:
    def test_is_given_in_the_order_of_asking(self) -> None:
        lane, came = Lane(), list[int]()

        def work(number: int) -> None:
            for _ in range(3):
                with lane:
                    came.append(number)
                    # All others are back in the queue before this one goes on.
                    if len(came) <= 6:
                        waited_for(lane, 3)

        threads = [Thread(target=work, args=(number,)) for number in range(4)]
        with lane:
            for count, thread in enumerate(threads):
                thread.start()
                waited_for(lane, count + 1)
        for thread in threads:
            thread.join(LONG)
        # Whoever has left goes behind those that wait, and not before them.
        assert came[:6] == [0, 1, 2, 3, 0, 1]
        assert sorted(came) == sorted([*range(4)] * 3)

    def test_may_be_entered_again_by_who_is_in_it(self) -> None:
        lane, others = Lane(), list[str]()

        def work() -> None:
            with lane:
                others.append("came")

        thread = Thread(target=work)
        with lane, lane:
            with lane:
                thread.start()
                waited_for(lane, 1)
            assert not others
        thread.join(LONG)
        assert others == ["came"]

    def test_is_left_by_what_fails_in_it(self) -> None:
        lane = Lane()
        with pytest.raises(KeyError), lane:
            raise KeyError
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lane.__enter__).result(LONG) is None

    def test_waits_no_longer_for_who_was_interrupted(self) -> None:
        """In a process of its own: who runs tests may handle signals in its own way."""
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")

    def test_never_lets_two_in(self) -> None:
        lane, inside, most = Lane(), list[int](), list[int]()

        def work(number: int) -> None:
            for _ in range(200):
                with lane:
                    inside.append(number)
                    most.append(len(inside))
                    inside.remove(number)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert most == [1] * 1600
        assert lane.num_waiting == 0


class TestLoadedOnce:
    class Thing:
        """Something that takes long to load."""

        def __init__(self) -> None:
            self.lane = Lane()
            self.count = 0

        @LoadedOnce
        def part(self) -> object:
            """A part."""
            self.count += 1
            assert self.whole
            return object()

        @LoadedOnce
        def whole(self) -> object:
            """What a part needs."""
            return object()

    def test_is_the_same_for_all(self) -> None:
        thing, start = self.Thing(), Barrier(8)

        def load(_: int) -> object:
            start.wait(LONG)
            return thing.part

        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(load, range(8)))
        assert found == {thing.part}
        assert thing.count == 1
        thing.part = "another"
        assert thing.part == "another"
        assert self.Thing.part.__doc__ == "A part."

    def test_that_fails_is_tried_again(self) -> None:
        class Failing:
            def __init__(self) -> None:
                self.lane = Lane()
                self.reasons = [OSError("busy")]

            @LoadedOnce
            def part(self) -> int:
                if self.reasons:
                    raise self.reasons.pop()
                return 7

        failing = Failing()
        with pytest.raises(OSError, match="busy"):
            _ = failing.part
        assert failing.part == 7


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, frames = tmp_path_factory.mktemp("videos"), numbered_frames(24)
    return [
        write_video(folder / f"{number}.mp4", frames[number : number + 20], options={"g": "10"})
        for number in range(4)
    ]


def at_once(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """What each thread made, that all began together."""
    start = Barrier(count)

    def begin(number: int) -> Any:
        start.wait(LONG)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


Told = tuple[tuple[int, ...], NDArray[np.float32], str]


def asked(video: Video, number: int, **options: Any) -> Told:
    answer = video.ask(QUESTIONS[number], max_new_tokens=MOST, **options)
    return answer.ids, answer.relevance, answer.text


@pytest.fixture(scope="module")
def planned(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("planned")
    opened = Bundle.open(shutil.copytree(bundle, folder / "bundle"))
    write_plans(opened, folder / "graphs", pool_node="inputs")
    return opened


@pytest.mark.parametrize("device", ["cpu", "tensorrt"])
def test_answers_at_once_are_those_of_one_after_the_other(
    planned: Bundle, clips: list[Path], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "tensorrt":
        install(monkeypatch, CudaDouble())
    options = {"temperature": 1.5, "seed": 3}
    alone = Assistant(planned, device=device)
    expected = [asked(alone.watch(clip, 6), i, **options) for i, clip in enumerate(clips)]
    # Not loaded: who comes first does it, for all.
    shared = Assistant(planned, device=device, store=MemoryStore(1 << 30))

    def work(number: int) -> list[Told]:
        return [asked(shared.watch(clips[number], 6), number, **options) for _ in range(3)]

    for found, (ids, relevance, text) in zip(at_once(work), expected, strict=True):
        for each in found:
            assert (each[0], each[2]) == (ids, text)
            np.testing.assert_array_equal(each[1], relevance)


def test_one_video_may_be_asked_by_several(bundle: Path, clips: list[Path]) -> None:
    assistant = Assistant.open(bundle)
    video = assistant.watch(clips[0], 6)
    answers = at_once(lambda number: video.ask(QUESTIONS[number], max_new_tokens=MOST))
    ids = at_once(lambda number: answers[number].ids)
    # Watching is paid for once, whoever was first.
    assert sorted(answer.accounting.num_frames_encoded for answer in answers) == [0, 0, 0, 6]
    assert ids == [video.ask(words, max_new_tokens=MOST).ids for words in QUESTIONS]


def test_a_long_prompt_lets_a_step_in_between(
    bundle: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = Assistant.open(bundle).load()
    decoder = assistant.decoder
    assert isinstance(decoder, CachingDecoder)
    made, caches, runs = decoder._new_cache, list[int](), list[str]()

    def noted(capacity: int) -> Cache:
        cache: Any = made(capacity)
        caches.append(len(caches))
        number, run = caches[-1], cache.run

        def waiting(embeds: NDArray[Any], length: int) -> Any:
            if number == 1 and not reader.ident:
                reader.start()
                waited_for(assistant.lane, 1)  # for the next id of the first answer
            runs.append(f"answer {number} at {length}")
            return run(embeds, length)

        cache.run = waiting
        made_so: Cache = cache
        return made_so

    monkeypatch.setattr(decoder, "_new_cache", noted)
    first = assistant.ask(QUESTIONS[0], max_new_tokens=200, temperature=3.0, seed=1)
    pieces = iter(first)
    assert next(pieces)
    runs.clear()
    reader = Thread(target=lambda: next(pieces))
    assert assistant.watch(clips[0], 6).ask(QUESTIONS[1], max_new_tokens=1).ids
    reader.join(LONG)
    # Of its prompt, what is before the video; then who waits; then the rest.
    assert [run.split(" at ")[0] for run in runs[:3]] == ["answer 1", "answer 0", "answer 1"]
    assert runs[0] == "answer 1 at 0"


def test_an_answer_may_be_closed_by_who_does_not_read_it(bundle: Path) -> None:
    assistant = Assistant.open(bundle)
    answer = assistant.ask(QUESTIONS[0], max_new_tokens=200, temperature=3.0, seed=1)
    pieces = iter(answer)
    next(pieces)
    with ThreadPoolExecutor(1) as pool:
        with assistant.lane:  # so that the reader waits in the middle of a step
            reading = pool.submit(lambda: list(pieces))
            waited_for(assistant.lane, 1)
            answer.close()
            assert not reading.done()
        rest = reading.result(LONG)
    assert len(rest) <= 2  # the step that was under way, and what was held back
    assert 1 < len(answer.ids_so_far) < 10
    assert answer.finish_reason == "stop"


class TestAnswerThatIsClosed:
    def test_as_its_reader_leaves_it_ends_all_the_same(self, bundle: Path) -> None:
        assistant = Assistant.open(bundle)
        answer = assistant.ask(QUESTIONS[0], max_new_tokens=200, temperature=3.0, seed=1)
        reading = answer._reading

        class Late:
            """The lock of who reads, which leaves it just after another one closes the answer."""

            acquire, release = reading.acquire, reading.release

            def __enter__(self) -> None:
                reading.acquire()

            def __exit__(self, *_: object) -> None:
                answer.close()
                reading.release()

        answer._reading = Late()  # type: ignore[assignment]  # a lock in all that is used of one
        assert answer._advance()
        assert inspect.getgeneratorstate(answer._coming) == inspect.GEN_CLOSED
        assert answer.finish_reason == "stop"

    @pytest.mark.parametrize("turns", TURNS)
    def test_by_the_next_question_is_the_same_in_all_that_follow(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch, turns: Turns
    ) -> None:
        assistant = Assistant.open(bundle).load()
        generate, lengths = assistant.decoder.generate, list[int]()

        def noted(parts: Any, *rest: Any) -> Any:
            lengths.append(sum(map(len, parts)))
            return generate(parts, *rest)

        monkeypatch.setattr(assistant.decoder, "generate", noted)
        conversation = assistant.converse(turns)
        left = conversation.ask(QUESTIONS[0], max_new_tokens=200, temperature=3.0, seed=1)
        next(iter(left))
        count = len(left.ids_so_far)
        with ThreadPoolExecutor(1) as pool:
            with assistant.lane:  # so that the reader waits in the middle of a step
                reading = pool.submit(lambda: left.ids)
                waited_for(assistant.lane, 1)
                later = conversation.ask(QUESTIONS[1], max_new_tokens=1)
            assert len(reading.result(LONG)) == count + 1  # which came too late
        said = len(later.ids)
        conversation.ask(QUESTIONS[2], max_new_tokens=1)
        new = len(assistant.prompts.build_next(QUESTIONS[2]).ids)
        assert lengths[2] == lengths[1] + said + new
