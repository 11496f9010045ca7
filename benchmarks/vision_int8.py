"""Frames per second of an int8 vision graph and of float ones.

`python benchmarks/vision_int8.py INT8_BUNDLE FLOAT_BUNDLE...`

Exports of one checkpoint, e.g. `--vision int8`, fp32 and `--fp16`. All run in this process,
interleaved, on the same frames. Int8 is meant for CPUs that multiply it natively (VNNI); whether
this one does is printed beside the numbers, which say nothing of one that differs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ppllava_engines.bundle import Bundle

_CPUINFO = Path("/proc/cpuinfo")


def cpu() -> tuple[str, str]:
    """Returns the CPU's name, and whether it has VNNI: "yes", "no" or "unknown"."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), "unknown"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    vnni = ("yes" if {"avx512_vnni", "avx_vnni"} & set(flags) else "no") if flags else "unknown"
    return fields.get("model name", platform.machine()), vnni


def main() -> None:
    """Prints each graph's median, the ratios, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("int8", type=Path)
    parser.add_argument("floats", type=Path, nargs="+")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="default: one per core")
    arguments = parser.parse_args()
    bundles = [Bundle.open(path) for path in (arguments.int8, *arguments.floats)]
    names = [str(bundle.manifest.precision) for bundle in bundles]
    if bundles[0].manifest.precision.vision != "int8":
        raise SystemExit(f"{arguments.int8} is {names[0]}: give the bundle with int8 vision first")
    side = bundles[0].manifest.model.image_size
    pixels = np.random.default_rng(0).standard_normal((arguments.frames, 3, side, side))
    engines = [bundle.engine("vision", threads=arguments.threads) for bundle in bundles]
    feeds = [{"pixel_values": pixels.astype(engine.inputs[0].dtype)} for engine in engines]
    seconds: list[list[float]] = [[] for _ in engines]
    for run in range(arguments.runs + 1):
        for engine, feed, times in zip(engines, feeds, seconds, strict=True):
            began = time.perf_counter()
            engine.run(feed)
            if run:  # the first warms up
                times.append(time.perf_counter() - began)
    medians = [statistics.median(times) for times in seconds]
    for name, median, times in zip(names, medians, seconds, strict=True):
        low, high = (arguments.frames / extreme for extreme in (max(times), min(times)))
        print(
            f"{name}: {arguments.frames / median:.1f} frames/s, {low:.1f} to {high:.1f} over "
            f"{arguments.runs} runs"
        )
    for name, median in zip(names[1:], medians[1:], strict=True):
        print(f"{names[0]} is {median / medians[0]:.2f} times as fast as {name}")
    device, vnni = cpu()
    print(
        f"{arguments.frames} frames of {side} pixels at a time; {device}, VNNI: {vnni}; "
        f"python {platform.python_version()}, onnxruntime {version('onnxruntime')}"
    )


if __name__ == "__main__":
    main()
