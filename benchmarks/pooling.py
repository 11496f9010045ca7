"""The pooling ops against the function bodies they replace, and against what memory can give.

`python benchmarks/pooling.py [--frames 32] [--width 4096] [--runs 21]`

Three sides run in this process, interleaved, on the same hidden values: the custom op, the function
of plain ops (Gather and MatMul) that every graph brings along, and threads that only read them.
Results are written into arrays that are there already, so that neither op pays for new memory.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from numpy.typing import NDArray

from ppllava_engines.native import CUSTOM_OPS, get_library
from ppllava_export.pool_graph import (
    DOMAIN,
    FUNCTION,
    OP_TYPE,
    OPSET,
    SCALED_FUNCTION,
    SCALED_OP_TYPE,
)

_GRID = (24, 24)
_WINDOW = (2, 3, 3)
_TYPES: dict[str, tuple[Any, Any]] = {  # of hidden and of pooled
    "float": (np.float32, np.float32),
    "float16": (np.float16, np.float16),
    "int8": (np.int8, np.float32),
}
_INT8_STEPS = 30  # of one standard deviation
# Sums in sixteen places at once, so that the loop waits for memory and for nothing else.
_READ = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *data, size_t count) {
    uint64_t sums[16] = {0}, sum = 0;
    for (size_t i = 0; i + 16 <= count; i += 16)
        for (size_t j = 0; j < 16; ++j) sums[j] |= data[i + j];
    for (size_t j = 0; j < 16; ++j) sum |= sums[j];
    return sum;
}
"""


def main() -> None:
    """Prints medians, the op's share of the read bandwidth and its gain, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=21)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        read = _compiled_read(Path(folder))
        for dtype in ("float", "float16", "int8"):
            _measure(dtype, arguments, threads, pool, read)
    print(
        f"{arguments.frames} frames of 24 x 24 tokens, width {arguments.width}, kernel = stride = "
        f"{_WINDOW}, {threads} threads, {_processor()}"
    )
    print(f"python {platform.python_version()}, onnxruntime {version('onnxruntime')}")


def _measure(
    dtype: str,
    arguments: argparse.Namespace,
    threads: int,
    pool: ThreadPoolExecutor,
    read: Any,
) -> None:
    rng = np.random.default_rng(0)
    hidden_type, pooled_type = _TYPES[dtype]
    shape = (arguments.frames, *_GRID)
    hidden = rng.standard_normal((*shape, arguments.width), np.float32)
    if dtype == "int8":
        hidden = np.rint(hidden * _INT8_STEPS).clip(-127, 127)
    hidden = hidden.astype(hidden_type)
    weights = rng.dirichlet(np.ones(np.prod(shape))).astype(np.float32).reshape(shape)
    feeds = {
        "hidden": hidden,
        "weights": weights,
        "kernel": np.array(_WINDOW),
        "stride": np.array(_WINDOW),
    }
    if dtype == "int8":
        feeds["scales"] = rng.uniform(0.5, 1, shape).astype(np.float32) / _INT8_STEPS
    windows = np.prod([size // step for size, step in zip(shape, _WINDOW, strict=True)])
    results = [np.empty((windows, arguments.width), pooled_type) for _ in range(2)]
    parts = np.array_split(hidden.reshape(-1).view(np.uint64), threads)

    def read_once() -> None:
        list(pool.map(lambda part: read(part.ctypes.data, part.size), parts))

    sides: dict[str, Callable[[], None]] = {
        "op": _bound(_session(dtype, threads, op=True), feeds, results[0]),
        "body": _bound(_session(dtype, threads, op=False), feeds, results[1]),
        "read": read_once,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(arguments.runs + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if run:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    error = np.abs(results[0].astype(np.float64) - results[1]).max()
    assert error < 2e-3, f"op and body differ by {error}"
    op, body, whole = (statistics.median(times[name]) for name in ("op", "body", "read"))
    print(
        f"{dtype}: op {1000 * op:.1f} ms, body {1000 * body:.1f} ms, reading {1000 * whole:.1f} ms "
        f"({hidden.nbytes / whole / 1e9:.1f} GB/s): {whole / op:.2f} of the read bandwidth, "
        f"{body / op:.1f} times as fast as the body"
    )


def _session(dtype: str, threads: int, *, op: bool) -> ort.InferenceSession:
    """A graph that is the one node, with the same options for both sides."""
    name, function, pooled, scales, operand = OP_TYPE, FUNCTION, dtype, "", ""
    if dtype == "int8":
        name, function, pooled = SCALED_OP_TYPE, SCALED_FUNCTION, "float"
        scales, operand = "float[T,h,w] scales,", "scales,"
    model = onnx.parser.parse_model(f"""
        <ir_version: 11, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>
        one ({dtype}[T,h,w,D] hidden, {scales} float[T,h,w] weights, int64[3] kernel,
             int64[3] stride)
        => ({pooled}[N,D] pooled)
        {{ pooled = {DOMAIN}.{name} <temperature = 0.01>
              (hidden, {operand} weights, kernel, stride) }}
    """)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if op:
        options.register_custom_ops_library(str(get_library(CUSTOM_OPS)))
    else:
        model.functions.append(onnx.parser.parse_function(function))
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _bound(
    session: ort.InferenceSession, feeds: dict[str, NDArray[Any]], pooled: NDArray[Any]
) -> Callable[[], None]:
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("pooled", "cpu", 0, pooled.dtype, pooled.shape, pooled.ctypes.data)
    return lambda: session.run_with_iobinding(binding)


def _compiled_read(folder: Path) -> Any:
    """Returns `read_all` of _READ; it runs without Python's lock."""
    (folder / "read.c").write_text(_READ, encoding="utf-8")
    command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "read.c", "-o", "read.so"]
    subprocess.run(command, cwd=folder, check=True)
    read = ctypes.CDLL(str(folder / "read.so")).read_all
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint64
    return read


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


if __name__ == "__main__":
    main()
