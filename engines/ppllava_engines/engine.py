"""One graph that can be run: name → array in, name → array out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import GraphSpec, TensorSpec
from ppllava_engines.errors import DataError, UnavailableError, UsageError
from ppllava_engines.tensorrt.device import DeviceArray

Array = NDArray[Any] | DeviceArray

DEVICES = ("cpu", "openvino", "tensorrt")

# What "openvino" computes; the other graphs are ONNX Runtime's there too. The op of pooling is this
# package's own, and the decoder's cache is bound in place.
TOWERS = ("vision", "vision_tokens", "text")


class Engine(Protocol):
    """A graph on a device."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes, in the graph's order."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives back, in the graph's order."""
        ...

    def run(
        self, feeds: Mapping[str, Array], keep: Mapping[str, Array] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Every output by name but those in `keep`, for exactly the inputs that `inputs` names.

        Nothing is cast: an array has the dtype its TensorSpec states.

        Args:
            feeds: Input → array.
            keep: Output → where it goes, on the device: an array of `empty`, or rows of one.

        Raises:
            DataError: A missing or unknown input, another dtype, rank or fixed dimension, or two
                sizes for one dynamic axis.
            InternalError: The backend failed on valid inputs.
        """
        ...

    @property
    def limits(self) -> Mapping[str, int]:
        """The largest size of each dynamic axis, by its name, where the backend has one."""
        ...

    def empty(self, name: str, size: int) -> Array:
        """Room on the device for the output `name`, whose first axis has this size."""
        ...


def open_engine(
    path: Path,
    spec: GraphSpec,
    device: str = "cpu",
    threads: int | None = None,
    *,
    lean: bool = False,
) -> Engine:
    """The engine of one graph file.

    Args:
        path: The graph's file on this machine.
        spec: What the manifest says of it; the file must agree.
        device: "cpu"; or "openvino", which takes the graphs whose files are named as in TOWERS and
            leaves others to "cpu". For "tensorrt" a bundle's plans are needed too, see
            `Bundle.engine`.
        threads: Threads that work on one operator; None is one per core this process may use.
        lean: Whether to run slower in little memory, see `onnxruntime.open_session`; OpenVINO has
            one way.

    Raises:
        DataError: The file is not a graph, or not the one that `spec` describes.
        IncompatibleError: A graph of a type that the device does not compute in.
        NotFoundError: There is no such file.
        UnavailableError: The device, or the package for it, is missing.
        UsageError: `threads` is not positive.
    """
    if device not in ("cpu", "openvino"):
        raise UnavailableError(
            f"no engine for device {device!r}: a file runs on 'cpu' and 'openvino', a bundle on "
            "'tensorrt' too"
        )
    # Imported where they are used: reading a manifest needs no backend, and loading one takes time.
    if device == "openvino" and path.stem in TOWERS:
        from ppllava_engines.openvino import OpenVINOEngine

        return OpenVINOEngine(path, spec, threads)
    from ppllava_engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, spec, threads, lean=lean)


def count_threads(threads: int | None) -> int:
    """How many threads are meant: as many as told, or one per core this process may use.

    Raises:
        UsageError: `threads` is not positive.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}, expected 1 or more")
    return threads or len(os.sched_getaffinity(0))


def empty_output(spec: GraphSpec, name: str, size: int) -> NDArray[Any]:
    """Room in this machine's memory for the output `name`; see `Engine.empty`."""
    output = next(output for output in spec.outputs if output.name == name)
    fixed = [axis for axis in output.shape[1:] if isinstance(axis, int)]
    return np.empty((size, *fixed), output.dtype)


def check_graph(
    path: Path, spec: GraphSpec, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """Nothing, when the graph at `path` takes and gives what the manifest's `spec` says.

    Raises:
        DataError: What both say, in one sentence.
    """
    for what, found, expected in (
        ("inputs", inputs, spec.inputs),
        ("outputs", outputs, spec.outputs),
    ):
        by_name = {tensor.name: tensor for tensor in found}
        if len(found) != len(expected) or not all(
            tensor.name in by_name and _agree(by_name[tensor.name], tensor) for tensor in expected
        ):
            raise DataError(
                f"{path}: the graph's {what} are {_listed(found)}, but the manifest says "
                f"{_listed(expected)}: export it again"
            )


def _agree(found: TensorSpec, spec: TensorSpec) -> bool:
    """Whether a graph's tensor can be what the manifest says; a dynamic axis agrees with any."""
    return (
        found.dtype == spec.dtype
        and len(found.shape) == len(spec.shape)
        and all(
            a == b
            for a, b in zip(found.shape, spec.shape, strict=True)
            if isinstance(a, int) and isinstance(b, int)
        )
    )


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec}" for spec in specs) or "none"


def check_feeds(
    graph: str,
    inputs: Sequence[TensorSpec],
    feeds: Mapping[str, Array],
    kinds: tuple[type, ...] = (np.ndarray,),
) -> None:
    """Nothing, when `feeds` is exactly what `inputs` asks for, in arrays of these kinds.

    Raises:
        DataError: What differs, in one sentence that starts with `graph`.
    """
    names = [spec.name for spec in inputs]
    missing = [name for name in names if name not in feeds]
    unknown = [name for name in feeds if name not in names]
    if missing or unknown:
        raise DataError(
            f"{graph}: missing inputs {missing}, unknown inputs {unknown}, expected {names}"
        )
    sizes: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        array = feeds[spec.name]
        if not isinstance(array, kinds):
            raise DataError(
                f"{graph}: input {spec.name} is a {type(array).__name__}, expected {spec}"
            )
        if not spec.accepts(array):
            got = TensorSpec.of(spec.name, array)
            raise DataError(f"{graph}: input {spec.name} is {got}, expected {spec}")
        for axis, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(axis, str):
                first_size, first_name = sizes.setdefault(axis, (size, spec.name))
                if size != first_size:
                    raise DataError(
                        f"{graph}: axis {axis} is {first_size} in {first_name} but {size} in "
                        f"{spec.name}, expected one size"
                    )
