"""The custom op in the real ONNX Runtime: it takes over from the body, and refuses in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from ppllava_engines.errors import DataError, UnavailableError
from ppllava_engines.native import CUSTOM_OPS, find_library, get_library
from ppllava_engines.onnxruntime import open_session
from ppllava_export.pool_graph import DOMAIN, FUNCTION, OP_TYPE, OPSET

SIZE, WIDTH = (4, 6, 6), 5
FATAL_ONLY = 4


def write_graph(path: Path, dtype: str = "float", body: bool = False, attribute: str = "") -> Path:
    """A graph that is the one node, with inputs whose shapes nobody promises."""
    attribute = attribute or "<temperature = 0.01>"
    model = onnx.parser.parse_model(f"""
        <ir_version: 11, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>
        one_node ({dtype}[] hidden, float[] weights, int64[] kernel, int64[] stride)
        => ({dtype}[N,D] pooled)
        {{ pooled = {DOMAIN}.{OP_TYPE} {attribute} (hidden, weights, kernel, stride) }}
    """)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    if body:
        model.functions.append(onnx.parser.parse_function(FUNCTION))
    onnx.save(model, str(path))
    return path


def feeds(dtype: Any = np.float32) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.standard_normal((*SIZE, WIDTH)).astype(dtype),
        "weights": rng.dirichlet(np.ones(144)).astype(np.float32).reshape(SIZE),
        "kernel": np.array([2, 3, 3]),
        "stride": np.array([2, 3, 3]),
    }


def plain_session(path: Path, library: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def installed() -> Path:
    """The library that sessions of this package load."""
    library = find_library(CUSTOM_OPS)
    if library is None:
        pytest.skip("NOT RUN: the op was not compiled when this package was installed")
    return library


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("body", [False, True])
@pytest.mark.usefixtures("installed")
def test_sessions_of_this_package_run_it(
    tmp_path: Path, body: bool, dtype: str, threads: int, lean: bool
) -> None:
    numpy_type = np.float32 if dtype == "float" else np.float16
    session = open_session(write_graph(tmp_path / "op.onnx", dtype, body), threads, lean=lean)
    reference = plain_session(write_graph(tmp_path / "body.onnx", dtype, body=True))
    (pooled,) = session.run(None, feeds(numpy_type))
    (expected,) = reference.run(None, feeds(numpy_type))
    assert pooled.shape == (8, WIDTH)
    assert pooled.dtype == numpy_type
    tolerance = 2e-6 if dtype == "float" else 2e-3
    assert np.abs(pooled.astype(float) - expected).max() <= tolerance * np.abs(expected).max()


def test_it_takes_over_from_the_body(tmp_path: Path, strict: Path) -> None:
    """Of bfloat16: ONNX Runtime's CPU has no product of it, so the body cannot run."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 11, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>
        one_node (float[T,h,w,D] hidden, float[T,h,w] weights, int64[3] kernel, int64[3] stride)
        => (float[N,D] pooled) {{
            narrow = Cast <to = {onnx.TensorProto.BFLOAT16}> (hidden)
            made = {DOMAIN}.{OP_TYPE} <temperature = 0.01> (narrow, weights, kernel, stride)
            pooled = Cast <to = {onnx.TensorProto.FLOAT}> (made)
        }}
    """)
    model.functions.append(onnx.parser.parse_function(FUNCTION))
    path = tmp_path / "bfloat16.onnx"
    onnx.save(model, str(path))
    with pytest.raises(Exception, match="MatMul"):
        plain_session(path)
    assert plain_session(path, strict / CUSTOM_OPS).run(None, feeds())[0].shape == (8, WIDTH)


def test_a_graph_without_the_body_needs_it(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=OP_TYPE):
        plain_session(write_graph(tmp_path / "op.onnx"))


def test_sessions_come_and_go(tmp_path: Path, strict: Path) -> None:
    path = write_graph(tmp_path / "op.onnx")
    results = [plain_session(path, strict / CUSTOM_OPS).run(None, feeds())[0] for _ in range(5)]
    assert all((result == results[0]).all() for result in results)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("hidden", (4, 6, 6), r"hidden has shape \(4, 6, 6\), expected \(T, h, w, D\)"),
        ("hidden", (1, 4, 6, 6, 5), r"hidden has shape \(1, 4, 6, 6, 5\), expected"),
        ("hidden", (1,) * 9, r"hidden has shape \(9 axes\), expected"),
        ("weights", (4, 6, 7), r"weights has shape \(4, 6, 7\), expected hidden's first three"),
        ("weights", (), r"weights has shape \(\), expected"),
        ("kernel", (2,), r"kernel has shape \(2\), expected \(3\)"),
        ("stride", (3, 1), r"stride has shape \(3, 1\), expected \(3\)"),
    ],
)
def test_wrong_shapes_are_named(
    tmp_path: Path, strict: Path, name: str, shape: tuple[int, ...], sentence: str
) -> None:
    session = plain_session(write_graph(tmp_path / "op.onnx"), strict / CUSTOM_OPS)
    wrong = feeds() | {name: np.ones(shape, feeds()[name].dtype)}
    with pytest.raises(Exception, match=f"{OP_TYPE}: {sentence}"):
        session.run(None, wrong)
    assert session.run(None, feeds())[0].shape == (8, WIDTH)  # and nothing is broken by it


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("dtype", "attribute"), [("float", " "), ("double", "")])
def test_nodes_it_cannot_run_do_not_load(tmp_path: Path, dtype: str, attribute: str) -> None:
    with pytest.raises(DataError, match="cannot load this graph"):
        open_session(write_graph(tmp_path / "op.onnx", dtype, attribute=attribute))


def test_a_library_that_is_not_there() -> None:
    assert find_library("libnothing.so") is None
    with pytest.raises(UnavailableError, match=r"libnothing\.so was not compiled when"):
        get_library("libnothing.so")
