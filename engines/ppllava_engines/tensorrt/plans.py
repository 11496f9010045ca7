"""What TensorRT made of a bundle's graphs for one machine: plans, and when they may be loaded.

BUNDLE/plans/{gpu}[-{memory}gb]-sm{compute capability}-{tensorrt|rtx}{version}[-{options}]/
    plans.json              this file's Record, as JSON, sealed by its own hash
    {graph}.plan            one per graph
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppllava_engines import strict_json
from ppllava_engines.bundle import Bundle, FileSpec, GraphSpec
from ppllava_engines.errors import DataError, IncompatibleError, NotFoundError
from ppllava_engines.manifest import Axes, refuse_escape
from ppllava_engines.sealed_json import Format
from ppllava_engines.staging import replaced_folder
from ppllava_engines.tensorrt.profiles import Profile

SCHEMA_VERSION = 1
FOLDER = "plans"
RECORD = "plans.json"
ANY_GPU = "any"

Library = Literal["tensorrt", "tensorrt_rtx"]
# Of TensorRT's engines: for one GPU, for all of its compute capability, for all since Ampere.
Hardware = Literal["gpu", "compute capability", "ampere+"]
ComputeCapability = tuple[int, int]

_KEYS = ("schema_version", "bundle_sha256", "graphs")  # of plans of any version
_AMPERE: ComputeCapability = (8, 0)
# What a driver reports is a little less than what was sold, and not always the same.
_SAME_MEMORY = 0.2


def sm(compute_capability: ComputeCapability) -> str:
    """The name of a compute capability's code, such as "sm87"."""
    return "sm{}{}".format(*compute_capability)


def same_memory(first: int, second: int) -> bool:
    """Whether two numbers of bytes may be the memory of the same machine."""
    return abs(first - second) <= _SAME_MEMORY * max(first, second)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU and the TensorRT that serves it.

    Attributes:
        gpu: The name the driver gives it; `ANY_GPU` of plans built ahead of time.
        compute_capability: (major, minor).
        library: The Python module: "tensorrt" or "tensorrt_rtx".
        version: That module's, all its parts.
        integrated: Whether GPU and CPU share their memory.
        memory_bytes: The GPU's memory; 0 where no GPU was asked.
        host: Operating system and processor, as "linux-x86_64".
    """

    gpu: str
    compute_capability: ComputeCapability
    library: Library
    version: str
    integrated: bool
    memory_bytes: int
    host: str = f"{platform.system().lower()}-{platform.machine()}"

    def __str__(self) -> str:
        return f"{self.gpu} ({sm(self.compute_capability)}) with {self.library} {self.version}"


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """One plan: its file beside plans.json, and what it takes.

    Attributes:
        path: The file's name.
        file: Its size and hash.
        spec: Inputs and outputs of the graph as it was lowered for TensorRT.
        profiles: In the plan's order; never empty.
        kernel, stride: The pooling that is baked into a pool plan; None where both are inputs, and
            of other graphs.
        plugin: SHA-256 of the plugin library that the plan calls; None without one.
        seconds: How long the build took.
        peak_bytes: The most memory that the build took of the host.
    """

    path: str
    file: FileSpec
    spec: GraphSpec
    profiles: tuple[Profile, ...]
    kernel: Axes | None
    stride: Axes | None
    plugin: str | None
    seconds: float
    peak_bytes: int

    def __post_init__(self) -> None:
        refuse_escape(self.path)
        if not self.profiles:
            raise DataError(f"{RECORD}: plan {self.path} has no profiles: run ppllava-build again")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How plans were built, as far as it decides where they run.

    Attributes:
        hardware: For which other GPUs TensorRT's plans are good.
        version_compatible: Whether newer minor versions of the same major load TensorRT's plans.
        compute_capabilities: For which TensorRT-RTX compiled; empty of TensorRT's plans.
    """

    hardware: Hardware = "gpu"
    version_compatible: bool = False
    compute_capabilities: tuple[ComputeCapability, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """What plans.json says.

    Attributes:
        schema_version: SCHEMA_VERSION of the release that wrote it.
        machine: Where, or for what, the plans were built.
        bundle_sha256: `Manifest.seal` of the bundle they were made of.
        options: See there.
        graphs: Graph → plan.
    """

    schema_version: int = SCHEMA_VERSION
    machine: Machine
    bundle_sha256: str
    options: Options
    graphs: dict[str, PlanSpec]

    @property
    def name(self) -> str:
        """The folder's name."""
        codes = self.options.compute_capabilities or (self.machine.compute_capability,)
        library = "rtx" if self.machine.library == "tensorrt_rtx" else "tensorrt"
        gpu = re.sub(r"[^a-z0-9]+", "-", self.machine.gpu.lower()).strip("-")
        parts = [gpu or "gpu", *map(sm, codes), library + self.machine.version]
        if self.machine.integrated:  # boards of one name differ in their memory
            parts.insert(1, f"{round(self.machine.memory_bytes / 1e9)}gb")
        if self.options.hardware != "gpu":
            parts.append(self.options.hardware.replace(" ", "-"))
        if self.options.version_compatible:
            parts.append("version-compatible")
        return "-".join(parts)

    def to_json(self) -> str:
        """The text that `from_json` reads back to an equal record, sealed by its own hash."""
        return _format().dumps(self)

    @staticmethod
    def from_json(text: str, source: str) -> Record:
        """The record of `text`; `source` names it in errors.

        Raises:
            DataError: Not JSON, a key or value that does not belong, or one that was changed.
            IncompatibleError: Another schema version.
        """
        return _format().loads(text, source)

    def refusal(self, seal: str, machine: Machine, plugin: str | None) -> str | None:
        """Why these plans may not be loaded there; None when they may.

        Args:
            seal: `Manifest.seal` of the bundle.
            machine: Where they would be loaded.
            plugin: SHA-256 of the plugin library that is there; None without one.
        """
        built = self.machine
        if self.bundle_sha256 != seal:
            return "built of another export of the bundle"
        if built.library != machine.library:
            return f"for {built.library}, not {machine.library}"
        if not self._runs_version(machine.version):
            return f"for {built.library} {built.version}, not {machine.version}"
        if built.host != machine.host:
            return f"for {built.host}, not {machine.host}"
        if reason := self._refuses_gpu(machine):
            return reason
        for name, plan in self.graphs.items():
            if plan.plugin not in (None, plugin):
                there = f"{plugin[:12]}… is here" if plugin else "none is built here"
                return f"its {name} calls the plugin library {plan.plugin[:12]}…, {there}"
        return None

    def _runs_version(self, version: str) -> bool:
        if not self.options.version_compatible:
            return version == self.machine.version
        built, there = (_release(text) for text in (self.machine.version, version))
        return there[:1] == built[:1] and there >= built

    def _refuses_gpu(self, machine: Machine) -> str | None:
        there = machine.compute_capability
        if codes := self.options.compute_capabilities:
            return None if there in codes else f"for {', '.join(map(sm, codes))}, not {sm(there)}"
        built = self.machine.compute_capability
        if self.options.hardware == "ampere+":
            return None if there >= _AMPERE else f"for sm80 and later, not {sm(there)}"
        if there != built:
            return f"for {sm(built)}, not {sm(there)}"
        if self.options.hardware != "gpu":
            return None
        if machine.gpu != self.machine.gpu:
            return f"for {self.machine.gpu}, not {machine.gpu}"
        # Boards with more or fewer processors, all of one name: their memory tells them apart.
        if machine.integrated and not same_memory(machine.memory_bytes, self.machine.memory_bytes):
            sizes = (self.machine.memory_bytes, machine.memory_bytes)
            return "for {} with {:.0f} GB, not {:.0f} GB".format(
                machine.gpu, *(size / 1e9 for size in sizes)
            )
        return None


@dataclass(frozen=True)
class Plans:
    """Plans that may be loaded on this machine; `Plans.find` makes one.

    Attributes:
        path: Their folder.
        record: What it says of them.
    """

    path: Path
    record: Record

    @staticmethod
    def find(bundle: Bundle, machine: Machine, plugin: str | None = None) -> Plans:
        """The bundle's plans for `machine`; those of its very GPU and version come first.

        Args:
            bundle: The bundle, opened.
            machine: The GPU and the library that will load them.
            plugin: SHA-256 of the plugin library that will be loaded; None without one.

        Raises:
            DataError: Plans that cannot be read, and no others that may be loaded.
            IncompatibleError: There are plans, and none may be loaded: says why, of each.
            NotFoundError: None was built.
        """
        folder = bundle.path / FOLDER
        records = sorted(path for path in folder.glob(f"*/{RECORD}") if path.parent.name[0] != ".")
        if not records:
            raise NotFoundError(
                f"bundle {bundle.path}: no plans are built: run ppllava-build {bundle.path}"
            )
        seal = bundle.manifest.seal
        found: list[Plans] = []
        refusals, damage = [], []
        for path in records:
            try:
                record = Record.from_json(strict_json.read_text(path), str(path))
            except (DataError, IncompatibleError) as error:
                damage.append(error)
                continue
            if reason := record.refusal(seal, machine, plugin):
                refusals.append(f"{path.parent.name} is {reason}")
            else:
                found.append(Plans(path.parent, record))
        if found:
            return max(found, key=lambda plans: _closeness(plans.record.machine, machine))
        if damage:
            raise damage[0]
        raise IncompatibleError(
            f"plans of {bundle.path}: none is for {machine}: {'; '.join(refusals)}: run "
            f"ppllava-build {bundle.path} on this machine"
        )

    def plan(self, graph: str) -> PlanSpec:
        """What is known of one graph's plan.

        Raises:
            NotFoundError: It was not built.
        """
        if graph not in self.record.graphs:
            raise NotFoundError(
                f"plans {self.path}: none of graph {graph!r}, there are "
                f"{', '.join(sorted(self.record.graphs))}: run ppllava-build --graphs {graph}"
            )
        return self.record.graphs[graph]

    def file(self, graph: str) -> Path:
        """One graph's plan, every byte of which was compared with what the build wrote.

        Raises:
            DataError: It is missing or not the one that was built.
            NotFoundError: It was not built.
        """
        spec = self.plan(graph)
        path = self.path / spec.path
        advice = "run ppllava-build again"
        if not path.is_file() or path.is_symlink():
            raise DataError(f"plans {self.path}: file {spec.path} is missing: {advice}")
        if (size := path.stat().st_size) != spec.file.size:
            raise DataError(
                f"plans {self.path}: {spec.path} has {size} bytes, expected {spec.file.size}: "
                f"{advice}"
            )
        if (sha256 := FileSpec.of(path).sha256) != spec.file.sha256:
            raise DataError(
                f"plans {self.path}: {spec.path} is damaged, its sha256 is {sha256[:12]}…, "
                f"expected {spec.file.sha256[:12]}…: {advice}"
            )
        return path


@contextmanager
def new_plans(bundle: Bundle, name: str) -> Iterator[Path]:
    """A staging folder that becomes the bundle's plans `name` when the block ends well.

    The block fills the folder, plans.json included; older plans of that name are replaced then.

    Raises:
        DataError: What the block wrote are no plans, or not the files it says.
        StorageError, UsageError: See `staging.replaced_folder`.
    """
    with replaced_folder(bundle.path / FOLDER / name, True, RECORD, _KEYS) as staging:
        yield staging
        path = staging / RECORD
        plans = Plans(staging, Record.from_json(strict_json.read_text(path), str(path)))
        for graph, spec in plans.record.graphs.items():
            if not (file := staging / spec.path).is_file() or file.stat().st_size != spec.file.size:
                raise DataError(f"plans {name}: {graph} was not written whole: build again")


def _closeness(built: Machine, machine: Machine) -> tuple[bool, bool, tuple[int, ...]]:
    return built.gpu == machine.gpu, built.version == machine.version, _release(built.version)


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the beginning of a version, to be compared."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _format() -> Format[Record]:
    return Format(Record, SCHEMA_VERSION, "plans_sha256", "the build", "run ppllava-build again")
