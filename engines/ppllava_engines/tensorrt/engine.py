"""The TensorRT backend: plans on a GPU, with TensorRT or TensorRT-RTX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines import native
from ppllava_engines.bundle import Bundle, FileSpec, GraphSpec, TensorSpec
from ppllava_engines.engine import Array, Engine, check_feeds
from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    NotFoundError,
    PPLLaVAError,
    UnavailableError,
)
from ppllava_engines.tensorrt.builder import import_library, is_installed
from ppllava_engines.tensorrt.device import ALIGNMENT, Buffer, Device, DeviceArray, Mirror
from ppllava_engines.tensorrt.execution import Execution, Plan, itemsize
from ppllava_engines.tensorrt.plans import Library, Machine, Plans, PlanSpec
from ppllava_engines.tensorrt.profiles import Shape

_LIBRARIES: tuple[Library, ...] = ("tensorrt", "tensorrt_rtx")
_FEWER_FRAMES = "give fewer frames at a time, or run ppllava-build with more --frames"


class TensorRTEngine:
    """An Engine on a GPU. It runs in one thread at a time.

    Attributes:
        plan: The loaded plan.

    Args:
        plan: The same.
        record: What is known of it.
        spec: What `run` takes and gives back: a pooling that is baked into the plan is in it too.
        other_windows: Gives the engine that pools by any window but the baked one.
    """

    def __init__(
        self, plan: Plan, record: PlanSpec, spec: GraphSpec, other_windows: Callable[[], Engine]
    ) -> None:
        self.plan = plan
        self._record = record
        self._spec = spec
        self._other_windows = cache(other_windows)
        self._device = plan.device
        self._executions: dict[int, Execution] = {}
        self._rooms: dict[str, Buffer] = {}
        self._mirrors: dict[str, Mirror] = {}

    @staticmethod
    def open(bundle: Bundle, name: str) -> TensorRTEngine:
        """The engine of a bundle's graph on this machine's GPU.

        Raises:
            DataError, IncompatibleError, NotFoundError: No plan that may be loaded; see
                `Plans.find`, or one that TensorRT refuses.
            InternalError: CUDA failed.
            UnavailableError: No GPU, no TensorRT, or too little memory.
        """
        plan, record = open_plan(bundle, name)
        return TensorRTEngine(
            plan, record, bundle.manifest.graphs[name], partial(bundle.engine, name)
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes."""
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives back."""
        return self._spec.outputs

    @property
    def limits(self) -> dict[str, int]:
        """The largest size of each dynamic axis for which the plan was built."""
        limits: dict[str, int] = {}
        for profile in self._record.profiles:
            for spec in self._record.spec.inputs:
                largest = profile.shapes[spec.name][2] if spec.name in profile.shapes else ()
                for axis, size in zip(spec.shape, largest, strict=False):
                    if isinstance(axis, str):
                        limits[axis] = max(size, limits.get(axis, 0))
        return limits

    def empty(self, name: str, size: int) -> DeviceArray:
        """Room on the GPU for an output whose first axis has this size; see `Engine.empty`."""
        spec = next(spec for spec in self.outputs if spec.name == name)
        shape = (size, *(axis for axis in spec.shape[1:] if isinstance(axis, int)))
        dtype = np.dtype(spec.dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        return self._device.allocate(num_bytes, f"{name} of {size} frames").array(shape, dtype)

    def run(
        self, feeds: Mapping[str, Array], keep: Mapping[str, Array] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Every output by name but those in `keep`; see `Engine.run`.

        What is given on the GPU is read there. A plan without the plugin pools by one window; by
        others the CPU does, which takes a copy of what was seen.

        Raises:
            DataError: See `Engine.run`; or shapes for which no plan was built.
            InternalError: TensorRT or CUDA failed.
            UnavailableError: The GPU has too little memory.
        """
        keep = keep or {}
        name = self.plan.name
        check_feeds(name, self._spec.inputs, feeds, (np.ndarray, DeviceArray))
        if not self._has_window(feeds):
            return self._other_windows().run({key: np.asarray(feeds[key]) for key in feeds})
        taken = {spec.name: feeds[spec.name] for spec in self._record.spec.inputs}
        execution = self._execution({key: array.shape for key, array in taken.items()})
        values = {key: np.asarray(taken.pop(key)) for key in execution.profile.values}
        shapes = execution.shape({key: array.shape for key, array in taken.items()}, values)
        addresses = {key: self._put(key, array) for key, array in taken.items()}
        fetched = {}
        for spec in self.outputs:
            size = math.prod(shapes[spec.name]) * itemsize(spec.dtype)
            if spec.name in keep:
                addresses[spec.name] = self._room(spec.name, size).pointer
            else:
                fetched[spec.name] = self._mirror(spec.name, size)
                addresses[spec.name] = fetched[spec.name].address
        execution.enqueue(addresses)
        for key, target in keep.items():
            self._keep(key, shapes[key], target, addresses[key])
        for key, mirror in fetched.items():
            mirror.download(math.prod(shapes[key]) * itemsize(self.plan.outputs[key].dtype))
        self._device.synchronize()
        return {
            key: mirror.host.array(shapes[key], self.plan.outputs[key].dtype).copy()
            for key, mirror in fetched.items()
        }

    def _has_window(self, feeds: Mapping[str, Array]) -> bool:
        baked = {"kernel": self._record.kernel, "stride": self._record.stride}
        return all(
            window is None or tuple(np.asarray(feeds[name]).tolist()) == window
            for name, window in baked.items()
            if name in feeds
        )

    def _execution(self, shapes: Mapping[str, Shape]) -> Execution:
        """The context of the first profile that takes these shapes."""
        for index, profile in enumerate(self._record.profiles):
            if profile.accepts(shapes):
                if index not in self._executions:
                    self._executions[index] = self.plan.execution(index)
                return self._executions[index]
        ranges = [
            f"{name} from {_listed(low)} to {_listed(high)}"
            for profile in self._record.profiles
            for name, (low, _, high) in profile.shapes.items()
            if low != high
        ]
        graph = self.plan.name
        dynamic = [name for name in shapes if any(part.startswith(f"{name} ") for part in ranges)]
        got = ", ".join(f"{name} is {_listed(shapes[name])}" for name in dynamic)
        advice = "shorten it" if graph == "text" else _FEWER_FRAMES
        raise DataError(f"{graph}: {got}, but the plan takes {'; '.join(ranges)}: {advice}")

    def _put(self, name: str, array: Array) -> int:
        """The address of an input's content for the GPU, which is there before the plan runs."""
        if isinstance(array, DeviceArray):
            if array.pointer % ALIGNMENT == 0:
                return array.pointer
            room = self._room(name, array.nbytes)
            self._device.copy(room.pointer, array.pointer, array.nbytes)
            return room.pointer
        mirror = self._mirror(name, array.nbytes)
        np.copyto(mirror.host.array(array.shape, array.dtype), array)
        mirror.upload(array.nbytes)
        return mirror.address

    def _keep(self, name: str, shape: Shape, target: Array, address: int) -> None:
        if not isinstance(target, DeviceArray) or target.shape != shape:
            raise DataError(
                f"{self.plan.name}: {name} is to be kept in a {type(target).__name__} of "
                f"{_listed(target.shape)}, expected a DeviceArray of {_listed(shape)}"
            )
        # Copied, and not written there at once: rows of an array may begin where TensorRT does not
        # write, and a captured graph writes to one place only.
        self._device.copy(target.pointer, address, target.nbytes)

    def _room(self, name: str, num_bytes: int) -> Buffer:
        """The memory of the GPU that is this tensor's only, of the most it can have."""
        buffer = self._rooms.get(name)
        if buffer is None or buffer.num_bytes < num_bytes:
            self._rooms.pop(name, None)
            buffer = self._device.allocate(self._most(name, num_bytes), self._what(name))
            self._rooms[name] = buffer
        return buffer

    def _mirror(self, name: str, num_bytes: int) -> Mirror:
        """The same for a tensor that the CPU writes or reads."""
        mirror = self._mirrors.get(name)
        if mirror is None or mirror.num_bytes < num_bytes:
            self._mirrors.pop(name, None)
            mirror = Mirror(self._device, self._most(name, num_bytes), self._what(name))
            self._mirrors[name] = mirror
        return mirror

    def _most(self, name: str, num_bytes: int) -> int:
        return max(num_bytes, self.plan.most_bytes.get(name, 0))

    def _what(self, name: str) -> str:
        return f"{name} of {self.plan.name}"


def open_plan(bundle: Bundle, name: str) -> tuple[Plan, PlanSpec]:
    """The plan of a bundle's graph ("decoder" included) on this machine's GPU; and its record.

    Raises:
        DataError, IncompatibleError, InternalError, NotFoundError, UnavailableError: See
            `TensorRTEngine.open`.
    """
    device = Device()
    plugin = native.find_library(native.PLUGIN)
    module, plans = _find_plans(bundle, device, plugin)
    record = plans.plan(name)
    plan = Plan(
        module,
        device,
        plans.file(name),
        name,
        record,
        plugin if record.plugin else None,
        version_compatible=plans.record.options.version_compatible,
    )
    return plan, record


def _find_plans(bundle: Bundle, device: Device, plugin: Path | None) -> tuple[ModuleType, Plans]:
    """The library that is here and has plans, and they."""
    sha256 = FileSpec.of(plugin).sha256 if plugin else None
    refusal: PPLLaVAError | None = None
    for library in _LIBRARIES:
        if not is_installed(library):
            continue
        try:
            module = import_library(library)
        except UnavailableError as error:
            refusal = refusal or error
            continue
        machine = Machine(
            gpu=device.name,
            compute_capability=device.compute_capability,
            library=library,
            version=module.__version__,
            integrated=device.integrated,
            memory_bytes=device.memory_bytes,
        )
        try:
            return module, Plans.find(bundle, machine, sha256)
        except (DataError, IncompatibleError, NotFoundError) as error:
            refusal = refusal or error
    raise refusal or UnavailableError(
        "device tensorrt: TensorRT's Python package is missing: on a Jetson it is JetPack's "
        "python3-libnvinfer, elsewhere: pip install tensorrt"
    )


def _listed(shape: Shape) -> str:
    return ",".join(map(str, shape))
