"""`ppllava-build BUNDLE`: a bundle's graphs → plans, by TensorRT on the device or by TensorRT-RTX.

TensorRT builds for the GPU it finds. TensorRT-RTX builds ahead of time too, for compute
capabilities that are named, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ppllava_engines import devices, native
from ppllava_engines.bundle import Bundle
from ppllava_engines.devices import Recipe
from ppllava_engines.errors import UnavailableError, UsageError, run_command
from ppllava_engines.manifest import Axes, Manifest
from ppllava_engines.progress import stage_bar
from ppllava_engines.tensorrt.builder import PIP, is_installed, library_version
from ppllava_engines.tensorrt.graphs import GRAPHS
from ppllava_engines.tensorrt.plans import (
    ANY_GPU,
    ComputeCapability,
    Hardware,
    Library,
    Machine,
    Options,
    PlanSpec,
    Record,
    sm,
)
from ppllava_engines.tensorrt.profiles import Profile
from ppllava_engines.tensorrt.tasks import FIRST_STAGE, Task, build_plans

if TYPE_CHECKING:
    from rich.table import Table

_MB = 10**6


def main(argv: Sequence[str]) -> None:
    """Builds the plans of one bundle and prints what was built.

    Args:
        argv: The arguments without the program's name.

    Raises:
        PPLLaVAError: The build failed; see `build_plans`.
        SystemExit: `--help`, or arguments that are not understood.
    """
    args = _parser().parse_args(argv)
    library: Library = "tensorrt_rtx" if args.library == "rtx" else "tensorrt"
    bundle = Bundle.open(args.bundle)
    task = _task(args, bundle.manifest, library)
    with stage_bar("building", len(task.graphs)) as show:
        on_stage = (lambda name, at: show(f"{name}: {at}", at == FIRST_STAGE)) if show else None
        plans = build_plans(bundle, task, on_stage)
    from rich.console import Console

    Console().print(table(plans.record))
    print(f"plans: {plans.path}")


def run() -> int:
    """Returns the exit code of the command with the process's arguments."""
    return run_command(main)


def table(record: Record) -> Table:
    """What was built, one row per profile."""
    from rich.table import Table

    codes = record.options.compute_capabilities
    machine = record.machine
    title = f"{machine.library} {machine.version} for {', '.join(map(sm, codes))}"
    shown = Table(title=title if codes else str(machine))
    for column in ("graph", "profile", "from … tuned for … to"):
        shown.add_column(column)
    for column in ("s", "MB", "builder MB"):
        shown.add_column(column, justify="right")
    for name, plan in record.graphs.items():
        sizes = (plan.file.size, plan.peak_bytes)
        costs = [f"{plan.seconds:.1f}", *(f"{size / _MB:.1f}" for size in sizes)]
        for profile in plan.profiles:
            shown.add_row(name, profile.name, ", ".join(_ranges(plan, profile)) or "fixed", *costs)
            name, costs = "", []
    return shown


def machine_here(library: Library) -> Machine:
    """This machine; see `devices.current_machine`.

    Raises:
        UnavailableError: The library or a GPU is missing.
    """
    if not is_installed(library):
        raise UnavailableError(f"{library} is not installed: {PIP[library]}")
    return devices.current_machine(library)


def _task(args: argparse.Namespace, manifest: Manifest, library: Library) -> Task:
    _check_options(args, library)
    if not is_installed(library):
        raise UnavailableError(f"{library} is not installed: {PIP[library]}")
    recipe = None if args.device == "auto" else devices.recipe(args.device)
    gpu = devices.find_gpu()
    codes: tuple[ComputeCapability, ...] = ()
    if library == "tensorrt_rtx":
        machine, codes = _rtx_machine(args.compute_capability, recipe, gpu)
    else:
        machine = machine_here(library)
        if recipe is not None and gpu is not None:
            devices.check_device(recipe, gpu)
    if recipe is None and gpu is not None:
        recipe = devices.recipe_for(gpu)
    options = Options(
        hardware=args.hardware,
        version_compatible=args.version_compatible,
        compute_capabilities=codes,
    )
    task = Task(
        machine=machine,
        options=options,
        graphs=tuple(dict.fromkeys(args.graphs)),
        frames=args.frames,
        tokens=args.max_tokens,
        kernel=args.kernel,
        stride=args.stride,
        workspace_bytes=args.workspace * _MB if args.workspace else None,
        timing_cache=args.timing_cache,
        plugin=_plugin(library, args.graphs),
    )
    return _limited(task, manifest, recipe)


def _check_options(args: argparse.Namespace, library: Library) -> None:
    if library == "tensorrt":
        if args.compute_capability:
            raise UsageError(
                "--compute-capability is for --library rtx: TensorRT builds for the GPU it finds"
            )
    elif args.timing_cache:
        raise UsageError("--timing-cache is for --library tensorrt: TensorRT-RTX has none")
    elif args.hardware != "gpu" or args.version_compatible:
        raise UsageError(
            "--hardware and --version-compatible are for --library tensorrt: name each "
            "--compute-capability for TensorRT-RTX"
        )


def _rtx_machine(
    asked: Sequence[ComputeCapability], recipe: Recipe | None, gpu: devices.Gpu | None
) -> tuple[Machine, tuple[ComputeCapability, ...]]:
    """For what TensorRT-RTX builds: what was asked, the device that was named, or the GPU here."""
    version = library_version("tensorrt_rtx")
    codes = tuple(dict.fromkeys(asked)) or ((recipe.compute_capability,) if recipe else ())
    if codes:
        gpu = devices.Gpu(ANY_GPU, codes[0], integrated=False, memory_bytes=0)
    elif gpu is not None:
        codes = (gpu.compute_capability,)
    else:
        raise UsageError(
            "no GPU is here to build for: name --compute-capability, as 8.6, or --device"
        )
    return devices.machine_of(gpu, "tensorrt_rtx", version), codes


def task_here(manifest: Manifest, machine: Machine) -> Task:
    """All graphs for this machine, within the limits of its recipe."""
    gpu = devices.find_gpu()
    recipe = devices.recipe_for(gpu) if gpu else None
    task = Task(machine=machine, options=Options(), plugin=_plugin(machine.library, GRAPHS))
    return _limited(task, manifest, recipe)


def _limited(task: Task, manifest: Manifest, recipe: Recipe | None) -> Task:
    """The task within what is recommended for the machine, where it says nothing itself."""
    if recipe is None:
        return task
    frames = min(recipe.frames, manifest.model.max_frames)
    tokens = min(recipe.tokens, manifest.decoder.max_positions)
    return replace(
        task,
        frames=task.frames or frames,
        tokens=task.tokens or tokens,
        workspace_bytes=task.workspace_bytes or recipe.workspace_mb * _MB,
        tactic_bytes=recipe.tactic_mb * _MB,
    )


def _plugin(library: Library, graphs: Sequence[str]) -> Path | None:
    if library == "tensorrt_rtx" or "pool" not in graphs:
        return None
    if (path := native.find_library(native.PLUGIN)) is None:
        print("note: the plugin library is not built, pooling is built of plain operators",
            file=sys.stderr)  # fmt: skip
    return path


def _ranges(plan: PlanSpec, profile: Profile) -> Iterator[str]:
    """The range of every axis that is not fixed, and of every value."""
    axes = {
        axis: tuple(shape[place] for shape in profile.shapes[tensor.name])
        for tensor in plan.spec.inputs
        if tensor.name in profile.shapes
        for place, axis in enumerate(tensor.shape)
        if isinstance(axis, str)
    }
    for axis, sizes in axes.items():
        yield f"{axis} {'…'.join(map(str, sizes))}"
    for name, values in profile.values.items():
        yield f"{name} {'…'.join(_shown(value) for value in values)}"


def _shown(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))


def _axes(text: str) -> Axes:
    sizes = [int(part) for part in text.split(",")]
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(text)
    return (sizes[0], sizes[1], sizes[2])


def _code(text: str) -> ComputeCapability:
    major, minor = text.split(".")
    return int(major), int(minor)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppllava-build",
        description="Build TensorRT plans of a bundle's graphs, kept in the bundle.",
    )
    add = parser.add_argument
    add("bundle", type=Path, help="folder that ppllava-export wrote")
    add("--device", default="auto", metavar="NAME",
        help="machine of devices.toml whose limits to keep, or auto (default)")  # fmt: skip
    add("--library", choices=("tensorrt", "rtx"), default="tensorrt",
        help="TensorRT, on the GPU itself (default), or TensorRT-RTX")  # fmt: skip
    add("--compute-capability", type=_code, nargs="+", default=[], metavar="X.Y",
        help="for which TensorRT-RTX compiles, as 8.6 8.9")  # fmt: skip
    add("--graphs", choices=GRAPHS, nargs="+", default=GRAPHS, help="which (default: all)")
    add("--frames", type=_positive, metavar="N", help="most frames of a video")
    add("--max-tokens", type=_positive, metavar="N", help="most tokens of prompt and answer")
    add("--kernel", type=_axes, metavar="T,H,W", help="pooling to bake into the pool plan")
    add("--stride", type=_axes, metavar="T,H,W", help="likewise")
    add("--workspace", type=_positive, metavar="MB", help="most scratch memory of one layer")
    add("--timing-cache", type=Path, metavar="PATH",
        help="file of measured kernels, read and written")  # fmt: skip
    add("--hardware", choices=get_args(Hardware), default="gpu",
        help="other GPUs that TensorRT's plans are good for (default: none)")  # fmt: skip
    add("--version-compatible", action="store_true",
        help="let newer minor versions of TensorRT load the plans")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(run())
