"""Machines with a GPU: the one this process runs on, and recipes for those that are known."""

from __future__ import annotations

import ctypes
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ppllava_engines import strict_json
from ppllava_engines.errors import DataError, IncompatibleError, UnavailableError, UsageError
from ppllava_engines.tensorrt.plans import ComputeCapability, Library, Machine, same_memory, sm

RECIPES = Path(__file__).with_name("devices.toml")
_DRIVER = "libcuda.so.1"
_NAME_BYTES = 256
# Of the driver's enumeration of a device's attributes.
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One machine of devices.toml, where the fields are explained."""

    title: str
    gpu: str
    compute_capability: ComputeCapability
    memory_gb: float
    bandwidth_gb_s: float
    integrated: bool
    jetpack: str
    tensorrt: str
    cuda: str
    dtype: Literal["fp32", "fp16", "bf16"]
    decoder: Literal["float", "int8", "int4"]
    frames: int
    tokens: int
    workspace_mb: int
    tactic_mb: int

    @property
    def memory_bytes(self) -> int:
        """The memory as sold, in bytes."""
        return round(self.memory_gb * 1e9)


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it.

    Attributes:
        name: As the driver gives it; of every Orin "Orin".
        compute_capability: (major, minor).
        integrated: Whether it shares its memory with the CPU.
        memory_bytes: That it can use.
    """

    name: str
    compute_capability: ComputeCapability
    integrated: bool
    memory_bytes: int


def recipes(path: Path = RECIPES) -> dict[str, Recipe]:
    """The known machines, by the name that `--device` takes.

    Raises:
        DataError: A file that is not TOML, or a key or value that does not belong.
        UnavailableError: Python 3.10 without tomli.
    """
    toml = _toml()
    try:
        value = toml.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML or of UTF-8
        raise DataError(f"{path}: not valid TOML: {error}") from error
    return {name: strict_json.decode(Recipe, item, f"{path.name}.{name}")
            for name, item in value.items()}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The machine of that name.

    Raises:
        UsageError: There is none.
    """
    known = recipes()
    if name not in known:
        raise UsageError(f"no device {name!r}, expected auto or one of {', '.join(known)}")
    return known[name]


def recipe_for(gpu: Gpu) -> Recipe | None:
    """The known machine that has this GPU, told by name, compute capability and memory."""
    return next((item for item in recipes().values() if is_like(item, gpu)), None)


def is_like(recipe: Recipe, gpu: Gpu) -> bool:
    """Whether the GPU is that of the recipe."""
    return (
        recipe.gpu in gpu.name
        and recipe.compute_capability == gpu.compute_capability
        and same_memory(gpu.memory_bytes, recipe.memory_bytes)
    )


def find_gpu(driver: str = _DRIVER) -> Gpu | None:
    """The first GPU that CUDA sees; None without a GPU or a driver.

    The driver is asked itself: it is there wherever a GPU works, and no package is needed for it.
    """
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return None
    device, count = ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    if (
        cuda.cuInit(0)
        or cuda.cuDeviceGetCount(ctypes.byref(count))
        or count.value < 1
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, _NAME_BYTES, device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    ):
        return None
    integrated, major, minor = (
        _attribute(cuda, kind, device) for kind in (_INTEGRATED, _MAJOR, _MINOR)
    )
    title = name.value.decode(errors="replace")
    return Gpu(title, (major, minor), bool(integrated), memory.value)


def current_machine(library: Library) -> Machine:
    """This machine, as plans are built for it and found on it.

    Raises:
        UnavailableError: There is no GPU, or the library is not installed.
    """
    from ppllava_engines.tensorrt.builder import library_version

    if (gpu := find_gpu()) is None:
        raise UnavailableError(
            f"{library}: no GPU is here, or its driver ({_DRIVER}) does not load: check nvidia-smi"
        )
    return machine_of(gpu, library, library_version(library))


def machine_of(gpu: Gpu, library: Library, version: str) -> Machine:
    """A GPU with a library of that version."""
    return Machine(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        library=library,
        version=version,
        integrated=gpu.integrated,
        memory_bytes=gpu.memory_bytes,
    )


def check_device(recipe: Recipe, gpu: Gpu) -> None:
    """Nothing, when the GPU is that of the recipe.

    Raises:
        IncompatibleError: It is another.
    """
    if not is_like(recipe, gpu):
        raise IncompatibleError(
            f"device {recipe.title}: expected {recipe.gpu} ({sm(recipe.compute_capability)}, "
            f"{recipe.memory_gb:g} GB), this is {gpu.name} ({sm(gpu.compute_capability)}, "
            f"{gpu.memory_bytes / 1e9:.1f} GB): build with --device auto"
        )


def _attribute(cuda: Any, kind: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), kind, device)
    return value.value


def _toml() -> Any:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"devices: {name} is not installed: pip install {name}") from error
