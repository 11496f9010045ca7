"""Rung 3: the kernel compiled for every architecture, and what it takes of each.

Nothing here ran on a GPU: registers and stack are what the assembler says.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Tool = Callable[[str], Path]

OPS = Path(__file__).parents[2] / "engines" / "ops"
ARCHITECTURES = {f"sm_{name}" for name in (80, 86, 87, 89, 90, 100, 110, 120)}
TYPES = ("float", "__half", "__nv_bfloat16")
NUM_KERNELS = 2 * len(TYPES)  # with 16-byte loads, and with single ones
# Six blocks of 128 threads share the 65,536 registers of a multiprocessor.
MAX_REGISTERS = 65536 // (6 * 128) // 8 * 8


def resources(cuda: Path, binary: Path) -> dict[str, list[dict[str, int]]]:
    """Returns what each kernel in a binary takes, such as REG and STACK, by architecture.

    The architecture of a cubin, which is for one alone, is not told: "".
    """
    listing = subprocess.run(
        [cuda / "bin" / "cuobjdump", "-res-usage", binary],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, list[dict[str, int]]] = {}
    architecture = ""
    for line in listing.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        if "REG:" in line:
            usage = {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", line)}
            found.setdefault(architecture, []).append(usage)
    return found


def assert_within_budget(kernels: list[dict[str, int]]) -> None:
    assert len(kernels) == NUM_KERNELS
    for usage in kernels:
        assert usage["REG"] <= MAX_REGISTERS
        assert usage["STACK"] == usage["LOCAL"] == 0


def test_nvcc_13_compiles_the_plugin_for_every_architecture(plugin: Path, cuda: Path) -> None:
    found = resources(cuda, plugin)
    assert set(found) == ARCHITECTURES
    for kernels in found.values():
        assert_within_budget(kernels)


def test_the_plugin_has_ptx_for_architectures_to_come(plugin: Path, cuda: Path) -> None:
    listing = subprocess.run(
        [cuda / "bin" / "cuobjdump", "-lptx", plugin], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"(sm_\w+)\.ptx", listing) == ["sm_120"]


@pytest.fixture(scope="module")
def compiled(tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """PTX and a cubin for sm_87, of JetPack 6's device compiler."""
    folder = tool("nvrtc-12.6") / "nvidia"
    nvrtc = Nvrtc(folder / "cuda_nvrtc" / "lib" / "libnvrtc.so.12")
    assert nvrtc.version() == (12, 6)
    kernels = [
        f"ppllava::cuda::pool_kernel<{type_}, {aligned}>"
        for type_ in TYPES
        for aligned in ("true", "false")
    ]
    ptx, cubin = nvrtc.compile(
        '#include "cuda.cuh"',
        kernels,
        [
            *("--gpu-architecture=sm_87", "--std=c++17"),
            *(f"--include-path={OPS}", f"--include-path={folder / 'cuda_runtime' / 'include'}"),
        ],
    )
    path = tmp_path_factory.mktemp("sm_87") / "pool.cubin"
    path.write_bytes(cubin)
    return ptx.decode(), path


def test_nvrtc_12_6_compiles_the_kernel_for_orin(compiled: tuple[str, Path], cuda: Path) -> None:
    ptx, cubin = compiled
    assert re.findall(r"^\.target (\w+)", ptx, re.MULTILINE) == ["sm_87"]
    assert_within_budget(resources(cuda, cubin)[""])


def test_hidden_is_read_16_bytes_at_a_time(compiled: tuple[str, Path]) -> None:
    entries = compiled[0].split(".entry ")[1:]
    assert len(entries) == NUM_KERNELS
    wide = [len(re.findall(r"ld\.global\.(?:v4\.[buf]32|v2\.[buf]64)", text)) for text in entries]
    aligned = ["Lb1E" in text.split("(")[0] for text in entries]
    assert [count > 0 for count in wide] == aligned
    assert not any(".local" in text for text in entries)


class Nvrtc:
    """CUDA's runtime compiler, from its shared library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        assert self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0
        return major.value, minor.value

    def compile(self, source: str, kernels: list[str], options: list[str]) -> tuple[bytes, bytes]:
        """Returns PTX and cubin of `kernels`, template instances by name."""
        program = ctypes.c_void_p()
        text = source.encode()
        created = self._library.nvrtcCreateProgram(
            ctypes.byref(program), text, b"pool.cu", 0, None, None
        )
        assert created == 0
        try:
            for kernel in kernels:
                assert self._library.nvrtcAddNameExpression(program, kernel.encode()) == 0
            encoded = [option.encode() for option in options]
            code = self._library.nvrtcCompileProgram(
                program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
            )
            log = self._part(program, "ProgramLog").rstrip(b"\0\n").decode()
            assert (code, log) == (0, "")
            return self._part(program, "PTX"), self._part(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _part(self, program: ctypes.c_void_p, name: str) -> bytes:
        size = ctypes.c_size_t()
        assert self._library[f"nvrtcGet{name}Size"](program, ctypes.byref(size)) == 0
        part = ctypes.create_string_buffer(size.value)
        assert self._library[f"nvrtcGet{name}"](program, part) == 0
        return part.raw
