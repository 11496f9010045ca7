"""What is kept of frames, in each kind of memory, and what questions make of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle, Manifest, Precision
from ppllava_engines.engine import Array, Engine
from ppllava_engines.errors import IncompatibleError, UsageError
from ppllava_engines.memory_layout import MEMORY_KINDS, MemoryKind, MemoryLayout
from ppllava_runtime.recorder import Record, Recorder, frames_per_run
from ppllava_runtime.window import Window

T = 7
WINDOWS = [Window((2, 2, 2), (2, 2, 2)), Window((3, 1, 4), (1, 2, 1)), Window((7, 4, 4), (7, 4, 4))]


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


@pytest.fixture(scope="module")
def values(opened: Bundle) -> NDArray[np.float32]:
    side = opened.manifest.model.image_size
    return np.random.default_rng(0).normal(size=(T, 3, side, side)).astype(np.float32)


@pytest.fixture(scope="module")
def records(opened: Bundle, values: NDArray[np.float32]) -> dict[MemoryKind, Record]:
    return {kind: recorded(opened, kind, values) for kind in MEMORY_KINDS}


def recorder(opened: Bundle, kind: MemoryKind, coupled: bool = False) -> Recorder:
    layout = MemoryLayout.of(opened.manifest, kind)
    return Recorder(opened.engine(layout.vision), layout, opened.manifest, T, coupled)


def recorded(opened: Bundle, kind: MemoryKind, values: NDArray[np.float32]) -> Record:
    made = recorder(opened, kind)
    made.encode(range(T), values)
    return made.finish()


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_rows_may_come_in_parts_and_in_any_order(
    opened: Bundle, values: NDArray[np.float32], records: dict[MemoryKind, Record], kind: MemoryKind
) -> None:
    made = recorder(opened, kind)
    for rows in ([5, 0, 2], [6], [1, 4]):
        made.encode(rows, values[rows])
    made.repeat(0, [3])
    found, whole = made.finish(), records[kind]
    order = [0, 1, 2, 0, 4, 5, 6]
    assert found.nbytes == whole.nbytes == found.layout.num_bytes(T)
    for spec in found.layout.arrays:
        array, expected = np.asarray(found.arrays[spec.name]), np.asarray(whole.arrays[spec.name])
        assert (str(array.dtype), array.shape[1:]) == (spec.dtype, spec.shape[1:])
        # Other frames in a run may move a value across the border of two that can be stored.
        step = {"float16": 1e-3, "int8": 1.0}.get(spec.dtype, 0)
        np.testing.assert_allclose(
            array.astype(float), expected[order].astype(float), rtol=step, atol=1e-5 + (step == 1)
        )


def test_int8_is_within_half_a_step_of_what_was_seen(records: dict[MemoryKind, Record]) -> None:
    exact = np.asarray(records["hidden-fp32"].arrays["hidden"])
    arrays = {name: np.asarray(array) for name, array in records["hidden-int8"].arrays.items()}
    steps = arrays["scales"][..., None]
    np.testing.assert_allclose(steps[..., 0], np.abs(exact).max(axis=-1) / 127, rtol=1e-6)
    assert np.abs(arrays["hidden"]).max() == 127
    # Half a step, and the rounding of both products in float32.
    assert (np.abs(arrays["hidden"] * steps - exact) <= steps * (0.5 + 127 * 2**-22)).all()


class Fixed:
    """A vision engine that gives what it was told."""

    inputs = property(lambda self: self._vision.inputs)
    outputs = property(lambda self: self._vision.outputs)
    limits: Mapping[str, int] = {}

    def __init__(self, vision: Engine, hidden: float) -> None:
        self._vision = vision
        self._hidden = np.float32(hidden)

    def run(
        self, feeds: Mapping[str, Array], keep: Mapping[str, Array] | None = None
    ) -> dict[str, NDArray[Any]]:
        found = self._vision.run(feeds, keep)
        found["hidden"] = np.full_like(found["hidden"], self._hidden)
        return found

    def empty(self, name: str, size: int) -> Array:
        return self._vision.empty(name, size)


@pytest.mark.parametrize("hidden", [0.0, 1e-43, 65504.0])
def test_keeps_the_smallest_and_the_largest(
    opened: Bundle, values: NDArray[np.float32], hidden: float
) -> None:
    for kind in ("hidden", "hidden-int8"):
        layout = MemoryLayout.of(opened.manifest, kind)
        engine = Fixed(opened.engine("vision"), hidden)
        made = Recorder(engine, layout, opened.manifest, T, False)
        made.encode(range(T), values)
        arrays = {name: np.asarray(array) for name, array in made.finish().arrays.items()}
        found = arrays["hidden"] * arrays.get("scales", np.ones((T, 1), np.float32))[..., None]
        np.testing.assert_allclose(found, hidden, rtol=1e-6, atol=1e-42)


def test_refuses_what_float16_does_not_hold(opened: Bundle, values: NDArray[np.float32]) -> None:
    layout = MemoryLayout.of(opened.manifest, "hidden")
    engine = Fixed(opened.engine("vision"), 1e5)
    made = Recorder(engine, layout, opened.manifest, T, False)
    with pytest.raises(UsageError, match=r"hidden goes up to 1\.0e\+05, .* memory 'hidden-fp32'"):
        made.encode(range(T), values)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_a_question_meets_what_is_kept(
    opened: Bundle, records: dict[MemoryKind, Record], kind: MemoryKind, window: Window
) -> None:
    model, record = opened.manifest.model, records[kind]
    text_embed = np.random.default_rng(1).normal(size=(1, model.key_width)).astype(np.float32)
    text_embed /= np.linalg.norm(text_embed)
    layout = record.layout
    pool, weigh = opened.engine(layout.pool), layout.weigh and opened.engine(layout.weigh)
    pooled, relevance = record.pool(text_embed, window, pool, weigh or None)
    arrays = {name: np.asarray(array) for name, array in record.arrays.items()}
    exact = np.asarray(records["hidden-fp32"].arrays["keys"]) @ text_embed[0]
    # Rounded to float16, unit vectors are off by half of 2⁻¹⁰ at most, and so is their product; a
    # token's is rounded before its key is made.
    bound = 1e-5 if kind == "hidden-fp32" else 2**-11 + 1e-5 if kind != "tokens" else 5e-3
    assert np.abs(relevance - exact.reshape(relevance.shape)).max() <= bound
    axes = {"kernel": np.array(window.kernel), "stride": np.array(window.stride)}
    if weigh:
        weights = weigh.run({**arrays, "text_embed": text_embed})["weights"]
        expected = pool.run({"tokens": arrays["tokens"], "weights": weights, **axes})["pooled"]
    else:
        hidden = arrays["hidden"] * arrays.get("scales", np.ones((T, 1), np.float32))[..., None]
        feeds = {"keys": arrays["keys"].astype(np.float32), "hidden": hidden.astype(np.float32)}
        expected = opened.engine("pool").run({**feeds, "text_embed": text_embed, **axes})["pooled"]
    # Shares are float16 where hidden is, and so is what they make before linear_2 runs.
    close = 2**-9 if kind == "hidden" else 1e-5
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=close * np.abs(expected).max())
    assert len(pooled) == window.num_tokens((T, *model.grid))


def test_tokens_of_no_more_frames_than_are_pooled_together_are_looked_at(
    opened: Bundle, records: dict[MemoryKind, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, model = records["tokens"].layout, opened.manifest.model
    pool = opened.engine(layout.pool)
    counts: list[int] = []
    run = pool.run

    def counted(feeds: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
        counts.append(len(feeds["tokens"]))
        return run(feeds)

    monkeypatch.setattr(pool, "run", counted)
    assert layout.weigh
    text_embed = np.ones((1, model.key_width), np.float32)
    records["tokens"].pool(
        text_embed, Window((3, 1, 1), (2, 1, 1)), pool, opened.engine("weigh_tokens")
    )
    assert counts == [3, 3, 3]


class TestFramesPerRun:
    def test_fill_the_cache_and_no_more(self, opened: Bundle) -> None:
        vision, model = opened.engine("vision"), opened.manifest.model
        found = [
            frames_per_run(vision, changed(opened.manifest, vision_width=width))
            for width in (model.vision_width, 1 << 12, 1 << 24)
        ]
        assert found[0] == 4
        assert found == sorted(found, reverse=True)
        assert found[-1] == 1

    def test_are_one_where_a_run_is_rounded_by_all_that_is_in_it(self, opened: Bundle) -> None:
        manifest = dataclasses.replace(opened.manifest, precision=Precision(vision="int8"))
        assert frames_per_run(opened.engine("vision"), manifest) == 1
        static = dataclasses.replace(opened.manifest, precision=Precision(vision="int8-static"))
        assert frames_per_run(opened.engine("vision"), static) == 4

    def test_are_all_or_one_where_frames_see_each_other(self, opened: Bundle) -> None:
        manifest = changed(opened.manifest, frames_coupled=True)
        layout, vision = MemoryLayout.of(manifest, "hidden"), opened.engine("vision")
        counts = [
            Recorder(vision, layout, manifest, T, coupled).frames_per_run
            for coupled in (True, False)
        ]
        assert counts == [T, 1]


def changed(manifest: Manifest, **changes: Any) -> Manifest:
    return dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, **changes))


@pytest.mark.parametrize(
    ("kind", "device", "precision", "message"),
    [
        ("all", "cpu", Precision(), "memory is 'all', expected one of hidden, hidden-fp32"),
        ("tokens", "tensorrt", Precision(), "a GPU keeps 'hidden' in its graphs' own type"),
        ("hidden-fp32", "cpu", Precision("fp16"), "the bundle computes in float16, of which"),
    ],
)
def test_refuses_kinds_that_there_are_not(
    opened: Bundle, kind: MemoryKind, device: str, precision: Precision, message: str
) -> None:
    manifest = dataclasses.replace(opened.manifest, precision=precision)
    with pytest.raises(UsageError, match=message):
        MemoryLayout.of(manifest, kind, device)


def test_names_the_graph_that_a_bundle_has_not(opened: Bundle) -> None:
    graphs = {name: opened.manifest.graphs[name] for name in ("vision", "text", "pool")}
    manifest = dataclasses.replace(opened.manifest, graphs=graphs)
    with pytest.raises(IncompatibleError, match="no graph 'vision_tokens', which memory 'tokens'"):
        MemoryLayout.of(manifest, "tokens")
    assert MemoryLayout.of(manifest, "hidden-fp32").pool == "pool"
    assert MemoryLayout.of(manifest, "hidden", "tensorrt").arrays == graphs["vision"].outputs
