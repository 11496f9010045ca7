"""Samples and their replay: what is stored comes back, and what is wrong with a graph shows."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ppllava_engines.bundle import Bundle, Precision
from ppllava_engines.errors import DataError, IncompatibleError, InternalError
from ppllava_engines.memory_parity import MEMORY_STAGES
from ppllava_engines.parity import STAGES, Parity, Stage, replay
from ppllava_engines.samples import SAMPLES, Samples, prompt_embeds


def tiny_samples(**changes: Any) -> Samples:
    floats = np.linspace(-1, 1, 24, dtype=np.float32)
    samples = Samples(
        frames=np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3),
        text_ids=np.array([[0, 3, 1]]),
        prompt_before=np.array([1, 2]),
        prompt_after=np.array([4]),
        kernel=np.array([2, 1, 1]),
        stride=np.array([2, 1, 1]),
        tokens=floats.reshape(2, 4, 3).astype(np.float16),
        norms=np.abs(floats[:8]).reshape(2, 4),
        keys=floats.reshape(2, 4, 3),
        hidden=floats.reshape(2, 4, 3),
        text_embed=floats[:3][None],
        pooled=floats[:12].reshape(4, 3),
        relevance=floats[:8].reshape(2, 2, 2),
        logits=floats[:5][None],
        gain=np.array(2.5, np.float32),
    )
    return dataclasses.replace(samples, **changes)


def test_samples_come_back_and_their_file_depends_on_nothing_else(tmp_path: Path) -> None:
    samples = tiny_samples(keys=np.full((2, 4, 3), 0.1, np.float16))
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    samples.write(first)
    samples.write(second)
    assert first.read_bytes() == second.read_bytes()
    back = Samples.read(first)
    for field in dataclasses.fields(Samples):
        stored, read = getattr(samples, field.name), getattr(back, field.name)
        assert (read.dtype, read.shape) == (stored.dtype, stored.shape)
        np.testing.assert_array_equal(read, stored)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    change(arrays)
    np.savez(path, **arrays)


def replace_content(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for field in dataclasses.fields(Samples):
            archive.writestr(f"{field.name}.npy", content)


def replace_by_pickle(path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], object))
    replace_content(path, stream.getvalue())


def endless(path: Path) -> None:
    """Writes headers of arrays that no memory holds."""
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**13,)}
    np.lib.format.write_array_header_1_0(stream, header)
    replace_content(path, stream.getvalue())


def marked(path: Path, place: int, value: int) -> None:
    """Writes a number into the header of every entry of the archive, at `place` of its own."""
    content = bytearray(path.read_bytes())
    for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        at = content.find(signature)
        while at >= 0:
            content[at + place + shift] = value
            at = content.find(signature, at + 4)
    path.write_bytes(content)


FLAGS, COMPRESSION = 6, 8  # places in an entry's header

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda path: path.unlink(), "not the samples of an export"),
    "no archive": (lambda path: path.write_bytes(b"samples"), "not the samples of an export"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:600]), "not the samples"),
    "pickled": (replace_by_pickle, "allow_pickle=False"),
    "no arrays": (lambda path: replace_content(path, b"keys"), r"frames is \|S4 of 0 axes"),
    "endless": (endless, "Unable to allocate"),
    "encrypted": (lambda path: marked(path, FLAGS, 1), "encrypted"),
    "compressed": (lambda path: marked(path, COMPRESSION, 99), "compression method"),
    "less": (lambda path: rewritten(path, lambda arrays: arrays.pop("gain")), "'gain'"),
    "more": (lambda path: rewritten(path, lambda arrays: arrays.update(x=1)), "'x'"),
    "type": (
        lambda path: rewritten(path, lambda a: a.update(keys=a["keys"].astype("float64"))),
        "keys is float64 of 3 axes, expected float32 or float16 of 3",
    ),
    "axes": (
        lambda path: rewritten(path, lambda a: a.update(frames=a["frames"][0])),
        "frames is uint8 of 3 axes, expected uint8 of 4",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_are_no_samples_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / SAMPLES
    tiny_samples().write(path)
    damage, said = DAMAGE[name]
    damage(path)
    with pytest.raises(DataError, match=said) as caught:
        Samples.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("token", [-1, 5])
def test_ids_that_the_embedding_table_has_not_are_told(tmp_path: Path, token: int) -> None:
    table = tmp_path / "embedding.npy"
    np.save(table, np.arange(10, dtype=np.float32).reshape(5, 2))
    pooled, ids = np.ones((1, 2)), np.array([4])
    expected = [[[8, 9], [1, 1], [8, 9]]]
    np.testing.assert_array_equal(prompt_embeds(table, 9, ids, pooled, ids), expected)
    for prompt in ((ids, np.array([token])), (np.array([token]), ids)):
        with pytest.raises(DataError, match=f"has 5 rows, .* prompt has ids .*{token}"):
            prompt_embeds(table, 9, prompt[0], pooled, prompt[1])
    with pytest.raises(DataError, match=r"rows of 2, .* pooled tokens are of 3"):
        prompt_embeds(table, 9, ids, np.ones((1, 3)), ids)


def test_a_stage_measures_errors_by_the_largest_magnitude_expected() -> None:
    stage = Stage.of("keys", np.array([1.0, 4.2]), np.array([1.0, -4.0]), tolerance=2.05)
    assert stage.max_error == pytest.approx(8.2 / 4)
    assert stage.cosine == pytest.approx((1 - 4.2 * 4) / np.sqrt((1 + 4.2**2) * 17))
    assert stage.passed
    assert not dataclasses.replace(stage, min_cosine=0.0).passed
    assert (stage.limit, dataclasses.replace(stage, tolerance=None, min_cosine=0.9).limit) == (
        "error ≤ 2e+00",
        "cosine ≥ 0.9",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("side", ["got", "expected"])
def test_what_is_not_finite_or_nothing_at_all_never_passes(value: float, side: str) -> None:
    arrays = {"got": np.ones(2), "expected": np.ones(2)} | {side: np.full(2, value)}
    for limits in ({"tolerance": 1e30}, {"min_cosine": 0.5}):
        assert not Stage.of("keys", arrays["got"], arrays["expected"], **limits).passed


def test_shapes_that_differ_are_our_fault() -> None:
    with pytest.raises(InternalError, match=r"keys: graph gives \(2,\), torch \(3,\)"):
        Stage.of("keys", np.ones(2), np.ones(3))


def test_a_report_comes_back_and_names_every_stage_that_is_too_far(tmp_path: Path) -> None:
    far = Stage.of("hidden", np.array([1.0, 2.0]), np.array([1.0, 2.001]), tolerance=2e-5)
    lost = Stage.of("keys", np.array([np.nan]), np.array([1.0]), tolerance=2e-5)
    bent = Stage.of("logits", np.array([1.0, 0.0]), np.array([1.0, 1.0]), min_cosine=0.9)
    near = Stage.of("pooled", np.array([1.0]), np.array([1.0]), tolerance=2e-5)
    parity = Parity("fp32, decoder int4", "some backend", (far, lost, bent, near))
    parity.write(tmp_path)
    assert Parity.read(tmp_path) == parity
    with pytest.raises(InternalError) as caught:
        parity.require()
    said = str(caught.value)
    assert said.startswith("fp32, decoder int4 graphs are too far from torch")
    assert "hidden: max error 5.0e-04, cosine 1.00000 (expected error ≤ 2e-05)" in said
    assert "keys: max error 1.8e+308" in said
    assert "logits: max error 1.0e+00, cosine 0.70711 (expected cosine ≥ 0.9)" in said
    assert "pooled" not in said
    with pytest.raises(IncompatibleError, match=r"logits: .*: calibrate on more videos"):
        Parity("fp32, decoder int4", "some backend", (bent, near)).require()
    nan = Stage.of("logits", np.array([np.nan]), np.array([1.0]), min_cosine=0.9)
    with pytest.raises(InternalError):  # no loss of precision
        Parity("fp32, decoder int4", "some backend", (nan,)).require()
    (tmp_path / "parity.json").write_text("{}")
    with pytest.raises(DataError, match="misses 'precision'"):
        Parity.read(tmp_path)


def replayed(folder: Path, samples: Samples, precision: Precision, lean: bool) -> dict[str, Stage]:
    manifest = Bundle.open(folder).manifest
    stages = replay(
        folder,
        samples,
        model=manifest.model,
        graphs=manifest.graphs,
        decoder=manifest.decoder,
        precision=precision,
        threads=1,
        lean=lean,
    )
    return {stage.name: stage for stage in stages}


@pytest.mark.parametrize("name", ["bundle", "bundle_fp16"])
def test_a_bundle_replays_its_own_samples(request: pytest.FixtureRequest, name: str) -> None:
    folder = request.getfixturevalue(name)
    precision = Bundle.open(folder).manifest.precision
    samples = Samples.read(folder / SAMPLES)
    for lean in (False, True):
        stages = replayed(folder, samples, precision, lean)
        memories = list(MEMORY_STAGES if name == "bundle" else MEMORY_STAGES[1:])
        assert list(stages) == [*STAGES, *memories]
        assert all(stage.passed for stage in stages.values()), stages
    # One stage's inputs are not another's outputs: only what is changed is far.
    other = dataclasses.replace(samples, hidden=samples.hidden + samples.hidden.dtype.type(1))
    stages = replayed(folder, other, precision, lean=False)
    failed = [n for n, stage in stages.items() if not stage.passed]
    memories = ["pooled_fp16"] if name == "bundle" else []
    assert failed == ["hidden", "pooled", *memories, "pooled_int8"]
    other = dataclasses.replace(samples, tokens=samples.tokens[:, ::-1])
    stages = replayed(folder, other, precision, lean=False)
    failed = [n for n, stage in stages.items() if not stage.passed]
    assert failed == ["tokens", "relevance_tokens", "pooled_tokens"]


def test_quantised_parts_are_held_to_their_direction(bundle: Path) -> None:
    samples = Samples.read(bundle / SAMPLES)
    stages = replayed(bundle, samples, Precision("fp32", "int8", "int4"), lean=True)
    held = {name for name, stage in stages.items() if stage.min_cosine is not None}
    assert held == {"keys", "hidden", "logits", *MEMORY_STAGES[1:]}
    assert all((s.tolerance is None) == (n in held) for n, s in stages.items())


def test_a_weight_that_changed_shows_in_its_own_stage(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    pool = onnx.load(copy / "graphs/pool.onnx")
    (bias,) = (t for t in pool.graph.initializer if t.name == "linear_2_bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    manifest = Bundle.open(bundle).manifest
    onnx.save(pool, copy / "graphs/pool.onnx")
    stages = replay(
        copy,
        Samples.read(bundle / SAMPLES),
        model=manifest.model,
        graphs=manifest.graphs,
        decoder=manifest.decoder,
        precision=manifest.precision,
    )
    # Embedded, a copy of it is in each of the other pool graphs; none of them has changed.
    assert [stage.name for stage in stages if not stage.passed] == ["pooled"]


def test_a_report_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "parity.json")
    with pytest.raises(DataError, match=r"parity\.json: not a file"):
        Parity.read(tmp_path)
    (tmp_path / "parity.json").unlink()
    (tmp_path / "parity.json").mkdir()
    with pytest.raises(DataError, match=r"parity\.json: not a file"):
        Parity.read(tmp_path)
