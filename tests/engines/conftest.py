"""TensorRT-RTX, which compiles without a GPU, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Build = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def rtx() -> Path:
    """Where the module tensorrt_rtx is."""
    folder = Path(sys.prefix) / "tensorrt" / "rtx"
    if folder.is_dir():
        return folder
    if (spec := importlib.util.find_spec("tensorrt_rtx")) is None or spec.origin is None:
        pytest.skip("NOT RUN: TensorRT-RTX is not here: make tensorrt-tools")
    return Path(spec.origin).parents[1]


def environment(modules: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(modules), *filter(None, sys.path)])}


@pytest.fixture(scope="session")
def ppllava_build(rtx: Path) -> Build:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ppllava_engines.build", *map(str, arguments)],
            env=environment(rtx) | {"COLUMNS": "120"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
