"""Fixtures for the native op: built once, with warnings as errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Where CUDA's headers may be that its kernel needs even on the host: the first that has them.
CUDA_FOLDERS = (
    Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")),
    Path(sys.prefix, "tensorrt", "cuda-13", "nvidia", "cu13"),
)

Build = Callable[[str], Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Returns what builds library and tests with a CMake preset, once, and returns their folder."""

    @cache
    def built(preset: str) -> Path:
        if shutil.which("cmake") is None or shutil.which("c++") is None:
            pytest.skip("NOT RUN: CMake or a C++ compiler is not here")
        folder = tmp_path_factory.mktemp(preset)
        options = [
            f"-DPPLLAVA_CUDA_INCLUDE_DIR={cuda / 'include'}"
            for cuda in CUDA_FOLDERS
            if (cuda / "include" / "cuda_fp16.h").is_file()
        ]
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(folder), "--preset", preset, *options[:1]],
            ["cmake", "--build", str(folder), "--target", "ppllava_ops_ort", "ppllava_pool_test"],
        ):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        return folder

    return built


@pytest.fixture(scope="session")
def strict(build: Build) -> Path:
    """The folder of the library and the tests, as they are installed."""
    return build("strict")
