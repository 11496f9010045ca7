"""A plan in a GPU's memory, and contexts in which it runs; the only callers of TensorRT's runtime.

Written against what TensorRT 10.3, 10.16, 11.4 and TensorRT-RTX have in common.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import DataError, IncompatibleError, InternalError, UnavailableError
from ppllava_engines.tensorrt.builder import is_out_of_memory
from ppllava_engines.tensorrt.device import Device, LaunchGraph
from ppllava_engines.tensorrt.plans import PlanSpec
from ppllava_engines.tensorrt.profiles import Profile, Shape


class Plan:
    """A plan, deserialised.

    Attributes:
        name: Of the graph.
        device: The GPU it is on.
        inputs, outputs: Name → what it is.
        profiles: In the plan's order.
        most_bytes: Tensor → the most that it has in any profile; without those of which TensorRT
            does not know it.

    Args:
        module: tensorrt or tensorrt_rtx.
        device: The same as above.
        path: The plan's file, compared with its hash.
        name: The same as above.
        record: What it must be.
        plugin: The library of the plugin it calls; None without one.
        version_compatible: Whether it brings along code of the TensorRT that built it.

    Raises:
        DataError: A plan of other inputs or outputs than the record's.
        IncompatibleError: TensorRT refuses it.
        UnavailableError: The GPU has too little memory.
    """

    def __init__(
        self,
        module: ModuleType,
        device: Device,
        path: Path,
        name: str,
        record: PlanSpec,
        plugin: Path | None = None,
        *,
        version_compatible: bool = False,
    ) -> None:
        self.name = name
        self.device = device
        self.profiles = record.profiles
        self._module = module
        self._log = _log(module)
        self.inputs = {spec.name: spec for spec in record.spec.inputs}
        self.outputs = {spec.name: spec for spec in record.spec.outputs}
        with self._told("cannot start"):
            self._runtime = module.Runtime(self._log)
        # Only then: it is code, and its hash was compared.
        self._runtime.engine_host_code_allowed = version_compatible
        if plugin is not None:
            with self._told(f"cannot load {plugin}"):
                handle = self._runtime.get_plugin_registry().load_library(str(plugin))
            if handle is None:
                raise IncompatibleError(
                    f"{name}: TensorRT does not take the plugin library {plugin}: "
                    f"{self._log.said()}: install ppllava-edge again on this machine"
                )
        # Mapped, not read: on a board it would be in the same memory twice meanwhile.
        with (
            self._told("refuses the plan, run ppllava-build again"),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            self._require_memory()
            raise IncompatibleError(
                f"{name}: TensorRT refuses the plan {path}: {self._log.said()}: run ppllava-build "
                "again on this machine"
            )
        self._check(record)
        self._strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        # One for all contexts: they run one after the other.
        size = int(self._engine.device_memory_size_v2)
        self._scratch = device.allocate(size, f"activations of {name}")
        self._idle: dict[int, Execution] = {}
        specs = self.inputs | self.outputs
        self.most_bytes: dict[str, int] = {}
        for index, profile in enumerate(self.profiles):
            most = {key: high for key, (_, _, high) in profile.shapes.items()}
            if not profile.values:  # on which the outputs' shapes depend
                execution = self.execution(index)
                most |= execution.shape(most)
                self._idle[index] = execution
            for key, shape in most.items():
                size = math.prod(shape) * itemsize(specs[key].dtype)
                self.most_bytes[key] = max(size, self.most_bytes.get(key, 0))

    def execution(self, index: int) -> Execution:
        """A context for the profile `index`, which nobody else uses."""
        if index in self._idle:
            return self._idle.pop(index)
        with self._told("makes no context"):
            context = self._engine.create_execution_context(self._strategy)
        if context is None:
            self._require_memory()
        self._require(context is not None, "makes no context")
        context.set_device_memory(self._scratch.pointer, self._scratch.num_bytes)
        chosen = context.set_optimization_profile_async(index, self.device.stream)
        self._require(chosen, f"does not choose profile {index}")
        self.device.synchronize()
        return Execution(self, context, self.profiles[index])

    def _check(self, record: PlanSpec) -> None:
        engine, mode = self._engine, self._module.TensorIOMode
        found = {}
        for index in range(engine.num_io_tensors):
            key = engine.get_tensor_name(index)
            found[key] = (
                "input" if engine.get_tensor_mode(key) == mode.INPUT else "output",
                _NUMPY_NAMES.get(engine.get_tensor_dtype(key).name, "another type"),
                tuple(engine.get_tensor_shape(key)),
            )
        expected = {
            spec.name: (
                kind,
                spec.dtype,
                tuple(-1 if isinstance(axis, str) else axis for axis in spec.shape),
            )
            for kind, specs in (("input", record.spec.inputs), ("output", record.spec.outputs))
            for spec in specs
        }
        wrong = [
            key
            for key in found.keys() | expected.keys()
            if key not in found or key not in expected or not _agree(found[key], expected[key])
        ]
        if wrong:
            key = min(wrong)
            raise DataError(
                f"{self.name}: the plan has {key} as {found.get(key)}, expected "
                f"{expected.get(key)}: run ppllava-build again"
            )
        host = self._module.TensorLocation.HOST
        on_host = {key for key in self.inputs if engine.get_tensor_location(key) == host}
        if on_host != set(record.profiles[0].values):
            raise DataError(
                f"{self.name}: the plan reads {sorted(on_host)} on the CPU, expected "
                f"{sorted(record.profiles[0].values)}: run ppllava-build again"
            )
        if engine.num_optimization_profiles != len(record.profiles):
            raise DataError(
                f"{self.name}: the plan has {engine.num_optimization_profiles} profiles, expected "
                f"{len(record.profiles)}: run ppllava-build again"
            )

    def _require_memory(self) -> None:
        """Raises UnavailableError when what TensorRT said last is that there was too little."""
        if is_out_of_memory(self._log.errors):
            raise UnavailableError(
                f"{self.name}: the GPU's memory is used up: {self._log.said()}: end other "
                "programs, or run ppllava-build for fewer frames or tokens"
            )

    def _require(self, good: bool, failure: str) -> None:
        if not good:
            raise InternalError(f"{self.name}: TensorRT {failure}: {self._log.said()}")

    @contextmanager
    def _told(self, failure: str) -> Iterator[None]:
        """Turns what TensorRT's bindings raise into one sentence."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError) as error:
            raise UnavailableError(
                f"{self.name}: TensorRT {failure}: {self._log.said() or error}"
            ) from error


class Execution:
    """A context: its inputs' shapes and all addresses are set, then it runs as often as wanted.

    From the second time on that nothing of these changed, what it launches is launched as one CUDA
    graph. A context has one graph at most: TensorRT keeps what depends on shapes in the context.

    Attributes:
        profile: For which it is.
    """

    def __init__(self, plan: Plan, context: Any, profile: Profile) -> None:
        self.profile = profile
        self._plan = plan
        self._context = context
        self._shapes: dict[str, Shape] = {}
        self._values: dict[str, NDArray[np.int64]] = {}
        self._outputs: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._num_runs = 0
        self._graph: LaunchGraph | None = None
        self._capturable = True

    def shape(
        self, shapes: Mapping[str, Shape], values: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, Shape]:
        """The outputs' shapes, for the inputs' shapes, and values where these decide.

        Raises:
            InternalError: TensorRT refuses them.
        """
        values = values or {}
        same = self._values.keys() == values.keys() and all(
            np.array_equal(self._values[key], value) for key, value in values.items()
        )
        if same and self._shapes == shapes:
            return self._outputs
        self._forget()
        plan, context = self._plan, self._context
        self._shapes = {}
        for key, shape in shapes.items():
            plan._require(context.set_input_shape(key, tuple(shape)), f"refuses {key} of {shape}")
        # TensorRT reads them where they are, on the CPU, each time it runs.
        self._values = {key: np.array(value, np.int64) for key, value in values.items()}
        for key, value in self._values.items():
            plan._require(context.set_tensor_address(key, value.ctypes.data), f"refuses {key}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise InternalError(
                f"{plan.name}: TensorRT infers no shapes from {shapes}: {plan._log.said()}: {error}"
            ) from error
        plan._require(not missing, f"knows too little of {', '.join(missing)}")
        self._outputs = {key: tuple(context.get_tensor_shape(key)) for key in plan.outputs}
        for key, found in self._outputs.items():
            plan._require(min(found, default=0) >= 0, f"does not know the shape of {key}")
        self._shapes = dict(shapes)
        return self._outputs

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Runs the plan later, on memory of the GPU at these addresses of all inputs and outputs.

        Raises:
            InternalError: TensorRT or CUDA failed.
        """
        if self._addresses != addresses:
            self._forget()
            for key, address in addresses.items():
                chosen = self._context.set_tensor_address(key, address)
                self._plan._require(chosen, f"refuses the address of {key}")
            self._addresses = dict(addresses)
        if self._graph is None and self._num_runs and self._capturable:
            self._graph = self._plan.device.capture(self._launch)
            self._capturable = self._graph is not None
        if self._graph is not None:
            self._graph.launch()
        else:
            self._launch()
        self._num_runs += 1

    def _launch(self) -> None:
        launched = self._context.execute_async_v3(self._plan.device.stream)
        self._plan._require(launched, "failed")

    def _forget(self) -> None:
        # The first run after a change prepares what a capture could not.
        self._num_runs = 0
        self._graph = None


BFLOAT16 = "bfloat16"  # which numpy does not have
# TensorRT's name of a type → numpy's.
_NUMPY_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": BFLOAT16,
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "INT8": "int8",
    "BOOL": "bool",
}
_MOST_SAID = 3


def itemsize(dtype: str) -> int:
    """The size in bytes of one element of a type in a TensorSpec."""
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


def _agree(found: tuple[str, str, Shape], expected: tuple[str, str, Shape]) -> bool:
    """Whether kind and type are the same, and all fixed sizes are: a plan may have fixed more."""
    return (
        found[:2] == expected[:2]
        and len(found[2]) == len(expected[2])
        and all(-1 in (a, b) or a == b for a, b in zip(found[2], expected[2], strict=True))
    )


def _log(module: ModuleType) -> Any:
    """A logger of TensorRT's that keeps errors, to be told in one sentence."""
    severe = (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR)

    class Log(module.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe:
                self.errors = [*self.errors, " ".join(msg.split())][-_MOST_SAID:]

        def said(self) -> str:
            return "; ".join(self.errors) or "it does not say why"

    return Log()
