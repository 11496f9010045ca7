"""The smallest CUDA driver there is: as much of libcuda.so.1 as is asked what GPU is here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ppllava_engines.devices import Gpu

ORIN_NANO = Gpu("Orin", (8, 7), integrated=True, memory_bytes=7_990_000_000)

_DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return flags || INIT; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 41; return ordinal != 0; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, "Orin", size);
    return device != 41;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 7990000000; return device != 41; }
int cuDeviceGetAttribute(int *value, int kind, int device) {
    *value = kind == 18 ? 1 : kind == 75 ? 8 : kind == 76 ? 7 : -1;
    return device != 41;
}
"""


def compile_driver(library: Path, init: int = 0, count: int = 1) -> Path:
    """The file `library`, which reports `count` GPUs like ORIN_NANO, or fails with `init`."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("NOT RUN: there is no C compiler")
    source = library.with_suffix(".c")
    source.write_text(_DRIVER)
    defines = [f"-DINIT={init}", f"-DCOUNT={count}"]
    command = [compiler, "-shared", "-fPIC", *defines, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library
