"""What to build of a bundle, and building it: every graph lowered, compiled and recorded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ppllava_engines import strict_json
from ppllava_engines.bundle import Bundle, FileSpec
from ppllava_engines.errors import DataError, IncompatibleError
from ppllava_engines.manifest import Axes
from ppllava_engines.tensorrt.builder import Request, build_plan
from ppllava_engines.tensorrt.graphs import GRAPHS, PoolNode, write_graph
from ppllava_engines.tensorrt.plans import (
    FOLDER,
    RECORD,
    Machine,
    Options,
    Plans,
    PlanSpec,
    Record,
    new_plans,
)
from ppllava_engines.tensorrt.profiles import graph_profiles

FIRST_STAGE = "lowering"
# Where TensorRT's parser takes a plugin's inputs as shapes. It says so since 10.1; JetPack 6 has
# 10.3, whose plans keep to attributes, the older way.
_SHAPE_INPUTS = (10, 7)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to build of a bundle.

    Attributes:
        machine: For which.
        options: Where else the plans shall run.
        graphs: Of GRAPHS.
        frames, tokens: See `profiles.graph_profiles`.
        kernel, stride: Pooling that is baked into the pool plan; None leaves both as inputs where
            the plugin allows it, and bakes in the model's own elsewhere.
        workspace_bytes, tactic_bytes, timing_cache: See `builder.Request`.
        plugin: The library of our plugin; None where it is not built.
    """

    machine: Machine
    options: Options
    graphs: tuple[str, ...] = GRAPHS
    frames: int | None = None
    tokens: int | None = None
    kernel: Axes | None = None
    stride: Axes | None = None
    workspace_bytes: int | None = None
    tactic_bytes: int | None = None
    timing_cache: Path | None = None
    plugin: Path | None = None

    @property
    def pool_node(self) -> PoolNode:
        """How the pool graph's own operator is handed over."""
        if self.plugin is None or self.machine.library == "tensorrt_rtx":
            return "body"
        version = tuple(int(part) for part in self.machine.version.split(".")[:2])
        baked = self.kernel is not None or self.stride is not None or version < _SHAPE_INPUTS
        return "attributes" if baked else "inputs"


def build_plans(
    bundle: Bundle, task: Task, on_stage: Callable[[str, str], None] | None = None
) -> Plans:
    """The plans of the task's graphs, in the bundle.

    Plans of other graphs that were built of the same bundle for the same machine stay; else there
    are those of before or the new ones, whatever happens meanwhile.

    Args:
        bundle: The bundle, opened.
        task: What to build.
        on_stage: Called with a graph and what its builder is at.

    Raises:
        IncompatibleError: A vision graph in dynamic int8.
        DataError, IncompatibleError, InternalError, StorageError, UnavailableError, UsageError:
            See `graphs.write_graph`, `profiles.graph_profiles` and `builder.build_plan`.
    """
    record = Record(
        machine=task.machine,
        bundle_sha256=bundle.manifest.seal,
        options=task.options,
        graphs={},
    )
    if "vision" in task.graphs and bundle.manifest.precision.vision == "int8":
        raise IncompatibleError(
            "vision: its linear layers are rounded by what each run brings, which TensorRT does "
            "not do: export with --vision int8 --calibrate VIDEO..., or without --vision"
        )
    with new_plans(bundle, record.name) as staging:
        plans = _kept(bundle.path / FOLDER / record.name, record, task.graphs, staging)
        for name in task.graphs:
            lowered = staging / "lowered"  # in the bundle's own file system: it may be large
            try:
                stage = (lambda at, name=name: on_stage(name, at)) if on_stage else None
                plans[name] = _build_one(bundle, task, name, lowered, staging, stage)
            finally:
                shutil.rmtree(lowered, ignore_errors=True)
        record = replace(record, graphs=plans)
        (staging / RECORD).write_text(record.to_json(), encoding="utf-8")
    return Plans(bundle.path / FOLDER / record.name, record)


def _kept(old: Path, record: Record, graphs: Sequence[str], staging: Path) -> dict[str, PlanSpec]:
    """Links into `staging` the older plans of other graphs that are still good."""
    try:
        plans = Plans(old, Record.from_json(strict_json.read_text(old / RECORD), str(old)))
    except (OSError, DataError, IncompatibleError):
        return {}
    before = plans.record
    kept: dict[str, PlanSpec] = {}
    if before.options != record.options:
        return kept
    for name, spec in before.graphs.items():
        alone = replace(before, graphs={name: spec})
        if name not in graphs and not alone.refusal(
            record.bundle_sha256, record.machine, spec.plugin
        ):
            with suppress(DataError):
                path, link = plans.file(name), staging / spec.path
                try:
                    os.link(path, link)
                except OSError:  # a file system without links
                    shutil.copyfile(path, link)
                kept[name] = spec
    return kept


def _build_one(
    bundle: Bundle,
    task: Task,
    name: str,
    lowered: Path,
    staging: Path,
    on_stage: Callable[[str], None] | None,
) -> PlanSpec:
    if on_stage:
        on_stage(FIRST_STAGE)
    node: PoolNode = task.pool_node if name == "pool" else "body"
    kernel = stride = None
    if name == "pool" and node != "inputs":
        model = bundle.manifest.model
        # It may follow from the number of frames: that of most videos, then.
        frames = min(task.frames or model.default_frames, model.default_frames)
        usual = model.video_window((frames, *model.grid))
        kernel, stride = task.kernel or usual[0], task.stride or usual[1]
    spec = write_graph(bundle, name, lowered, pool_node=node, kernel=kernel, stride=stride)
    profiles = graph_profiles(bundle.manifest, name, spec, frames=task.frames, tokens=task.tokens)
    calls_plugin = node != "body"
    file = f"{name}.plan"
    built = build_plan(
        Request(
            library=task.machine.library,
            graph=name,
            onnx=str(lowered / f"{name}.onnx"),
            out=str(staging / file),
            profiles=profiles,
            options=task.options,
            workspace_bytes=task.workspace_bytes,
            tactic_bytes=task.tactic_bytes,
            timing_cache=str(task.timing_cache) if task.timing_cache else None,
            plugin=str(task.plugin) if calls_plugin else None,
        ),
        on_stage,
    )
    return PlanSpec(
        path=file,
        file=FileSpec.of(staging / file),
        spec=spec,
        profiles=profiles,
        kernel=kernel,
        stride=stride,
        plugin=FileSpec.of(task.plugin).sha256 if calls_plugin and task.plugin else None,
        seconds=round(built.seconds, 3),
        peak_bytes=built.peak_bytes,
    )
