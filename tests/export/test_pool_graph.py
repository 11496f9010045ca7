"""The pool op against torch's pooling, over shapes, kernels and strides: body and compiled op."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from ppllava_engines.native import CUSTOM_OPS, find_library
from ppllava_engines.onnxruntime import open_session
from ppllava_export.modules.pooling import strided_weighted_pool
from ppllava_export.pool_graph import DOMAIN, FUNCTION, OP_TYPE, OPSET

Triple = tuple[int, int, int]
Array = NDArray[Any]

WIDTH = 5
TEMPERATURE = 0.01
TOLERANCE = {"float": 2e-5, "float16": 2e-3}
GRIDS: list[Triple] = [(4, 6, 6), (3, 5, 7), (1, 4, 9), (5, 1, 2)]
KERNELS: list[Triple] = [(1, 1, 1), (2, 3, 3), (3, 2, 5), (1, 4, 2), (5, 1, 2), (1, 1, 9)]
STRIDES: list[Triple] = [(1, 1, 1), (2, 3, 3), (1, 2, 1), (3, 1, 4), (7, 7, 7)]
CASES = [
    (grid, kernel, stride)
    for grid, kernel, stride in product(GRIDS, KERNELS, STRIDES)
    if all(k <= size for k, size in zip(kernel, grid, strict=True))
]


@pytest.fixture(scope="module", params=product(["float", "float16"], ["body", "compiled"]), ids=str)
def op(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A session of a graph that is the one node with its body, and the type of its values."""
    dtype, runs = request.param
    model = onnx.parser.parse_model(f"""
        <ir_version: 11, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>
        one_node ({dtype}[T,h,w,D] hidden, float[T,h,w] weights, int64[3] kernel, int64[3] stride)
        => ({dtype}[N,D] pooled)
        {{ pooled = {DOMAIN}.{OP_TYPE} <temperature = {TEMPERATURE}>
               (hidden, weights, kernel, stride) }}
    """)
    model.functions.append(onnx.parser.parse_function(FUNCTION))
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path_factory.mktemp("op") / f"{dtype}.onnx"
    onnx.save(model, str(path))
    if runs == "body":  # a session that was told of no op
        return ort.InferenceSession(path, providers=["CPUExecutionProvider"]), dtype
    if find_library(CUSTOM_OPS) is None:
        pytest.skip("NOT RUN: the op was not compiled when this package was installed")
    return open_session(path), dtype


def run(session: Any, hidden: Array, weights: Array, kernel: Triple, stride: Triple) -> Array:
    feeds = {"kernel": np.array(kernel), "stride": np.array(stride)}
    pooled: Array = session.run(None, feeds | {"hidden": hidden, "weights": weights})[0]
    return pooled


def test_literal_values(op: Any) -> None:
    session, dtype = op
    hidden = np.arange(8, dtype=np.float32).reshape(2, 2, 2, 1)
    even = np.zeros((2, 2, 2), np.float32)
    for kernel, stride, expected in (
        ((2, 2, 2), (1, 1, 1), [3.5]),
        ((1, 2, 2), (1, 1, 1), [1.5, 5.5]),
        ((1, 1, 2), (1, 1, 1), [0.5, 2.5, 4.5, 6.5]),
        ((2, 1, 1), (1, 1, 1), [2, 3, 4, 5]),
        ((1, 1, 1), (2, 2, 2), [0]),
    ):
        got = run(session, hidden.astype(numpy_of(dtype)), even, kernel, stride)
        assert got[:, 0].tolist() == expected
    one = even.copy()
    one[1, 0, 1] = 1.0  # 1/0.01 above the others: takes all of its window
    got = run(session, hidden.astype(numpy_of(dtype)), one, (1, 2, 2), (1, 1, 1))
    assert got[:, 0].tolist() == [1.5, 5]


@pytest.mark.parametrize(("grid", "kernel", "stride"), CASES)
def test_body_equals_torch(op: Any, grid: Triple, kernel: Triple, stride: Triple) -> None:
    session, dtype = op
    rng = np.random.default_rng(hash((grid, kernel, stride)) % 2**32)
    hidden = rng.standard_normal((*grid, WIDTH)).astype(numpy_of(dtype))
    weights = rng.dirichlet(np.ones(grid[0] * grid[1] * grid[2])).astype(np.float32).reshape(grid)
    expected = strided_weighted_pool(
        torch.from_numpy(hidden.astype(np.float32)),
        torch.from_numpy(weights),
        kernel,
        stride,
        TEMPERATURE,
    ).numpy()
    got = run(session, hidden, weights, kernel, stride)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [(5, 1), (5, 7), (10**6, 1), (2**62, 2**62), (1, 0), (2, 0), (1, -1), (0, 1), (-1, 1), (0, 0)],
)
def test_a_window_that_is_none_gives_no_tokens(
    op: Any, axes: tuple[int, ...], kernel: int, stride: int
) -> None:
    session, dtype = op
    kernels, strides = ([v if i in axes else 1 for i in range(3)] for v in (kernel, stride))
    hidden, weights = np.ones((2, 3, 4, WIDTH), numpy_of(dtype)), np.ones((2, 3, 4), np.float32)
    got = run(session, hidden, weights, (*kernels,), (*strides,))  # type: ignore[arg-type]
    assert got.shape == (0, WIDTH)


def numpy_of(dtype: str) -> type[np.floating[Any]]:
    return np.float32 if dtype == "float" else np.float16
