"""What is made once for benchmarks, and made anew when what makes it has changed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import ppllava_engines.manifest
import ppllava_export

_EXPORT = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")


def versions(*packages: str) -> str:
    """Packages with their versions, in one line."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def exporter() -> str:
    """What an export's result depends on besides its checkpoint: packages, and a hash of code."""
    found = hashlib.sha256()
    code = sorted(Path(ppllava_export.__file__).parent.rglob("*.py"))
    for path in (*code, Path(ppllava_engines.manifest.__file__)):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{versions(*_EXPORT)}, code {found.hexdigest()}"


def made(folder: Path, recipe: str, make: Callable[[Path], object]) -> Path:
    """Returns `folder`, made anew unless it is whole and was made by `recipe`, which lies beside.

    Args:
        folder: What was there is removed if another recipe made it.
        recipe: Everything that the result depends on.
        make: Makes the folder that it is given, which takes the name only when it is whole.
    """
    note = folder.with_name(f"{folder.name}.recipe")
    if folder.is_dir() and note.is_file() and note.read_text(encoding="utf-8") == recipe:
        return folder
    part = folder.with_name(f"{folder.name}.part")
    note.unlink(missing_ok=True)
    for stale in (folder, part):
        shutil.rmtree(stale, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    make(part)
    part.rename(folder)
    note.write_text(recipe, encoding="utf-8")
    return folder
