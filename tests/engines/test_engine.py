from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ppllava_engines.bundle import Bundle, GraphSpec, TensorSpec
from ppllava_engines.engine import Engine, open_engine
from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    InternalError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ppllava_engines.onnxruntime import open_session
from ppllava_export.int8_weights import column_steps, round_columns
from tiny_bundle import WIDTH, scale_spec, write_bundle, write_graph


@pytest.fixture
def scale(tmp_path: Path) -> Engine:
    spec = scale_spec()
    return open_engine(write_graph(tmp_path / "scale.onnx", spec), spec)


def ones(*shape: int, dtype: str = "float32") -> NDArray[Any]:
    return np.ones(shape, dtype)


def test_a_bundle_gives_engines(tmp_path: Path) -> None:
    engine = Bundle.open(write_bundle(tmp_path)).engine("scale", threads=1)
    assert (engine.inputs, engine.outputs) == (scale_spec().inputs, scale_spec().outputs)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    y = engine.run({"w": 2 * ones(2, 3), "x": x})
    assert list(y) == ["y"]
    np.testing.assert_array_equal(y["y"], 2 * x)


def test_an_array_need_not_be_contiguous(scale: Engine) -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2).T
    np.testing.assert_array_equal(scale.run({"x": x, "w": ones(2, 3)})["y"], x)


def test_a_float16_graph_runs_on_any_cpu(tmp_path: Path) -> None:
    spec = scale_spec("float16")
    engine = open_engine(write_graph(tmp_path / "scale.onnx", spec), spec)
    y = engine.run({"x": 3 * ones(1, 3, dtype="float16"), "w": ones(1, 3, dtype="float16")})["y"]
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, [[3, 3, 3]])


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({"x": ones(1, 3)}, "scale: missing inputs ['w'], unknown inputs [], expected ['x', 'w']"),
        (
            {"x": ones(1, 3), "w": ones(1, 3), "z": ones(1)},
            "scale: missing inputs [], unknown inputs ['z'], expected ['x', 'w']",
        ),
        (
            {"x": ones(1, 3, dtype="float64"), "w": ones(1, 3)},
            "scale: input x is float64 (1,3), expected float32 (n,3)",
        ),
        ({"x": ones(1, 3), "w": ones(3)}, "scale: input w is float32 (3), expected float32 (n,3)"),
        (
            {"x": ones(1, 4), "w": ones(1, 3)},
            "scale: input x is float32 (1,4), expected float32 (n,3)",
        ),
        (
            {"x": ones(1, 3), "w": ones(2, 3)},
            "scale: axis n is 1 in x but 2 in w, expected one size",
        ),
        (
            {"x": [[1.0, 1.0, 1.0]], "w": ones(1, 3)},
            "scale: input x is a list, expected float32 (n,3)",
        ),
        (
            {"x": ones(1, 3).astype(">f4"), "w": ones(1, 3)},
            "scale: input x is >f4 (1,3), expected float32 (n,3)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_told(scale: Engine, feeds: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        scale.run(feeds)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((TensorSpec("x", "float32", ("n", 3)),), None),
        ((TensorSpec("x", "float32", ("n", 3)), TensorSpec("v", "float32", ("n", 3))), None),
        ((TensorSpec("x", "float16", ("n", 3)), TensorSpec("w", "float32", ("n", 3))), None),
        ((TensorSpec("x", "float32", ("n",)), TensorSpec("w", "float32", ("n", 3))), None),
        ((TensorSpec("x", "float32", ("n", 4)), TensorSpec("w", "float32", ("n", 3))), None),
        (None, (TensorSpec("z", "float32", ("n", 3)),)),
    ],
)
def test_a_graph_that_is_not_the_manifests_is_told(
    tmp_path: Path,
    inputs: tuple[TensorSpec, ...] | None,
    outputs: tuple[TensorSpec, ...] | None,
) -> None:
    spec = scale_spec()
    path = write_graph(tmp_path / "scale.onnx", spec)
    other = dataclasses.replace(spec, inputs=inputs or spec.inputs, outputs=outputs or spec.outputs)
    with pytest.raises(DataError, match=r"the graph's (in|out)puts are .*, but the manifest says "):
        open_engine(path, other)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 20])
def test_what_is_no_graph_is_told(
    tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scale.onnx"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot load this graph, export it again"):
        open_engine(path, scale_spec())
    assert capfd.readouterr() == ("", "")  # ONNX Runtime prints nothing of its own


def test_a_graph_that_is_cut_short_is_told(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "scale.onnx", scale_spec())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot load this graph"):
        open_session(path)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such graph file"):
        open_engine(tmp_path / "scale.onnx", scale_spec())
    path = write_graph(tmp_path / "scale.onnx", scale_spec())
    with pytest.raises(UnavailableError, match="no engine for device 'npu'"):
        open_engine(path, scale_spec(), device="npu")
    with pytest.raises(UsageError, match="threads is 0, expected 1 or more"):
        open_engine(path, scale_spec(), threads=0)


def test_a_graph_that_fails_on_what_fits_is_our_fault(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # The manifest lets both axes vary, the graph cannot multiply all that this allows.
    a, b = TensorSpec("a", "float32", ("m", "k")), TensorSpec("b", "float32", ("j", "n"))
    spec = GraphSpec("graphs/product.onnx", (a, b), (TensorSpec("c", "float32", ("m", "n")),))
    engine = open_engine(write_graph(tmp_path / "product.onnx", spec, "MatMul"), spec)
    assert engine.run({"a": ones(2, 3), "b": ones(3, 4)})["c"].shape == (2, 4)
    with pytest.raises(InternalError, match="product: ONNX Runtime failed"):
        engine.run({"a": ones(2, 3), "b": ones(2, 4)})
    assert capfd.readouterr() == ("", "")


def write_bfloat16_graph(path: Path) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", WIDTH)) for name in "xy"]
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["narrow", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, (WIDTH, WIDTH), np.eye(WIDTH).ravel())
    return save_graph(path, nodes, values[:1], values[1:], [weight])


def save_graph(path: Path, nodes: Any, inputs: Any, outputs: Any, initializers: Any) -> Path:
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path
    )
    return path


def test_a_bfloat16_graph_is_refused_with_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_bfloat16_graph(tmp_path / "narrow.onnx")
    with pytest.raises(IncompatibleError, match=r"bfloat16 .*: export with --dtype fp32 or fp16"):
        open_session(path)
    assert capfd.readouterr() == ("", "")


def test_int8_products_do_not_saturate(tmp_path: Path) -> None:
    """The largest inputs and weights: of full range, two products already overflow 16 bits."""
    size, step = 64, np.float32(0.01)
    weights = np.full((size, size), 127 * step, np.float32)
    steps = column_steps(weights)
    rounded = round_columns(weights, steps)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", size)) for name in ("x", "y")
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "steps", "zeros"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    arrays = {
        "step": step,
        "zero": np.int8(0),
        "w": rounded,
        "steps": steps,
        "zeros": np.zeros(size, np.int8),
    }
    initializers = [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()]
    path = save_graph(tmp_path / "int8.onnx", nodes, [x], [y], initializers)
    ones = np.full((2, size), 127 * step, np.float32)
    exact = ones @ (rounded * steps)
    for lean in (False, True):
        (got,) = open_session(path, lean=lean).run(None, {"x": ones})
        np.testing.assert_allclose(got, exact, rtol=1e-5)


@pytest.mark.parametrize("awake", [False, True])
def test_threads_sleep_between_runs(tmp_path: Path, awake: bool) -> None:
    session = open_session(write_graph(tmp_path / "scale.onnx", scale_spec()), awake=awake)
    said = session.get_session_options().get_session_config_entry
    assert said("session.force_spinning_stop") == "1"
    assert said("session.intra_op.allow_spinning") == str(int(awake))


def test_a_lean_engine_computes_the_same(tmp_path: Path) -> None:
    spec = scale_spec()
    path = write_graph(tmp_path / "scale.onnx", spec)
    feeds = {"x": ones(2, 3), "w": 2 * ones(2, 3)}
    for lean in (False, True):
        engine = open_engine(path, spec, lean=lean)
        np.testing.assert_array_equal(engine.run(feeds)["y"], 2 * ones(2, 3))
