"""How every peer is measured: both sides in one process, in turns, on the same inputs."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_BF16 = {"avx512_bf16", "amx_bf16"}
_WIDE = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", *sorted(_BF16))


def interleaved(sides: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of every run of each side, which take turns; a first run of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if run:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_row(name: str, seconds: list[float], against: float) -> str:
    """A line of a table: the median, the range, and how many times as fast as `against` seconds."""
    median = statistics.median(seconds)
    low, high = (f"{1000 * extreme:.1f}" for extreme in (min(seconds), max(seconds)))
    return f"| {name} | {1000 * median:.1f} | {low} to {high} | {against / median:.2f} |"


def peak_megabytes() -> float:
    """The most memory that this process ever held, and nothing of the one that started it.

    getrusage's ru_maxrss begins with what the starting process held.
    """
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmHWM"].removesuffix("kB")) * 1024 / 1e6


def machine(*packages: str) -> str:
    """This CPU with what it multiplies in, the cores in use, and the versions of packages."""
    fields = _cpu()
    flags = fields.get("flags", "").split()
    wide = ", ".join(flag for flag in _WIDE if flag in flags) or "none of x86's wide units"
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{fields.get('model name', platform.machine())} ({wide}), {cores} cores; "
        f"python {platform.python_version()}, {versions}"
    )


def has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16; else whoever computes in it emulates it."""
    return bool(_BF16.intersection(_cpu().get("flags", "").split()))


def _cpu() -> dict[str, str]:
    """What the system says of its last core; nothing where it has no such file."""
    if not _CPUINFO.is_file():
        return {}
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
