"""The OpenVINO backend: a bundle's towers on an x86 CPU, from the same files as ONNX Runtime's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import GraphSpec, TensorSpec
from ppllava_engines.engine import Array, check_feeds, check_graph, count_threads, empty_output
from ppllava_engines.errors import (
    DataError,
    InternalError,
    NotFoundError,
    UnavailableError,
)

_NUMPY_NAMES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "u8": "uint8",
    "i8": "int8",
    "boolean": "bool",
}
_TELEMETRY = "openvino_telemetry"


@cache
def _library() -> ModuleType:
    # openvino's wheel reports its own import to its maker through this package, where it finds it,
    # and pip installs both. None in its place makes every import of it fail, and openvino then
    # reports to nobody. Assigned, not defaulted: another package may have loaded it before.
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
        import openvino.frontend
    except ImportError as error:
        raise UnavailableError(
            "device 'openvino': OpenVINO is not installed: pip install 'ppllava-edge[openvino]'"
        ) from error
    library: ModuleType = openvino
    return library


def compute_dtype() -> Literal["fp32", "bf16"]:
    """What the towers' floats are multiplied in: "bf16" where this CPU does so natively.

    Raises:
        UnavailableError: The package openvino is missing.
    """
    capabilities = _library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if "BF16" in capabilities else "fp32"


class OpenVINOEngine:
    """An Engine on OpenVINO's CPU plugin.

    Args:
        path: The graph's file, with its external data beside it.
        spec: What the manifest says of it.
        threads: Threads that work on one operator; None is one per core this process may use.

    Raises:
        DataError: OpenVINO cannot load the file, or its inputs and outputs are not those of `spec`.
        NotFoundError: There is no such file.
        UnavailableError: The package openvino is missing.
        UsageError: `threads` is not positive.
    """

    def __init__(self, path: Path, spec: GraphSpec, threads: int | None = None) -> None:
        num_threads = count_threads(threads)
        if not path.is_file():
            raise NotFoundError(f"{path}: no such graph file")
        openvino = _library()
        self._name = path.stem
        self._spec = spec
        options = {
            # One run at a time, by all threads: more streams are for callers with more requests.
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": num_threads,
            # The decoder's threads and the video's run on the same cores.
            "ENABLE_CPU_PINNING": False,
            # Its own choice is float16 on some CPUs, whose range a tower's activations may leave.
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[compute_dtype()],
        }
        try:
            # Core.read_model asks the frontends of every other format too what a damaged file may
            # be, and they print what they think of it.
            frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
            model = frontend.convert(frontend.load(str(path)))
            compiled = openvino.Core().compile_model(model, "CPU", options)
        except Exception as error:  # RuntimeError, or classes that say which step it was
            raise DataError(
                f"{path}: OpenVINO cannot load this graph, take device 'cpu' or export it again: "
                f"{_first_lines(error)}"
            ) from error
        check_graph(
            path,
            spec,
            [_tensor_spec(port, spec.inputs) for port in compiled.inputs],
            [_tensor_spec(port, spec.outputs) for port in compiled.outputs],
        )
        self._inputs = {t.name: _find(compiled.inputs, t.name) for t in spec.inputs}
        self._outputs = {t.name: _find(compiled.outputs, t.name) for t in spec.outputs}
        # One request: each keeps the activations of the largest run it has done.
        self._request = compiled.create_infer_request()
        self._busy = threading.Lock()

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
        given = {
            index: np.ascontiguousarray(np.asarray(feeds[name]))
            for name, index in self._inputs.items()
        }
        keep = keep or {}
        found = {}
        with self._busy:
            try:
                self._request.infer(given, share_inputs=True, share_outputs=True)
            except Exception as error:  # as above
                raise InternalError(
                    f"{self._name}: OpenVINO failed: {_first_lines(error)}"
                ) from error
            for name, index in self._outputs.items():
                # A view of the request's memory, which the next run overwrites.
                view = self._request.get_output_tensor(index).data
                if name in keep:
                    np.copyto(np.asarray(keep[name]), view)
                else:
                    found[name] = view.copy()
        return found

    @property
    def limits(self) -> Mapping[str, int]:
        """None: any size that fits into memory."""
        return {}

    def empty(self, name: str, size: int) -> NDArray[Any]:
        """Room for the output `name`; see `Engine.empty`."""
        return empty_output(self._spec, name, size)


def _tensor_spec(port: Any, expected: Sequence[TensorSpec]) -> TensorSpec:
    """Returns what the graph says of a port, by the name that is expected where it has that too."""
    names = port.names
    name = next((spec.name for spec in expected if spec.name in names), port.any_name)
    kind = port.element_type.get_type_name()
    shape = tuple(axis.get_length() if axis.is_static else "?" for axis in port.partial_shape)
    return TensorSpec(name, _NUMPY_NAMES.get(kind, kind), shape)


def _find(ports: Sequence[Any], name: str) -> int:
    return next(index for index, port in enumerate(ports) if name in port.names)


def _first_lines(error: Exception) -> str:
    """Returns OpenVINO's message without the places in its sources."""
    lines = str(error).splitlines()
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check "))]
    return " ".join(told) or str(error)
