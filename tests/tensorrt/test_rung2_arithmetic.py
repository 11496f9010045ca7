"""Rung 2: the CUDA kernel's own code, compiled for the host with CUDA's own number types.

The sweep of tests/native compares it with every other implementation; here is what only this kernel
has: tiles of tokens, slices of the width, 16-byte and single loads, a grid smaller than its work.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pool_cases import NUMPY, Array, PoolCase, Triple, Values

ROOT = Path(__file__).parents[2]
LOAD_BYTES = 16  # kLoadBytes of cuda.cuh
Pool = Callable[[PoolCase, Array, Array], Array]

GEOMETRIES: list[tuple[Triple, Triple, Triple, int]] = [  # size, kernel, stride, width
    ((6, 9, 8), (6, 9, 8), (1, 1, 1), 40),  # four tiles of 128 tokens, the last not full
    ((3, 8, 16), (1, 8, 16), (1, 1, 1), 24),  # exactly one tile
    ((2, 3, 43), (1, 3, 43), (1, 1, 1), 16),  # one token more than that
    ((4, 6, 6), (2, 3, 3), (1, 2, 2), 1032),  # slices of 512 or 1,024 columns, the last of 8
    ((2, 4, 4), (2, 2, 2), (1, 1, 1), 1025),  # nothing is aligned
    ((5, 5, 5), (2, 1, 3), (1, 1, 1), 8),  # 60 windows for 5 blocks
]
VALUES: tuple[Values, ...] = ("mixed", "extreme", "subnormal")
FLOATS = [dtype for dtype in NUMPY if dtype != "int8"]  # which is for CPUs
CASES = [
    PoolCase(size, kernel, stride, width, dtype, values)
    for (size, kernel, stride, width), dtype, values in product(GEOMETRIES, FLOATS, VALUES)
]


@pytest.fixture(scope="module")
def pool(cuda: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("NOT RUN: a C++ compiler is not here")
    library = tmp_path_factory.mktemp("cuda_on_host") / "cuda_on_host.so"
    done = subprocess.run(
        [
            *(compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"),
            *("-I", ROOT / "engines" / "ops", "-isystem", cuda / "include"),
            *(ROOT / "tests" / "native" / "cuda_on_host.cpp", "-o", library),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(library)).strided_weighted_pool_cuda_on_host

    def run(case: PoolCase, hidden: Array, weights: Array) -> Array:
        shape = (int(np.prod(case.windows)), case.width)
        pooled = aligned(np.full(shape, np.nan, hidden.dtype))
        code = function(
            list(NUMPY).index(case.dtype),
            ctypes.c_void_p(hidden.ctypes.data),
            ctypes.c_void_p(weights.ctypes.data),
            (ctypes.c_int64 * 3)(*case.size),
            ctypes.c_int64(case.width),
            (ctypes.c_int64 * 3)(*case.kernel),
            (ctypes.c_int64 * 3)(*case.stride),
            ctypes.c_float(case.temperature),
            ctypes.c_void_p(pooled.ctypes.data),
        )
        assert code == 0
        return pooled

    return run


@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_the_kernel_is_right(case: PoolCase, pool: Pool) -> None:
    hidden, weights = case.arrays()
    expected, bound = case.expected(rounds_shares=False)
    error = np.abs(pool(case, aligned(hidden), weights).astype(np.float64) - expected)
    assert (error <= bound).all(), f"up to {(error / bound).max():.2f} of what is allowed"


@pytest.mark.parametrize("dtype", FLOATS)
def test_single_loads_give_the_same_bits(dtype: str, pool: Pool) -> None:
    case = PoolCase((3, 5, 6), (2, 2, 3), (1, 1, 2), 1032, dtype, "mixed")
    hidden, weights = case.arrays()
    wide = pool(case, aligned(hidden), weights)
    single = pool(case, aligned(hidden, hidden.itemsize), weights)
    assert wide.tobytes() == single.tobytes()


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_a_nan_or_infinite_weight_spoils_its_window_only(special: float, pool: Pool) -> None:
    case = PoolCase((2, 2, 4), (1, 2, 2), (1, 2, 2), 8, "float32", "mixed")
    hidden, weights = case.arrays()
    weights[1, 0, 3] = special
    pooled = pool(case, aligned(hidden), weights)
    assert np.isnan(pooled).all(axis=1).tolist() == [False, False, False, True]


def test_minus_infinity_has_no_share(pool: Pool) -> None:
    case = PoolCase((1, 2, 2), (1, 2, 2), (1, 1, 1), 8, "float32", "mixed")
    hidden, weights = case.arrays()
    weights[...] = [[-np.inf, -np.inf], [0.5, -np.inf]]
    np.testing.assert_array_equal(pool(case, aligned(hidden), weights), hidden[0, 1, :1])


def test_without_windows_nothing_is_touched(pool: Pool) -> None:
    case = PoolCase((2, 3, 4), (3, 1, 1), (1, 1, 1), 8, "float16", "mixed")
    assert pool(case, *case.arrays()).shape == (0, 8)


def aligned(array: Array, shift: int = 0) -> Array:
    """Returns a copy that begins `shift` bytes behind a 16-byte boundary."""
    memory = np.empty(array.nbytes + 2 * LOAD_BYTES, np.uint8)
    start = -memory.ctypes.data % LOAD_BYTES + shift
    copy: Array = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
