"""What a cache holds is not computed again, and no answer can tell."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cuda_double import CudaDouble
from ppllava_engines.bundle import Bundle
from ppllava_runtime.decoders import Sampling
from ppllava_runtime.decoders.caching import Cache, CachingDecoder
from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder
from ppllava_runtime.decoders.tensorrt import TensorRTDecoder
from tensorrt_double import install, write_plans

Array = NDArray[Any]

BEFORE, AFTER, OTHER = (1, 300, 17, 260), (42, 5, 333, 8, 90), (42, 5, 77)


class Noting(Sampling):
    """Keeps the logits that ids are picked from."""

    seen: list[Array]

    def pick(self, logits: Array, random: np.random.Generator) -> int:
        self.seen.append(logits.copy())
        return super().pick(logits, random)


def noting(**options: Any) -> Noting:
    sampling = Noting(**options)
    object.__setattr__(sampling, "seen", [])
    return sampling


@pytest.fixture(scope="module")
def planned(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("planned")
    opened = Bundle.open(shutil.copytree(bundle, folder / "bundle"))
    write_plans(opened, folder / "graphs", pool_node="inputs")
    return opened


@pytest.fixture(params=["cpu", "cpu fp16", "tensorrt"])
def fresh(
    request: pytest.FixtureRequest, planned: Bundle, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], CachingDecoder]:
    """Makes decoders that hold nothing yet."""
    if request.param == "tensorrt":
        install(monkeypatch, CudaDouble())
        return lambda: TensorRTDecoder(planned)
    if request.param == "cpu":
        return lambda: OnnxRuntimeDecoder.open(planned)
    path: Path = request.getfixturevalue("bundle_fp16")
    return lambda: OnnxRuntimeDecoder.open(Bundle.open(path))


def count_runs(decoder: CachingDecoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens before, rows) of every run from now on."""
    runs: list[tuple[int, int]] = []
    make = decoder._new_cache

    def made(capacity: int) -> Cache:
        cache = make(capacity)
        run = cache.run

        def noted(embeds: Array, length: int) -> NDArray[np.float32]:
            runs.append((length, len(embeds)))
            return run(embeds, length)

        monkeypatch.setattr(cache, "run", noted)
        return cache

    monkeypatch.setattr(decoder, "_new_cache", made)
    return runs


def ask(decoder: CachingDecoder, *parts: Sequence[int], count: int = 6) -> tuple[list[int], Array]:
    """Ids, and the logits that they were picked from."""
    sampling = noting()
    embeds = [decoder.embed(part) for part in parts]
    return list(decoder.generate(embeds, count, sampling)), np.array(sampling.seen)


def test_an_answer_is_the_same_with_a_warm_cache_to_the_last_bit(
    fresh: Callable[[], CachingDecoder],
) -> None:
    warm = fresh()
    prompts = [(BEFORE, AFTER), (BEFORE, OTHER), (BEFORE, AFTER), (BEFORE,), (BEFORE + AFTER,)]
    for parts in prompts:
        (ids, logits), (cold_ids, cold_logits) = ask(warm, *parts), ask(fresh(), *parts)
        assert ids == cold_ids
        np.testing.assert_array_equal(logits, cold_logits)


def test_no_token_is_computed_twice(
    fresh: Callable[[], CachingDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = fresh()
    runs = count_runs(decoder, monkeypatch)
    ask(decoder, BEFORE, AFTER, count=3)
    assert runs == [(0, 4), (4, 5), (9, 1), (10, 1)]
    runs.clear()
    ask(decoder, BEFORE, OTHER, count=1)  # all but what comes after the video
    assert runs == [(4, 3)]
    ids, _ = ask(decoder, BEFORE, AFTER, count=3)
    runs.clear()
    # The next turn follows the answer, whose last id was never run.
    ask(decoder, BEFORE, AFTER, (*ids, 7, 8), count=2)
    assert runs == [(11, 3), (14, 1)]
    runs.clear()
    ask(decoder, BEFORE, AFTER, (*ids, 7, 8), count=1)  # its last logits are wanted again
    assert runs == [(11, 3)]
    runs.clear()
    ask(decoder, BEFORE + AFTER, count=1)  # other runs, other roundings
    assert runs == [(0, 9)]


def test_nothing_is_reused_of_what_another_asked(
    fresh: Callable[[], CachingDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the time of an answer would tell how the one before it began."""
    decoder = fresh()
    runs = count_runs(decoder, monkeypatch)
    parts = [decoder.embed(BEFORE), decoder.embed(AFTER)]
    for owner in ("a", "b", "b", "a"):
        list(decoder.generate(parts, 1, Sampling(), owner=owner))
    assert runs == [(0, 4), (4, 5)] * 2 + [(4, 5)] + [(0, 4), (4, 5)]


class Unread(list[Any]):
    """A list that may grow and is not gone through."""

    def __iter__(self) -> Any:
        raise AssertionError("every element was looked at")


def test_a_step_does_not_look_at_those_before(
    fresh: Callable[[], CachingDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = fresh()
    ask(decoder, BEFORE, AFTER, count=3)
    tape = decoder._idle
    assert tape is not None
    monkeypatch.setattr(tape, "_runs", Unread(tape._runs))
    tape.run(decoder.embed([5]), is_step=True)
    assert tape.length == 4 + 5 + 2 + 1


def test_a_conversation_outgrows_its_cache(
    fresh: Callable[[], CachingDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = fresh()
    runs = count_runs(decoder, monkeypatch)
    parts: list[Sequence[int]] = [BEFORE]
    long = tuple(np.random.default_rng(0).integers(4, 384, 140).tolist())
    for _ in range(3):
        parts.append(long)
        given = ask(decoder, *parts, count=2)
        np.testing.assert_array_equal(given[1], ask(fresh(), *parts, count=2)[1])
    assert [rows for _, rows in runs] == [4, 140, 1, 140, 1, 140, 1]
    assert runs[-2:] == [(284, 140), (424, 1)]  # past the first cache's 256 tokens


def test_answers_that_share_a_beginning_take_turns(fresh: Callable[[], CachingDecoder]) -> None:
    expected = [ask(fresh(), BEFORE, after)[0] for after in (AFTER, OTHER)]
    decoder = fresh()
    ask(decoder, BEFORE, AFTER)
    first, second = (
        decoder.generate([decoder.embed(BEFORE), decoder.embed(after)], 6, Sampling())
        for after in (AFTER, OTHER)
    )
    begun = list(islice(first, 2)), list(islice(second, 3))
    assert [[*begun[0], *first], [*begun[1], *second]] == expected


def test_an_answer_that_overflowed_leaves_nothing_behind(
    fresh: Callable[[], CachingDecoder],
) -> None:
    decoder = fresh()
    expected = ask(fresh(), BEFORE, AFTER)[1]
    spoilt = np.full_like(decoder.embed(AFTER), np.nan)
    list(decoder.generate([decoder.embed(BEFORE), spoilt], 2, Sampling()))
    np.testing.assert_array_equal(ask(decoder, BEFORE, AFTER)[1], expected)


def test_answers_in_several_threads_disturb_none(fresh: Callable[[], CachingDecoder]) -> None:
    prompts = [(*range(4, 20 + 3 * number), 7 + number) for number in range(4)]
    expected = [ask(fresh(), BEFORE, prompt) for prompt in prompts]
    shared = fresh()

    def work(number: int) -> list[tuple[list[int], Array]]:
        return [ask(shared, BEFORE, prompts[number]) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        for found, (ids, logits) in zip(pool.map(work, range(4)), expected, strict=True):
            for each in found:
                assert each[0] == ids
                np.testing.assert_array_equal(each[1], logits)


def test_the_callers_array_may_change(fresh: Callable[[], CachingDecoder]) -> None:
    decoder = fresh()
    before, after = decoder.embed(BEFORE), decoder.embed(AFTER)
    list(decoder.generate([before, after], 2, Sampling()))
    before[:] = decoder.embed(OTHER + OTHER[:1])
    ids = list(decoder.generate([before, after], 6, Sampling()))
    assert ids == ask(fresh(), OTHER + OTHER[:1], AFTER)[0]


def without_memory(decoder: OnnxRuntimeDecoder) -> OnnxRuntimeDecoder:
    """One of the same graphs that holds nothing."""
    return OnnxRuntimeDecoder(decoder._step, decoder._prefill, decoder._table, decoder._spec)


@pytest.fixture(scope="module")
def warm(planned: Bundle) -> OnnxRuntimeDecoder:
    return OnnxRuntimeDecoder.open(planned)


PARTS = st.sampled_from([(5,), (6,), (5, 6), (6, 5, 5)])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3), max_size=6))
@settings(max_examples=25, deadline=None)
def test_whatever_was_asked_before(
    warm: OnnxRuntimeDecoder, history: list[list[tuple[int, ...]]]
) -> None:
    for parts in history:
        ids, logits = ask(warm, *parts, count=2)
        cold_ids, cold_logits = ask(without_memory(warm), *parts, count=2)
        assert ids == cold_ids
        np.testing.assert_array_equal(logits, cold_logits)
