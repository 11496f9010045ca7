"""Where the libraries are that were compiled when this package was installed."""

from __future__ import annotations

from pathlib import Path

import ppllava_engines
from ppllava_engines.errors import UnavailableError

CUSTOM_OPS = "libppllava_ops_ort.so"
PLUGIN = "libppllava_tensorrt_plugin.so"


def find_library(name: str) -> Path | None:
    """The library's file inside this package, or None where none was compiled.

    Args:
        name: Its file name, e.g. `CUSTOM_OPS`.
    """
    # An editable install has two folders: the sources, and what was built from them.
    candidates = (Path(folder, name) for folder in ppllava_engines.__path__)
    return next((path for path in candidates if path.is_file()), None)


def get_library(name: str) -> Path:
    """The library's file inside this package.

    Args:
        name: Its file name, e.g. `CUSTOM_OPS`.

    Raises:
        UnavailableError: None was compiled.
    """
    path = find_library(name)
    if path is None:
        raise UnavailableError(
            f"{name} was not compiled when ppllava-edge was installed: install a C++ compiler, for "
            "the plugin also nvcc and TensorRT's headers, then install it from its sources again"
        )
    return path
