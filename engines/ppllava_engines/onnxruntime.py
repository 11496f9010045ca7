"""The ONNX Runtime backend: sessions on the CPU, whose idle threads sleep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from ppllava_engines.bundle import GraphSpec, TensorSpec
from ppllava_engines.engine import Array, check_feeds, check_graph, count_threads, empty_output
from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from ppllava_engines.native import CUSTOM_OPS, find_library

_NUMPY_NAMES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
_FATAL_ONLY = 4  # failures reach the caller as exceptions; ORT need not print them as well


def open_session(
    path: Path, threads: int | None = None, *, lean: bool = False, awake: bool = False
) -> ort.InferenceSession:
    """An ONNX Runtime session for the graph at `path`, on the CPU.

    A graph typed float16 runs as well: where the CPU has no float16 kernel, ORT inserts casts.
    Pooling runs in this package's own kernel if that was compiled, else as the function of plain
    ops that the graph brings along, which takes several times as long.

    Args:
        path: An ONNX file, with its external data beside it.
        threads: Threads that work on one operator; None is one per core this process may use.
        lean: Whether the weights stay mapped from their file, and memory goes back as soon as it
            is free. The graph runs as it is written: slower, and in exact float arithmetic where
            it is quantized.
        awake: Whether threads spin while they wait for their next operator, within a run only: for
            graphs of many short operators.

    Raises:
        DataError: The file is not a graph that ORT can load.
        IncompatibleError: ORT's CPU has no kernel for a type in the graph, e.g. bfloat16.
        NotFoundError: There is no such file.
        UnavailableError: This package's own kernel was compiled, but cannot be loaded.
        UsageError: `threads` is not positive.
    """
    num_threads = count_threads(threads)
    if not path.is_file():
        raise NotFoundError(f"{path}: no such graph file")
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    # By default idle threads spin, and those of several sessions then spin against each other and
    # against the video decoder: 2 to 3 times slower steps once a core is busy. ORT's process-wide
    # pool cures the first but cannot be told from Python not to spin. So threads sleep between
    # runs, and within one too, unless its operators are as short as waking up takes: a step of
    # SmolLM2 takes 7.0 ms awake and 9.6 asleep (with one of two cores busy 14.3 and 11.4).
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if awake else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # at the end of a run
    if lean:
        # Optimised weights and packed ones are copies of those in the file.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        # In the default order every cast of a weight runs before the first layer does.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = _FATAL_ONLY
    _register_custom_ops(options)
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except NoKernel as error:
        raise IncompatibleError(
            f"{path}: ONNX Runtime's CPU has no kernel for this graph's types, bfloat16 is for "
            f"TensorRT: export with --dtype fp32 or fp16: {error}"
        ) from error
    except Exception as error:  # ORT's exceptions share no base class
        raise DataError(
            f"{path}: ONNX Runtime cannot load this graph, export it again: {error}"
        ) from error


def _register_custom_ops(options: ort.SessionOptions) -> None:
    library = find_library(CUSTOM_OPS)
    if library is None:
        return
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise UnavailableError(
            f"{library}: ONNX Runtime cannot load the op that was compiled here, install "
            f"ppllava-edge again: {error}"
        ) from error


class OnnxRuntimeEngine:
    """An Engine on ONNX Runtime.

    Args:
        path: The graph's file.
        spec: What the manifest says of it.
        threads: As in `open_session`.
        lean: As in `open_session`.

    Raises:
        DataError: The file is no graph, or its inputs and outputs are not those of `spec`.
        IncompatibleError, NotFoundError, UnavailableError, UsageError: As in `open_session`.
    """

    def __init__(
        self, path: Path, spec: GraphSpec, threads: int | None = None, *, lean: bool = False
    ) -> None:
        self._name = path.stem
        self._spec = spec
        self._session = open_session(path, threads, lean=lean)
        check_graph(
            path,
            spec,
            [_tensor_spec(node) for node in self._session.get_inputs()],
            [_tensor_spec(node) for node in self._session.get_outputs()],
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes."""
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives back."""
        return self._spec.outputs

    def run(
        self, feeds: Mapping[str, Array], keep: Mapping[str, Array] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Every output by name but those in `keep`; see `Engine.run`."""
        check_feeds(self._name, self._spec.inputs, feeds)
        names = [spec.name for spec in self._spec.outputs]
        try:
            found = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except Exception as error:
            raise InternalError(f"{self._name}: ONNX Runtime failed: {error}") from error
        for name, target in (keep or {}).items():
            np.copyto(np.asarray(target), found.pop(name))
        return found

    @property
    def limits(self) -> Mapping[str, int]:
        """None: any size that fits into memory."""
        return {}

    def empty(self, name: str, size: int) -> NDArray[Any]:
        """Room for the output `name`; see `Engine.empty`."""
        return empty_output(self._spec, name, size)


def _tensor_spec(node: ort.NodeArg) -> TensorSpec:
    shape = tuple(axis if isinstance(axis, int | str) else "?" for axis in node.shape)
    return TensorSpec(node.name, _NUMPY_NAMES.get(node.type, node.type), shape)
