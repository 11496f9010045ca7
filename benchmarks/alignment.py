"""Alignment, projector and pooling of a first question, against the published computation.

`PYTHONPATH=examples python -m benchmarks.alignment [BUNDLE...] [--checkpoint CHECKPOINT]`

Both sides begin with the tower's tokens and end with the pooled ones, the question's own tower
included. The reference does what the research code does, in torch and float32: the projector on
every token, 248 positions of text, unfolded windows. Ours runs the part of the vision graph behind
the tower, stores what it gives as each kind of memory keeps it, and asks. Without arguments these
are ViT-L/14-336 and D = 4,096 with random weights, whose bundles are made on the first run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from benchmarks.reference import Reference
from benchmarks.timing import interleaved, machine, median_row
from numpy.typing import NDArray

from benchmarks import models
from ppllava_engines.bundle import Bundle, GraphSpec, TensorSpec
from ppllava_engines.engine import Engine, open_engine
from ppllava_engines.errors import IncompatibleError, UsageError
from ppllava_engines.memory_layout import MEMORY_KINDS, MemoryKind, MemoryLayout
from ppllava_export.graphs import VISION_TOKENS
from ppllava_runtime.prompt import PromptBuilder
from ppllava_runtime.recorder import Recorder
from ppllava_runtime.window import Window

Array = NDArray[np.float32]
_QUESTION = "What does the person in the red shirt pick up from the table?"
_MODEL = "vit-l-4096"


class Side:
    """What a bundle does with the tower's tokens, in one kind of memory.

    Args:
        bundle: The bundle.
        kind: What it keeps.
        threads: Threads that work on one operator.
        folder: Room for the part of the vision graph that is run.
    """

    def __init__(self, bundle: Bundle, kind: MemoryKind, threads: int, folder: Path) -> None:
        self._manifest = bundle.manifest
        self._layout = MemoryLayout.of(self._manifest, kind)
        self._behind = _behind_tower(bundle, self._layout.vision, threads, folder)
        self._text, self._pool = (
            bundle.engine(name, threads=threads) for name in ("text", self._layout.pool)
        )
        weigh = self._layout.weigh
        self._weigh = bundle.engine(weigh, threads=threads) if weigh else None

    def align(self, tokens: Array, input_ids: NDArray[np.int64], window: Window) -> Array:
        """Pooled tokens (N,D) of the tower's (T,L,C)."""
        recorder = Recorder(self._behind, self._layout, self._manifest, len(tokens), False)
        recorder.encode(range(len(tokens)), tokens)
        text_embed = self._text.run({"input_ids": input_ids})["text_embed"]
        pooled, _ = recorder.finish().pool(text_embed, window, self._pool, self._weigh)
        return pooled


def _behind_tower(bundle: Bundle, name: str, threads: int, folder: Path) -> Engine:
    """The engine of what a vision graph does with the tower's tokens.

    They go in under the name of the frames, so that a recorder takes it for the whole graph.
    """
    spec = bundle.manifest.graphs[name]
    model = ir.load(bundle.file(spec.path))
    outputs = [output.name for output in spec.outputs]
    values = ir.convenience.create_value_mapping(model.graph)
    tokens = values[VISION_TOKENS if VISION_TOKENS in values else "tokens"]
    for node, place in list(model.graph.inputs[0].uses()):
        if node.op_type == "Shape":  # of its first axis, T, which tokens have as well
            node.replace_input_with(place, tokens)
    graph = ir.convenience.extract(model.graph, [tokens], outputs)
    frames, sizes = spec.inputs[0], bundle.manifest.model
    shape = (frames.shape[0], sizes.grid[0] * sizes.grid[1], sizes.vision_width)
    tensor = graph.inputs[0]
    tensor.name, tensor.shape = frames.name, ir.Shape(shape)
    tensor.dtype = ir.DataType.from_numpy(np.dtype(frames.dtype))
    for place, output in enumerate(graph.outputs):
        if output is tensor:  # tokens are kept as they come
            same = ir.node("Identity", [tensor])
            same.outputs[0].name = outputs[place]
            same.outputs[0].type, same.outputs[0].shape = tensor.type, tensor.shape
            graph.append(same)
            graph.outputs[place] = same.outputs[0]
    path = folder / f"{name}.onnx"
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    ir.save(part, path, external_data=f"{name}.data")
    inputs = (TensorSpec(frames.name, frames.dtype, shape),)
    return open_engine(path, GraphSpec(path.name, inputs, spec.outputs), threads=threads)


def main() -> None:
    """Prints every side's median and error, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE")
    parser.add_argument("--checkpoint", type=Path, help="what the bundles were made of")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint or models.checkpoint(_MODEL)
    paths = arguments.bundles or [models.bundle(_MODEL), models.bundle(_MODEL, vision="int8")]
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    reference = Reference.open(checkpoint)
    bundles = [Bundle.open(path) for path in paths]
    model = bundles[0].manifest.model
    input_ids = PromptBuilder.open(bundles[0]).build(_QUESTION).text_ids
    shape = (arguments.frames, model.grid[0] * model.grid[1], model.vision_width)
    tokens = np.random.default_rng(0).standard_normal(shape, np.float32)
    window = Window(*model.video_window((arguments.frames, *model.grid)))
    results: dict[str, Array] = {}

    def compute(name: str, align: Callable[[], Array]) -> Callable[[], None]:
        def run() -> None:
            results[name] = align()

        return run

    own = (window.kernel, window.stride)
    sides = {"torch": compute("torch", lambda: reference.align(tokens, input_ids, own)[0])}
    with tempfile.TemporaryDirectory() as folder:
        for at, bundle in enumerate(bundles):
            for kind in MEMORY_KINDS:
                name, place = f"{bundle.manifest.precision}, {kind}", Path(folder, f"{at}-{kind}")
                place.mkdir()
                try:
                    side = Side(bundle, kind, threads, place)
                except (IncompatibleError, UsageError) as error:  # the bundle does not have it
                    print(error)
                    continue
                sides[name] = compute(name, partial(side.align, tokens, input_ids, window))
        seconds = interleaved(sides, arguments.runs)
    whole = statistics.median(seconds["torch"])
    print("| side | ms | range | times as fast | error |")
    print("|---|---|---|---|---|")
    expected = results["torch"]
    for name, times in seconds.items():
        off = np.abs(results[name] - expected).max() / np.abs(expected).max()
        print(f"{median_row(name, times, whole)} {off:.1e} |")
    print(f"\n{arguments.frames} frames, {input_ids.size} tokens of text")
    print(machine("torch", "onnxruntime", "numpy"))


if __name__ == "__main__":
    main()
