"""TensorRT's and TensorRT-RTX's own interface: an ONNX file in, a plan's file out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ppllava_engines.errors import (
    IncompatibleError,
    InternalError,
    PPLLaVAError,
    UnavailableError,
)
from ppllava_engines.tensorrt.builder import (
    Request,
    import_library,
    is_out_of_memory,
    out_of_memory,
    shortened,
)
from ppllava_engines.tensorrt.plans import ComputeCapability, sm
from ppllava_engines.tensorrt.profiles import Profile

_HARDWARE = {"compute capability": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}
_PROGRESS_SECONDS = 0.2


def compile_plan(request: Request, progress: Callable[[str], None]) -> None:
    """Writes the plan, in this process.

    Raises:
        IncompatibleError, InternalError, UnavailableError: See `builder.build_plan`.
        OSError: The plan or the timing cache could not be written.
    """
    trt = import_library(request.library)
    logger = _logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # what pybind11 makes of a factory that returned nothing
        raise UnavailableError(
            f"plan {request.graph}: {request.library} has no GPU to build on"
            f"{_because(logger)}: check nvidia-smi, or build with --library rtx, which needs none"
        ) from error
    if request.plugin:
        handle = builder.get_plugin_registry().load_library(request.plugin)
        if handle is None:
            raise IncompatibleError(
                f"plan {request.graph}: {request.library} {trt.__version__} does not take the "
                f"plugin library {request.plugin}{_because(logger)}: build it again"
            )
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    progress("reading")
    if not parser.parse_from_file(request.onnx):
        raise _parser_error(request, trt, parser, logger)
    config = builder.create_builder_config()
    _configure(trt, config, request)
    for profile in request.profiles:
        _add_profile(request.graph, builder, network, config, profile)
    config.progress_monitor = monitor = _monitor(trt, progress)
    with _timing_cache(config, request):
        _write(trt, builder, network, config, request, logger)
    del monitor  # TensorRT only borrows it


def _configure(trt: Any, config: Any, request: Request) -> None:
    # On by default. Its 10 bits are not those of fp32: what is kept in fp32 needs them, such as the
    # relevance, which a temperature of 0.01 divides.
    config.clear_flag(trt.BuilderFlag.TF32)
    pools = trt.MemoryPoolType
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(pools.WORKSPACE, request.workspace_bytes)
    if request.tactic_bytes is not None:
        config.set_memory_pool_limit(pools.TACTIC_DRAM, request.tactic_bytes)
    options = request.options
    if codes := options.compute_capabilities:
        config.num_compute_capabilities = len(codes)
        for place, code in enumerate(codes):
            config.set_compute_capability(_compute_capability(trt, code), place)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware != "gpu":
        level = getattr(trt.HardwareCompatibilityLevel, _HARDWARE[options.hardware], None)
        if level is None:
            raise IncompatibleError(
                f"plan {request.graph}: tensorrt {trt.__version__} has no plans for a whole "
                f"{options.hardware}: choose another --hardware"
            )
        config.hardware_compatibility_level = level


def _compute_capability(trt: Any, code: ComputeCapability) -> Any:
    kinds = trt.ComputeCapability
    if (kind := getattr(kinds, sm(code).upper(), None)) is None:
        known = sorted(int(name[2:]) for name in kinds.__members__ if name.startswith("SM"))
        raise IncompatibleError(
            f"plan: tensorrt_rtx {trt.__version__} does not compile for {sm(code)}, expected one "
            f"of {', '.join(f'sm{number}' for number in known)}: use --library tensorrt there"
        )
    return kind


def _add_profile(graph: str, builder: Any, network: Any, config: Any, profile: Profile) -> None:
    inputs = [network.get_input(place) for place in range(network.num_inputs)]
    names = {tensor.name for tensor in inputs}
    if names != profile.shapes.keys() | profile.values.keys():
        raise InternalError(
            f"plan {graph}: profile {profile.name} is of inputs "
            f"{', '.join(sorted(profile.shapes.keys() | profile.values.keys()))}, the graph has "
            f"{', '.join(sorted(names))}"
        )
    ranges = builder.create_optimization_profile()
    for tensor in inputs:
        if tensor.name in profile.shapes:
            ranges.set_shape(tensor.name, *profile.shapes[tensor.name])
        elif tensor.is_shape_tensor:
            ranges.set_shape_input(tensor.name, *profile.values[tensor.name])
        else:
            raise IncompatibleError(
                f"plan {graph}: TensorRT does not take the values of {tensor.name} for shapes: "
                "give --kernel and --stride"
            )
    if config.add_optimization_profile(ranges) < 0:
        raise IncompatibleError(f"plan {graph}: TensorRT refuses the profile {profile.name}")


def _parser_error(request: Request, trt: Any, parser: Any, logger: Any) -> PPLLaVAError:
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    if not errors:
        where, said = "the graph", _because(logger)
    else:
        error = errors[0]  # at the node; those after it are of what calls it
        name = error.node_name() or f"number {error.node()}"
        where = f"node {name} ({error.node_operator()})" if error.node() >= 0 else "the graph"
        said = f": {shortened(error.desc())}"
    return IncompatibleError(
        f"plan {request.graph}: {request.library} {trt.__version__} does not take {where}{said}: "
        "use another version, or run this graph with ONNX Runtime"
    )


def _write(
    trt: Any, builder: Any, network: Any, config: Any, request: Request, logger: Any
) -> None:
    with Path(request.out).open("wb") as stream:
        if hasattr(
            builder, "build_serialized_network_to_stream"
        ):  # since 10.13: never whole in memory
            writer = _writer(trt, stream)
            done = builder.build_serialized_network_to_stream(network, config, writer)
            if writer.error is not None:
                raise writer.error
        else:
            plan = builder.build_serialized_network(network, config)
            done = plan is not None
            if done:
                stream.write(memoryview(plan))
    if not done:
        if is_out_of_memory(logger.errors):
            raise out_of_memory(request.graph)
        raise IncompatibleError(
            f"plan {request.graph}: {request.library} {trt.__version__} cannot build it"
            f"{_because(logger)}: use another version, or run this graph with ONNX Runtime"
        )


@contextmanager
def _timing_cache(config: Any, request: Request) -> Iterator[None]:
    """Reads the cache before the block and writes it after; a foreign one is started anew."""
    if request.timing_cache is None:
        yield
        return
    path = Path(request.timing_cache)
    old = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(old)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    yield
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(memoryview(config.get_timing_cache().serialize()))
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _because(logger: Any) -> str:
    return f": {shortened(logger.errors[0])}" if logger.errors else ""


# TensorRT's interfaces can only be derived from where it is there.


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text)

    return Logger()


def _monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.last = 0.0
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if (now := time.monotonic()) >= self.last + _PROGRESS_SECONDS:
                self.last = now
                progress(f"{phase} {step + 1}/{self.steps.get(phase, 0)}")
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _writer(trt: Any, stream: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return stream.write(data)
            except OSError as error:  # an exception must not pass through TensorRT
                self.error = error
                return -1

    return Writer()
