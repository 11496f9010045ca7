"""One sweep of strided weighted pooling through every implementation."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import torch

from pool_cases import CASES, NUMPY, Array, PoolCase
from ppllava_export.modules.pooling import strided_weighted_pool
from ppllava_export.pool_graph import (
    DOMAIN,
    FUNCTION,
    OP_TYPE,
    OPSET,
    SCALED_FUNCTION,
    SCALED_OP_TYPE,
)

Pool = Callable[[PoolCase], Array]

NATIVE = ("custom_op", "cpu", "cuda_on_host")

# Not in the sweep: torch has no result without a window, and ONNX Runtime's CPU no product of
# bfloat16, so that it cannot run the function body; int8 is for CPUs.
SWEEP = [
    (name, case)
    for case in CASES
    for name in ("torch", "numpy", "body", *NATIVE)
    if not (name == "torch" and 0 in case.windows)
    and (name, case.dtype) not in (("body", "bfloat16"), ("cuda_on_host", "int8"))
]


@pytest.mark.parametrize(
    ("implementation", "case"), SWEEP, ids=[f"{name}-{case}" for name, case in SWEEP]
)
def test_sweep(implementation: str, case: PoolCase, request: pytest.FixtureRequest) -> None:
    pool: Pool = request.getfixturevalue(implementation)
    pooled = pool(case)
    expected, bound = case.expected(rounds_shares=implementation not in NATIVE)
    assert pooled.shape == expected.shape
    error = np.abs(pooled.astype(np.float64) - expected)
    assert (error <= bound).all(), f"up to {(error / bound).max():.2f} of what is allowed"


def test_the_sweep_is_as_large_as_it_must_be() -> None:
    assert len(CASES) == len(set(map(str, CASES))) >= 300
    assert len(SWEEP) >= 4.8 * len(CASES)


@pytest.fixture(name="torch", scope="module")
def pool_by_torch() -> Pool:
    def pool(case: PoolCase) -> Array:
        hidden, weights = case.arrays()
        values = torch.from_numpy(hidden.astype(np.float32)).to(getattr(torch, case.pooled_dtype))
        if case.dtype == "int8":
            values *= torch.from_numpy(case.scales())[..., None]
        pooled: Array = (
            strided_weighted_pool(
                values, torch.from_numpy(weights), case.kernel, case.stride, case.temperature
            )
            .float()
            .numpy()
        )
        return pooled

    return pool


@pytest.fixture(name="numpy", scope="module")
def pool_by_numpy() -> Pool:
    def pool(case: PoolCase) -> Array:
        hidden, weights = case.arrays()
        if 0 in case.windows:
            return np.empty((0, case.width), NUMPY[case.pooled_dtype])
        scores = case.gathered(weights / np.float32(case.temperature))
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        if case.dtype == "int8":
            shares *= case.gathered(case.scales())
        tokens = case.gathered(hidden).astype(np.float32)
        pooled: Array = (shares[:, None, :] @ tokens)[:, 0].astype(NUMPY[case.pooled_dtype])
        return pooled

    return pool


@pytest.fixture(scope="module")
def body() -> Pool:
    """The function body, in ONNX Runtime without the custom op."""
    return _pool_by_onnxruntime(None)


@pytest.fixture(scope="module")
def custom_op(strict: Path) -> Pool:
    return _pool_by_onnxruntime(strict / "libppllava_ops_ort.so")


@pytest.fixture(scope="module")
def cpu(strict: Path) -> Pool:
    return _pool_by_c(strict / "libppllava_ops_ort.so", "strided_weighted_pool_cpu")


@pytest.fixture(scope="module")
def cuda_on_host(strict: Path) -> Pool:
    library = strict / "libppllava_cuda_on_host.so"
    if not library.is_file():
        pytest.skip("NOT RUN: CUDA's headers are not here: make tensorrt-tools")
    return _pool_by_c(library, "strided_weighted_pool_cuda_on_host")


def _pool_by_onnxruntime(library: Path | None) -> Pool:
    sessions: dict[tuple[str, float], ort.InferenceSession] = {}

    def session(dtype: str, temperature: float) -> ort.InferenceSession:
        # Values go in and out as float32, which holds those of every type: numpy has no bfloat16.
        kind = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int8": "INT8"}
        number = onnx.TensorProto.DataType.Value(kind[dtype])
        op, more, operand, function = OP_TYPE, "", "", FUNCTION
        if dtype == "int8":
            op, more, operand = SCALED_OP_TYPE, "float[T,h,w] scales,", "scales,"
            function = SCALED_FUNCTION
        model = onnx.parser.parse_model(f"""
            <ir_version: 11, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>
            one (float[T,h,w,D] hidden, {more} float[T,h,w] weights, int64[3] kernel,
                 int64[3] stride)
            => (float[N,D] pooled) {{
                typed = Cast <to = {number}> (hidden)
                result = {DOMAIN}.{op} <temperature = {temperature!r}>
                    (typed, {operand} weights, kernel, stride)
                pooled = Cast <to = {onnx.TensorProto.FLOAT}> (result)
            }}
        """)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        if library is None:
            model.functions.append(onnx.parser.parse_function(function))
        else:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def pool(case: PoolCase) -> Array:
        key = (case.dtype, case.temperature)
        if key not in sessions:
            sessions[key] = session(*key)
        hidden, weights = case.arrays()
        feeds = {
            "hidden": hidden.astype(np.float32),
            "weights": weights,
            "kernel": np.array(case.kernel),
            "stride": np.array(case.stride),
        }
        if case.dtype == "int8":
            feeds["scales"] = case.scales()
        pooled: Array = sessions[key].run(None, feeds)[0]
        return pooled

    return pool


def _missing(*_: object) -> int:
    return 1


def _pool_by_c(library: Path, name: str) -> Pool:
    plain, scaled = (
        getattr(ctypes.CDLL(str(library)), f"{kind}{name}", _missing) for kind in ("", "scaled_")
    )

    def pointer(array: Array) -> Any:
        return ctypes.c_void_p(array.ctypes.data)

    def triple(numbers: tuple[int, int, int]) -> Any:
        return (ctypes.c_int64 * 3)(*numbers)

    def pool(case: PoolCase) -> Array:
        hidden, weights = case.arrays()
        # What nobody writes must not look right: memory is handed out again, results and all.
        shape = math.prod(case.windows), case.width
        pooled = np.full(shape, np.nan, NUMPY[case.pooled_dtype])
        scales = case.scales()
        if case.dtype == "int8":
            function, first = scaled, (pointer(hidden), pointer(scales))
        else:
            function, first = plain, (ctypes.c_int(list(NUMPY).index(case.dtype)), pointer(hidden))
        code = function(
            *first,
            pointer(weights),
            triple(case.size),
            ctypes.c_int64(case.width),
            triple(case.kernel),
            triple(case.stride),
            ctypes.c_float(case.temperature),
            pointer(pooled),
        )
        assert code == 0
        return pooled

    return pool
