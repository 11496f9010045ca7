"""Who may import whom: kept by ruff's rules, and by importing everything with torch blocked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUFF = ["-m", "ruff", "check", "--no-cache", "--select", "TID251", "--output-format", "concise"]

# Imports modules where torch, transformers and the exporter cannot be imported, and notes who tried
# (an `except ImportError` would hide it); ONNX Runtime must find its telemetry switched off.
PROBE = """
import importlib, os, sys
from importlib.abc import MetaPathFinder
tried = []
class Border(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("torch", "transformers", "ppllava_export"):
            tried.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}: beyond the border", name=name)
        if name == "onnxruntime":
            assert os.environ.get("ORT_DISABLE_TELEMETRY") == "1", "telemetry is on"
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
sys.meta_path.insert(0, Border())
for module in sys.argv[1:]:
    importlib.import_module(module)
    assert not tried, (module, tried)
assert "onnxruntime" in sys.modules
assert "torch" not in sys.modules
"""


def modules(folder: str) -> list[str]:
    base = ROOT / folder
    paths = (path.relative_to(base).with_suffix("") for path in sorted(base.rglob("*.py")))
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


@pytest.mark.parametrize("folder", ["engines", "runtime"])
def test_everything_imports_without_torch_and_telemetry(folder: str) -> None:
    names = modules(folder)
    assert f"ppllava_{folder}" in names
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'engines'}{os.pathsep}{ROOT / 'runtime'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        (
            "engines/ppllava_engines",
            {"torch", "transformers", "ppllava_export", "ppllava_runtime"},
        ),
        ("runtime/ppllava_runtime", {"torch", "transformers", "ppllava_export"}),
        ("runtime/ppllava_runtime/decoders", {"torch", "transformers", "ppllava_export"}),
        ("export/ppllava_export", {"ppllava_runtime"}),
        ("export/ppllava_export/modules", {"ppllava_runtime"}),
    ],
)
@pytest.mark.parametrize("line", ["import {}", "from {} import nn", "def f():\n    import {}.nn"])
def test_ruff_refuses_what_is_banned(folder: str, banned: set[str], line: str) -> None:
    pytest.importorskip("ruff", reason="ruff is in the extra 'lint'")
    names = ["numpy", "torch", "transformers", "ppllava_engines"]
    names += ["ppllava_export", "ppllava_runtime"]
    done = subprocess.run(
        [sys.executable, *RUFF, "--stdin-filename", f"{folder}/snippet.py", "-"],
        input="\n".join(line.format(name) for name in names) + "\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(re.findall(r"TID251 `(\w+)", done.stdout)) == banned, done.stderr
