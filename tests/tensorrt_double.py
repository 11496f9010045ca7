"""A stand-in for TensorRT's runtime that lets ONNX Runtime compute what a plan stands for.

A plan of the double names a graph that `write_graph` lowered. The double knows TensorRT's rules (a
context runs only when all shapes and addresses are set, shapes are those of the profile, addresses
are aligned, the first run after a change cannot be captured) and refuses what breaks them. Every
name and argument is compared with the real bindings in tests/tensorrt/test_rung6_bindings.py.

It tests the order of calls and their arguments; no plan, and no number of a GPU, is shown by it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from enum import Enum
from importlib.machinery import ModuleSpec
from mmap import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from cuda_double import CudaDouble
from ppllava_engines.bundle import Bundle, FileSpec, GraphSpec, TensorSpec
from ppllava_engines.manifest import Axes
from ppllava_engines.tensorrt.graphs import PoolNode, write_graph
from ppllava_engines.tensorrt.plans import (
    RECORD,
    Machine,
    Options,
    PlanSpec,
    Record,
    new_plans,
)
from ppllava_engines.tensorrt.profiles import Profile, graph_profiles

VERSION = "10.3.0"
MEMORY = 1 << 30
_ALIGNMENT = 256
_SCRATCH = 4096

DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "UINT8"])
TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorLocation = Enum("TensorLocation", ["DEVICE", "HOST"])
_TYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "int64": DataType.INT64,
    "int32": DataType.INT32,
}


class ExecutionContextAllocationStrategy(Enum):
    """Who gives a context its memory."""

    STATIC = 0
    USER_MANAGED = 2


class ILogger:
    """What TensorRT tells its messages to."""

    class Severity(Enum):
        """How bad a message is."""

        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IPluginRegistry:
    """Where plugins are found."""

    def __init__(self, loaded: list[str]) -> None:
        self._loaded = loaded

    def load_library(self, plugin_path: str) -> object:
        self._loaded.append(plugin_path)
        return object()


class Runtime:
    """What makes engines of plans."""

    cuda: CudaDouble  # set by `install`
    faults: dict[str, str]
    loaded: list[str]

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.engine_host_code_allowed = False
        if "Runtime" in self.faults:
            logger.log(ILogger.Severity.ERROR, self.faults["Runtime"])
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def get_plugin_registry(self) -> IPluginRegistry:
        return IPluginRegistry(self.loaded)

    def deserialize_cuda_engine(self, serialized_engine: bytes | mmap) -> ICudaEngine | None:
        if "deserialize" in self.faults:
            self._logger.log(ILogger.Severity.ERROR, self.faults["deserialize"])
            return None
        return ICudaEngine(self, json.loads(bytes(serialized_engine)))


class ICudaEngine:
    """A plan that was loaded."""

    def __init__(self, runtime: Runtime, plan: dict[str, Any]) -> None:
        self._runtime = runtime
        self._session = ort.InferenceSession(plan["graph"], providers=["CPUExecutionProvider"])
        self._profiles: list[dict[str, dict[str, Any]]] = plan["profiles"]
        self._specs = {
            name: (mode, dtype, tuple(shape)) for name, mode, dtype, shape in plan["tensors"]
        }

    @property
    def num_io_tensors(self) -> int:
        return len(self._specs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return _SCRATCH

    def get_tensor_name(self, index: int) -> str:
        name: str = list(self._specs)[index]
        return name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self._specs[name][0]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self._specs[name][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(axis, str) else axis for axis in self._specs[name][2])

    def get_tensor_location(self, name: str) -> TensorLocation:
        on_host = name in self._profiles[0]["values"]
        return TensorLocation.HOST if on_host else TensorLocation.DEVICE

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> IExecutionContext | None:
        if "context" in self._runtime.faults:
            self._runtime._logger.log(ILogger.Severity.ERROR, self._runtime.faults["context"])
            return None
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)


class IExecutionContext:
    """What runs an engine."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._runtime = engine._runtime
        self._cuda = engine._runtime.cuda
        self._profile: dict[str, dict[str, Any]] | None = None
        self._memory: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._known: dict[str, tuple[int, ...]] = {}
        self._dirty = True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._cuda.view(memory, size, mapped=False)
        self._memory = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._cuda.enqueue(lambda: None, stream_handle)
        self._profile = self._engine._profiles[profile_index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None or name not in self._profile["shapes"]:
            return self._refuse(f"{name} is no input of a profile that was chosen")
        low, _, high = self._profile["shapes"][name]
        if len(shape) != len(low) or not all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        ):
            return self._refuse(f"{name} {shape} is not in the profile")
        self._shapes[name] = tuple(shape)
        self._known, self._dirty = {}, True
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._specs:
            return self._refuse(f"{name} is no tensor")
        assert self._profile is not None
        if name not in self._profile["values"] and memory % _ALIGNMENT:
            return self._refuse(f"the address of {name} is not aligned")
        self._addresses[name] = memory
        self._known, self._dirty = {}, True
        return True

    def infer_shapes(self) -> list[str]:
        assert self._profile is not None
        if "infer" in self._runtime.faults:  # as the bindings do
            self._refuse(self._runtime.faults["infer"])
            raise RuntimeError("infer_shapes error code: -1")
        shapes, values = self._profile["shapes"], self._profile["values"]
        return [name for name in shapes if name not in self._shapes] + [
            name for name in values if name not in self._addresses
        ]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self._known:
            axes: dict[str, int] = {}
            for key, shape in self._shapes.items():
                named = zip(self._engine._specs[key][2], shape, strict=True)
                axes |= {axis: size for axis, size in named if isinstance(axis, str)}
            outputs = self._outputs()
            self._known = {
                key: tuple(axes.get(axis, -1) if isinstance(axis, str) else axis
                           for axis in self._engine._specs[key][2])
                for key in outputs
            }  # fmt: skip
            if any(-1 in shape for shape in self._known.values()):  # it depends on more than axes
                feeds = {key: np.zeros(shape, self._dtype(key))
                         for key, shape in self._shapes.items()}  # fmt: skip
                found = self._engine._session.run(list(outputs), feeds | self._values())
                self._known = {key: array.shape for key, array in zip(outputs, found, strict=True)}
        return self._known[name]

    def execute_async_v3(self, stream_handle: int) -> bool:
        if "execute" in self._runtime.faults:
            return self._refuse(self._runtime.faults["execute"])
        if self._cuda.is_capturing and (self._dirty or "capture" in self._runtime.faults):
            return self._refuse("this cannot be captured")
        outputs = self._outputs()
        unset = [name for name in self._engine._specs if name not in self._addresses]
        if self._memory is None or unset or self.infer_shapes():
            return self._refuse(f"no memory or no address: {unset}")
        shapes = self._shapes | {key: self.get_tensor_shape(key) for key in outputs}
        addresses, values = dict(self._addresses), self._values()

        def compute() -> None:
            self._cuda.view(*self._memory)  # type: ignore[misc]

            def array(key: str) -> Any:
                dtype = self._dtype(key)
                size = math.prod(shapes[key]) * dtype.itemsize
                found = self._cuda.view(addresses[key], size)
                return found.view(dtype).reshape(shapes[key])

            feeds = {key: array(key).copy() for key in self._shapes}
            found = self._engine._session.run(list(outputs), feeds | values)
            for key, result in zip(outputs, found, strict=True):
                array(key)[...] = result

        self._cuda.enqueue(compute, stream_handle)
        self._dirty = False
        return True

    def _outputs(self) -> list[str]:
        return [key for key, spec in self._engine._specs.items() if spec[0] == "OUTPUT"]

    def _values(self) -> dict[str, Any]:
        """What lies at the addresses of those inputs that TensorRT reads on the CPU."""
        assert self._profile is not None
        return {
            name: np.copy(np.ctypeslib.as_array(
                (np.ctypeslib.as_ctypes_type(np.int64) * 3).from_address(self._addresses[name])))
            for name in self._profile["values"]
        }  # fmt: skip

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._engine._specs[name][1])
        return dtype

    def _refuse(self, why: str) -> bool:
        self._runtime._logger.log(ILogger.Severity.ERROR, why)
        return False


class Doubles:
    """CUDA and TensorRT as the test sees them.

    Attributes:
        cuda: The double of CUDA.
        faults: What TensorRT fails at ("Runtime", "deserialize", "context", "infer", "execute",
            "capture")
            and what it says.
        loaded: Plugin libraries that were loaded.
    """

    def __init__(self, cuda: CudaDouble) -> None:
        self.cuda = cuda
        self.faults: dict[str, str] = {}
        self.loaded: list[str] = []


def install(monkeypatch: pytest.MonkeyPatch, cuda: CudaDouble) -> Doubles:
    """Puts the doubles where the backend imports the real modules from."""
    doubles = Doubles(cuda)
    bindings, tensorrt = ModuleType("cuda.bindings"), ModuleType("tensorrt")
    bindings.runtime = cuda  # type: ignore[attr-defined]
    for name, module in (("cuda", ModuleType("cuda")), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    runtime = type("Runtime", (Runtime,), {
        "cuda": cuda, "faults": doubles.faults, "loaded": doubles.loaded})  # fmt: skip
    tensorrt.__spec__ = ModuleSpec("tensorrt", None, origin="double")
    public = {"Runtime": runtime, "ILogger": ILogger, "TensorIOMode": TensorIOMode,
              "TensorLocation": TensorLocation,
              "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
              "__version__": VERSION}  # fmt: skip
    vars(tensorrt).update(public)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    return doubles


def write_plans(
    bundle: Bundle,
    folder: Path,
    *,
    pool_node: PoolNode = "body",
    kernel: Axes | None = None,
    stride: Axes | None = None,
    profiles: Mapping[str, tuple[Profile, ...]] | None = None,
    frames: int | None = None,
    tokens: int | None = None,
) -> None:
    """Writes the double's plans of all graphs into the bundle; the graphs go to `folder`.

    With `pool_node` "inputs" the pool graph is the bundle's own: its function is the plugin.
    """
    model = bundle.manifest.model
    baked = pool_node != "inputs"
    machine = Machine(gpu="Double", compute_capability=(8, 7), library="tensorrt",
                      version=VERSION, integrated=False, memory_bytes=MEMORY)  # fmt: skip
    seal = bundle.manifest.seal
    record = Record(machine=machine, bundle_sha256=seal, options=Options(), graphs={})
    with new_plans(bundle, record.name) as staging:
        for name in ("vision", "text", "pool", "decoder"):
            windows: dict[str, Any] = {}
            if name == "pool" and not baked:
                spec = bundle.manifest.graphs[name]
                path = bundle.file(spec.path)
            else:
                if name == "pool":
                    windows = {"kernel": kernel, "stride": stride, "pool_node": pool_node}
                spec = write_graph(bundle, name, folder, **windows)
                path = folder / f"{name}.onnx"
            made = (profiles or {}).get(name) or graph_profiles(
                bundle.manifest, name, spec,
                frames=frames if name in ("vision", "pool") else None,
                tokens=tokens if name == "decoder" else None,
            )  # fmt: skip
            plan = staging / f"{name}.plan"
            plan.write_text(json.dumps(_plan(path, spec, made)))
            record.graphs[name] = PlanSpec(
                path=plan.name,
                file=FileSpec.of(plan),
                spec=spec,
                profiles=made,
                kernel=(kernel or model.kernel) if name == "pool" and baked else None,
                stride=(stride or model.stride) if name == "pool" and baked else None,
                plugin=None,
                seconds=0.0,
                peak_bytes=0,
            )
        (staging / RECORD).write_text(record.to_json())


def _plan(path: Path, spec: GraphSpec, profiles: tuple[Profile, ...]) -> dict[str, Any]:
    def listed(mode: str, specs: tuple[TensorSpec, ...]) -> list[Any]:
        return [[tensor.name, mode, tensor.dtype, tensor.shape] for tensor in specs]

    return {
        "graph": str(path.resolve()),
        "tensors": listed("INPUT", spec.inputs) + listed("OUTPUT", spec.outputs),
        "profiles": [{"shapes": one.shapes, "values": one.values} for one in profiles],
    }
