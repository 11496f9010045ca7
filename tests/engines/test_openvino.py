from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ppllava_engines import openvino as backend
from ppllava_engines.bundle import Bundle, GraphSpec, TensorSpec
from ppllava_engines.engine import DEVICES, Engine, open_engine
from ppllava_engines.errors import (
    DataError,
    InternalError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ppllava_engines.onnxruntime import OnnxRuntimeEngine
from ppllava_engines.openvino import OpenVINOEngine, compute_dtype
from ppllava_engines.parity import replay
from ppllava_engines.samples import Samples
from tiny_bundle import scale_spec, write_graph

pytest.importorskip("openvino", reason="NOT RUN: OpenVINO is not here: ppllava-edge[openvino]")

# The limits of `ppllava-check`, as shares of the largest magnitude, for what the CPU computes in.
TOLERANCES = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2}


@pytest.fixture
def scale(tmp_path: Path) -> Engine:
    spec = scale_spec()
    return OpenVINOEngine(write_graph(tmp_path / "scale.onnx", spec), spec)


@pytest.mark.parametrize("kind", ["bundle", "bundle_fp16"])
def test_towers_are_as_near_to_torch_as_onnxruntimes(
    kind: str, request: pytest.FixtureRequest
) -> None:
    opened = Bundle.open(request.getfixturevalue(kind))
    samples = Samples.read(opened.file(opened.manifest.samples))
    vision, text = (opened.engine(name, device="openvino") for name in ("vision", "text"))
    assert isinstance(vision, OpenVINOEngine)
    assert isinstance(text, OpenVINOEngine)
    dtype = vision.inputs[0].dtype
    pixels = samples.pixel_values(opened.manifest.model, dtype)
    found = vision.run({"pixel_values": pixels}) | text.run({"input_ids": samples.text_ids})
    precision = opened.manifest.precision.dtype
    tolerance = TOLERANCES["bf16" if compute_dtype() == "bf16" else precision]
    for name in ("keys", "hidden", "text_embed"):
        expected: NDArray[Any] = getattr(samples, name).astype(np.float64)
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name], expected, atol=tolerance * np.abs(expected).max())


def test_siglips_towers_are_onnxruntimes(tmp_path: Path) -> None:
    import torch

    from ppllava_export.checkpoint import load_checkpoint
    from ppllava_export.graphs import export_text, export_vision
    from tiny_checkpoint import write_checkpoint

    model = load_checkpoint(write_checkpoint(tmp_path, family="siglip"))
    rng = np.random.default_rng(0)
    for export in (export_vision, export_text):
        with torch.no_grad():
            spec = export(model, torch.float32, tmp_path)
        (given,) = spec.inputs
        shape = [axis if isinstance(axis, int) else 3 for axis in given.shape]
        array = rng.integers(0, 40, shape) if given.dtype == "int64" else rng.random(shape)
        feeds = {given.name: array.astype(given.dtype)}
        engines = (open_engine(tmp_path / spec.path, spec, device) for device in DEVICES[:2])
        expected, found = (engine.run(feeds) for engine in engines)
        for name, values in expected.items():
            # Each is as far from the exact values as it may be from torch.
            atol = 2 * TOLERANCES[compute_dtype()] * np.abs(values).max()
            np.testing.assert_allclose(found[name], values, atol=atol)


def test_every_stage_of_a_bundle_is_as_it_was_exported(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    samples = Samples.read(opened.file(manifest.samples))
    parts: dict[str, Any] = {
        name: getattr(manifest, name) for name in ("model", "graphs", "decoder", "precision")
    }
    stages = list(replay(opened.path, samples, **parts, device="openvino"))
    assert [str(stage) for stage in stages if not stage.passed] == []
    # On a CPU that multiplies bfloat16, the towers and nothing else are held to that.
    monkeypatch.setattr(backend, "compute_dtype", lambda: "bf16")
    run = replay(opened.path, samples, **parts, device="openvino")
    limits = {stage.name: stage.tolerance for stage in itertools.islice(run, 5)}
    assert {limits[name] for name in ("keys", "hidden", "text_embed")} == {TOLERANCES["bf16"]}
    assert limits["relevance"] == TOLERANCES["fp32"]


def test_only_the_towers_are_openvinos(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for name in opened.manifest.graphs:
        engine = opened.engine(name, device="openvino", threads=1)
        towers = name in ("vision", "vision_tokens", "text")
        assert isinstance(engine, OpenVINOEngine if towers else OnnxRuntimeEngine)


def test_frames_are_independent_and_any_number_of_them_runs(bundle: Path) -> None:
    engine = Bundle.open(bundle).engine("vision", device="openvino")
    pixels = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    hidden = engine.run({"pixel_values": pixels})["hidden"]
    for row, one in enumerate(pixels):
        alone = engine.run({"pixel_values": one[None]})["hidden"][0]
        atol = TOLERANCES[compute_dtype()] * np.abs(hidden).max()
        np.testing.assert_allclose(alone, hidden[row], atol=atol)


def test_what_a_run_gave_back_stays_what_it_was(scale: Engine) -> None:
    x = np.ones((2, 3), np.float32)
    first = scale.run({"x": x, "w": x})["y"]
    scale.run({"x": 2 * x, "w": x})
    np.testing.assert_array_equal(first, x)
    x[:] = 3  # and what was given is not read again
    np.testing.assert_array_equal(first, np.ones((2, 3)))


def test_outputs_go_where_they_are_to_be_kept(scale: Engine) -> None:
    kept = scale.empty("y", 4)
    assert kept.dtype == np.float32
    assert kept.shape == (4, 3)
    kept = np.zeros((4, 3), np.float32)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert scale.run({"x": x, "w": x}, keep={"y": kept[1:3]}) == {}
    np.testing.assert_array_equal(kept, [[0, 0, 0], *(x * x), [0, 0, 0]])


def test_an_array_need_be_neither_contiguous_nor_writable(scale: Engine) -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2).T
    fixed = np.full((2, 3), 2, np.float32)
    fixed.flags.writeable = False
    np.testing.assert_array_equal(scale.run({"x": x, "w": fixed})["y"], 2 * x)
    half = np.arange(12, dtype=np.float32).reshape(4, 3)[::2]
    np.testing.assert_array_equal(scale.run({"x": half, "w": fixed})["y"], 2 * half)


def test_callers_on_two_threads_do_not_mix(scale: Engine) -> None:
    w = np.ones((64, 3), np.float32)
    given = [np.full((64, 3), value, np.float32) for value in range(40)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: scale.run({"x": x, "w": w})["y"], given))
    for x, y in zip(given, found, strict=True):
        np.testing.assert_array_equal(x, y)


def test_inputs_that_do_not_fit_are_told(scale: Engine) -> None:
    with pytest.raises(DataError, match=r"^scale: missing inputs \['w'\], unknown inputs \[\]"):
        scale.run({"x": np.ones((1, 3), np.float32)})
    with pytest.raises(DataError, match=r"^scale: input x is float64 \(1,3\), expected float32"):
        scale.run({"x": np.ones((1, 3)), "w": np.ones((1, 3), np.float32)})


def test_a_graph_that_fails_on_what_fits_is_our_fault(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = TensorSpec("a", "float32", ("m", "k")), TensorSpec("b", "float32", ("j", "n"))
    spec = GraphSpec("graphs/product.onnx", (a, b), (TensorSpec("c", "float32", ("m", "n")),))
    engine = OpenVINOEngine(write_graph(tmp_path / "product.onnx", spec, "MatMul"), spec)
    left, right = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)
    with pytest.raises(InternalError, match=r"^product: OpenVINO failed: [^\n]+$"):
        engine.run({"a": left, "b": right})
    assert engine.run({"a": left[:, :2], "b": right})["c"].shape == (2, 4)  # still of use
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 20])
def test_what_is_no_graph_is_told(
    tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vision.onnx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^[^\n]*(cannot load this graph|inputs are none)[^\n]*$"):
        open_engine(path, scale_spec(), device="openvino")
    assert capfd.readouterr() == ("", "")  # nor do OpenVINO's readers of other formats print


def test_a_graph_of_ops_that_openvino_has_not_is_told(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    spec = opened.manifest.graphs["pool"]
    with pytest.raises(DataError, match=r"take device 'cpu' or .*ppllava\.StridedWeightedPool"):
        OpenVINOEngine(opened.file(spec.path), spec)


def test_a_graph_that_is_not_the_manifests_is_told(tmp_path: Path) -> None:
    spec = scale_spec()
    path = write_graph(tmp_path / "scale.onnx", spec)
    for other, said in (
        ({"outputs": (TensorSpec("z", "float32", ("n", 3)),)}, "outputs are y float32"),
        ({"inputs": spec.inputs[:1]}, "inputs are x float32"),
        ({"outputs": (TensorSpec("y", "float16", ("n", 3)),)}, "outputs are y float32"),
        ({"outputs": (TensorSpec("y", "float32", ("n", 4)),)}, "outputs are y float32"),
    ):
        with pytest.raises(DataError, match=f"the graph's {said}.*, but the manifest says "):
            OpenVINOEngine(path, dataclasses.replace(spec, **other))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such graph file"):
        OpenVINOEngine(tmp_path / "scale.onnx", scale_spec())
    path = write_graph(tmp_path / "scale.onnx", scale_spec())
    with pytest.raises(UsageError, match="threads is 0, expected 1 or more"):
        OpenVINOEngine(path, scale_spec(), threads=0)


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "openvino", None)
    backend._library.cache_clear()
    yield
    backend._library.cache_clear()


@pytest.mark.usefixtures("uninstalled")
def test_a_missing_package_is_told_with_the_command(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "vision.onnx", scale_spec())
    with pytest.raises(UnavailableError, match=r"pip install 'ppllava-edge\[openvino\]'$"):
        open_engine(path, scale_spec(), device="openvino")


SIZE = 64


def linear(path: Path, nodes: list[Any], **arrays: NDArray[Any]) -> Path:
    """The file `path`: y (n,SIZE) from x (n,SIZE), the arrays as initializers."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ("n", SIZE)) for n in ("x", "y"))
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "linear", [x], [y], weights)
    opset = helper.make_opsetid("", 23)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_int8_layers_are_within_their_steps(tmp_path: Path, kind: str) -> None:
    """What rounding x costs at most, of the exporter's weights and inputs that overflow others."""
    from ppllava_export.int8_weights import column_steps, round_columns

    rng = np.random.default_rng(0)
    steps = column_steps(made := rng.uniform(-0.2, 0.2, (SIZE, SIZE)).astype(np.float32))
    arrays: dict[str, Any] = {"w": round_columns(made, steps), "steps": steps}
    weights = arrays["w"] * steps.astype(np.float64)
    x = np.concatenate([4 * np.sign(weights.T), rng.uniform(-4, 4, (20, SIZE))], dtype=np.float32)
    make = helper.make_node
    if kind == "static":
        step = 4 / 127
        arrays |= {"step": np.float32(step), "zero": np.int8(0)}
        nodes = [
            make("QuantizeLinear", ["x", "step", "zero"], ["q"]),
            make("DequantizeLinear", ["q", "step", "zero"], ["d"]),
            make("DequantizeLinear", ["w", "steps"], ["wd"], axis=1),
            make("MatMul", ["d", "wd"], ["y"]),
        ]
    else:
        step = 8 / 255
        nodes = [
            make("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            make("MatMulInteger", ["q", "w", "z"], ["sum"]),
            make("Cast", ["sum"], ["wide"], to=TensorProto.FLOAT),
            make("Mul", ["s", "steps"], ["scale"]),
            make("Mul", ["wide", "scale"], ["y"]),
        ]
    path = linear(tmp_path / "int8.onnx", nodes, **arrays)
    given, product = (TensorSpec(name, "float32", ("n", SIZE)) for name in "xy")
    engine = OpenVINOEngine(path, GraphSpec("graphs/int8.onnx", (given,), (product,)))
    got = engine.run({"x": x})["y"]
    # Half a step of x in each product, a whole one where the zero point is rounded; then floats.
    exact = x.astype(np.float64) @ weights
    rounding = np.abs(weights).sum(axis=0) * step * (0.5 if kind == "static" else 1)
    floats = TOLERANCES[compute_dtype()] * np.abs(exact).max()
    assert (np.abs(got - exact) <= rounding + floats).all()


# Runs a graph on one thread with OpenVINO. A package of the name that reports is first on the path.
SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np
from ppllava_engines.openvino import OpenVINOEngine
from tiny_bundle import scale_spec
engine = OpenVINOEngine(Path(sys.argv[1]), scale_spec(), threads=1)
engine.run({name: np.ones((1, 3), np.float32) for name in "xw"})
files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:-1]]
print(sys.modules["openvino_telemetry"], sum(name.startswith("socket:") for name in files))
"""


def test_openvino_reports_nothing_to_anyone(tmp_path: Path) -> None:
    home, stand_in = tmp_path / "home", tmp_path / "path" / "openvino_telemetry"
    home.mkdir()
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("import os; os.write(2, b'imported'); os._exit(1)\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    environment |= {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(stand_in.parent), *sys.path]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    graph = write_graph(tmp_path / "scale.onnx", scale_spec())

    def run(script: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-c", script, str(graph)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    assert run(SCRIPT) == (0, "None 0\n", "")
    assert list(home.rglob("*")) == []
    assert run("import openvino") == (1, "", "imported")  # so there was something to prevent
