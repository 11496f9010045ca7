"""Fixtures for TensorRT without a GPU: its tools, and processes in which they are used.

`make tensorrt-tools` installs each below the virtual environment, in a folder of its own. A process
can load one version of TensorRT only, so whatever loads one runs in a process by itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Tool = Callable[[str], Path]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

TOOLS = Path(sys.prefix) / "tensorrt"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tool() -> Tool:
    """Returns the folder of a tool by its name, e.g. "rtx"; skips the test when it is not there."""

    def folder(name: str) -> Path:
        if not (TOOLS / name).is_dir():
            target = "verify-tensorrt" if name == "edge-llm" else "tensorrt-tools"
            pytest.skip(f"NOT RUN: {name} is not here: make {target}")
        return TOOLS / name

    return folder


@pytest.fixture(scope="session")
def cuda(tool: Tool) -> Path:
    """The folder of CUDA 13's bin, include and lib64."""
    return tool("cuda-13") / "nvidia" / "cu13"


@pytest.fixture(scope="session")
def run_with(tool: Tool) -> Run:
    """Returns what runs Python with `arguments` and a tool's modules, and returns how it ended."""

    def run(
        name: str, *arguments: str | Path, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(tool(name))} | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def plugin(tool: Tool, cuda: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin for every architecture, warnings as errors; its contract test is beside it."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("NOT RUN: CMake or a C++ compiler is not here")
    folder = tmp_path_factory.mktemp("plugin")
    headers = tool("headers") / "kernel_lens" / "include" / "tensorrt"
    options = [
        f"-DCMAKE_CUDA_COMPILER={cuda / 'bin' / 'nvcc'}",
        f"-DTENSORRT_INCLUDE_DIR={headers}",
    ]
    targets = ["ppllava_tensorrt_plugin", "ppllava_plugin_contract"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), "--preset", "strict", *options],
        ["cmake", "--build", str(folder), "--parallel", "2", "--target", *targets],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libppllava_tensorrt_plugin.so"
