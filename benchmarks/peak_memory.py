"""The most memory that a process takes for its first question about a video, stage by stage.

`python -m benchmarks.peak_memory [--memory tokens] [--prefill same] [BUNDLE] [VIDEO]`

By default the bundle is a ViT-L/14-336 of random weights in int8 with SmolLM2-135M, its decoder in
int8 as well (`benchmarks.models`, made once in build/bench), with a graph of its own for prompts
(--prefill int8) or without one (same), and the video is a generated one of 1080p
(`benchmarks.long_video`). Every stage is told by what the process holds after it and by the most it
ever held; a new process does each run. Set against it is what cannot be less: the weights of all
graphs that ran, counted once where they share a file, and what is kept of the video. The table of
embeddings is no part of that: it is memory-mapped, and few of its pages are ever read.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from benchmarks.long_video import made
from benchmarks.timing import machine, peak_megabytes

from ppllava_engines.bundle import Bundle
from ppllava_engines.memory_layout import MEMORY_KINDS, MemoryKind, MemoryLayout
from ppllava_runtime.assistant import Assistant

_QUESTION = "What happens in this video?"
_FACTOR, _MARGIN = 1.25, 150.0  # of what is aimed at, MB
_MB = 1e6


def _run(bundle: str, video: str, frames: int, memory: MemoryKind, threads: int | None) -> None:
    """Prints per stage what this process holds, and at last how much of it is the video."""
    _tell("imports")
    assistant = Assistant.open(bundle, threads, memory=memory).load()
    _tell("graphs loaded")
    watched = assistant.watch(video, frames)
    _tell("video seen")
    answer = watched.ask(_QUESTION, max_new_tokens=1)
    assert answer.ids is not None
    _tell("first id", video=watched.memory.nbytes / _MB)


def _tell(stage: str, **more: float) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    now = pages * resource.getpagesize() / _MB
    said = {"stage": stage, "now": now, "peak": peak_megabytes()}
    print(json.dumps(said | more), flush=True)


def _weights(bundle: Bundle, memory: MemoryKind) -> dict[str, float]:
    """MB of weights by file, of the graphs that a question runs."""
    manifest = bundle.manifest
    layout = MemoryLayout.of(manifest, memory)
    names = ["text", layout.vision, layout.pool, *([layout.weigh] if layout.weigh else [])]
    paths = {manifest.graphs[name].path for name in names} | {manifest.decoder.path}
    paths |= {manifest.decoder.prefill} if manifest.decoder.prefill else set()
    # A weight in a file of its own may serve several graphs: it counts once, where it begins.
    ranges: dict[tuple[str, int], int] = {}
    for path in sorted(paths):
        ranges |= dict(_stored(bundle, path))
    sizes: dict[str, float] = {}
    for (path, _), length in ranges.items():
        sizes[path] = sizes.get(path, 0.0) + length / _MB
    return sizes


def _stored(bundle: Bundle, path: str) -> Iterator[tuple[tuple[str, int], int]]:
    """Yields file, offset and length of each weight of a graph; the graph's own file whole."""
    import onnx

    graph = bundle.file(path)
    yield (path, 0), graph.stat().st_size
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            told = {entry.key: entry.value for entry in tensor.external_data}
            file = str(Path(path).parent / told["location"])
            yield (file, int(told.get("offset", 0))), int(told["length"])


def main() -> None:
    """Prints a table of stages, what they are set against, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("video", nargs="?")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--memory", choices=MEMORY_KINDS, default="hidden")
    parser.add_argument("--prefill", choices=("same", "int8"), default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        _run(
            arguments.bundle,
            arguments.video,
            arguments.frames,
            arguments.memory,
            arguments.threads,
        )
        return
    if arguments.bundle is None:
        from benchmarks.models import bundle as made_bundle

        prefill: Literal["int8"] | None = "int8" if arguments.prefill == "int8" else None
        made_one = made_bundle("vit-l-smollm2", vision="int8", decoder="int8", prefill=prefill)
        arguments.bundle = str(made_one)
    video = arguments.video or str(made(12))
    command = [sys.executable, "-m", "benchmarks.peak_memory", arguments.bundle, video, "--run"]
    command += ["--frames", str(arguments.frames), "--memory", arguments.memory]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    stages = [json.loads(line) for line in run.stdout.splitlines()]

    print(f"{arguments.bundle}, {arguments.frames} frames, memory {arguments.memory}, in MB")
    print("| after | held | most so far |\n|---|---|---|")
    for stage in stages:
        print(f"| {stage['stage']} | {stage['now']:.0f} | {stage['peak']:.0f} |")
    bundle = Bundle.open(arguments.bundle)
    weights = _weights(bundle, arguments.memory)
    for path, size in weights.items():
        print(f"weights in {path}: {size:.1f}")
    table = bundle.manifest.decoder.embedding
    print(f"mapped, not counted: {table}: {bundle.file(table).stat().st_size / _MB:.1f}")
    peak, kept = stages[-1]["peak"], stages[-1]["video"]
    least = sum(weights.values()) + kept
    aim = _FACTOR * least + _MARGIN
    print(f"weights {least - kept:.1f} + video {kept:.1f} = {least:.1f}")
    print(f"peak {peak:.0f} of {aim:.0f} (× {_FACTOR} + {_MARGIN:.0f}): {peak / aim:.2f}")
    print(machine("onnxruntime", "av", "numpy"))


if __name__ == "__main__":
    main()
