"""What `pip install` makes of the sources: with a compiler, without one, and as an archive."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "ppllava_engines/libppllava_ops_ort.so"


def built(hook: str, folder: Path, **variables: str) -> Path:
    """Runs a hook of the build backend, as pip does, and returns the one file that it wrote."""
    script = (
        "import sys; from scikit_build_core import build; "
        f"build.{hook}(sys.argv[1], {{'build-dir': sys.argv[2]}})"
    )
    out = folder / "out"
    command = [sys.executable, "-c", script, str(out), str(folder / "build")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(autouse=True)
def _backend() -> None:
    pytest.importorskip("scikit_build_core", reason="NOT RUN: scikit-build-core is not here")


def test_a_wheel_holds_the_op(tmp_path: Path) -> None:
    wheel = built("build_wheel", tmp_path)
    assert wheel.name.startswith("ppllava_edge-")
    assert "-py3-none-linux_" in wheel.name
    assert LIBRARY in zipfile.ZipFile(wheel).namelist()


def test_without_a_compiler_the_wheel_is_python_alone(tmp_path: Path) -> None:
    wheel = built("build_wheel", tmp_path, CXX="/no/such/compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "ppllava_engines/native.py" in names
    assert not any(name.endswith(".so") for name in names)


def test_the_archive_holds_what_the_op_is_made_of(tmp_path: Path) -> None:
    with tarfile.open(built("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"engines/ops/{path.name}" for path in (ROOT / "engines" / "ops").iterdir()}
    assert sources | {"CMakeLists.txt", "pyproject.toml"} <= names
    assert not any(name.startswith("tests/") for name in names)
