"""Frames per second of a vision tower, ours and others', and what each costs in accuracy.

`python -m benchmarks.vision [--model dinov2|vit-l] [VIDEO...]`

All sides run in this process, in turns, on the same frames and threads. DINOv2-S has real weights:
its mean 1 - cosine of a token's features is against torch in fp32, on frames of videos; half of
them calibrate those sides that are calibrated, the others are measured. ViT-L's weights are random:
what it loses, on the timed frame, only shows that all sides compute the same. What is not installed
is said in its row, as is that this CPU has no bf16, which torch then emulates: at ViT-L's size that
takes minutes, and is left out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from benchmarks.timing import has_bf16, interleaved, machine
from benchmarks.towers import Model, dinov2, vit_l
from numpy.typing import NDArray
from torch.export import Dim

from ppllava_engines.bundle import GraphSpec, TensorSpec
from ppllava_engines.onnxruntime import open_session
from ppllava_export.calibration import observe
from ppllava_export.graphs import trace
from ppllava_export.initializers import bind, simplify
from ppllava_export.vision_dynamic_int8 import quantize_tower
from ppllava_export.vision_int8 import quantize_vision
from ppllava_runtime.preprocess import pixel_values
from ppllava_runtime.video import read_clip

Array = NDArray[Any]
Side = Callable[[Array], Array]
_ROOT = Path(__file__).resolve().parents[1]
_SAMPLE = _ROOT / "examples" / "tiny_world" / "sample.mp4"
_REAL = _ROOT.parent / "shared" / "videos"
_MODELS = {"dinov2": dinov2, "vit-l": vit_l}
_FORMS = ("fp32", "int8", "int8-static")
_BF16 = "torch bf16" if has_bf16() else "torch bf16 (no bf16 in this CPU)"
_BASES = ("torch fp32", _BF16, "OpenVINO, NNCF int8")
_MISSING, _EMULATED = "not here: make bench-peers", "left out: emulated"
_FRAMES_PER_VIDEO = 3
_RUNS = 5
# Of ViT-L's some sides take ten seconds a frame.
_FEW = 2


def main() -> None:
    """Prints a row per side, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", type=Path, nargs="*", help=f"default: {_REAL}, or {_SAMPLE}")
    parser.add_argument("--model", choices=tuple(_MODELS), default="dinov2")
    parser.add_argument("--frames", type=int, help="of a run; ours int8 takes one at a time")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = _MODELS[arguments.model]()
    frames = real_frames(arguments.videos or default_videos(), model)
    calibrating, measured = frames[::2], frames[1::2]
    num_frames, runs = arguments.frames or _FEW, arguments.runs or _RUNS
    if not model.trained:
        calibrating, measured = calibrating[:_FEW], measured[:1]
        num_frames, runs = arguments.frames or 1, arguments.runs or _FEW
    timed = measured[np.arange(num_frames) % len(measured)]
    with TemporaryDirectory() as name, torch.no_grad():
        paths = {form: Path(name) / f"{form}.onnx" for form in _FORMS}
        for form, path in paths.items():
            write_graph(model, form, path, calibrating)
        found = dict(sides(model, paths, calibrating, arguments.threads))
        usable = {name: side for name, side in found.items() if not isinstance(side, str)}
        outs: dict[str, Array] = {}

        def run(name: str) -> None:
            outs[name] = usable[name](timed)

        seconds = interleaved({name: partial(run, name) for name in usable}, runs)
        if model.trained:
            outs = {name: features(side, measured) for name, side in usable.items()}
    losses = {name: loss(out, outs["torch fp32"]) for name, out in outs.items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    bases = [base for base in _BASES if base in medians]
    print(f"| {model.name} | frames/s | " + "".join(f"x {base} | " for base in bases) + "1-cos |")
    print("|---" * (len(bases) + 3) + "|")
    for name, side in found.items():
        if isinstance(side, str):
            print(f"| {name} | {side} |" + " |" * (len(bases) + 1))
            continue
        ratios = "".join(f"{medians[base] / medians[name]:.2f} | " for base in bases)
        speed = len(timed) / medians[name]
        print(f"| {name} | {speed:.2f} | {ratios}{losses[name]:.1e} |")
    versions = [package for package in ("openvino", "nncf") if find_spec(package)]
    print(
        f"{num_frames} frames of {model.image_size} pixels at a time, {runs} runs, "
        f"{arguments.threads} threads; 1-cos on {len(measured)} frames; "
        f"{machine('torch', 'onnxruntime', *versions)}"
    )


def default_videos() -> list[Path]:
    """Real videos where they are, else the example's."""
    found = sorted(path for path in _REAL.glob("*") if path.suffix in (".mp4", ".mov", ".mkv"))
    return found or [_SAMPLE]


def real_frames(videos: list[Path], model: Model) -> Array:
    """pixel_values (n, 3, S, S) of some frames of each video."""
    clips = (read_clip(video, _FRAMES_PER_VIDEO).frames for video in videos)
    return np.concatenate(
        [pixel_values(clip, model.image_size, model.mean, model.std) for clip in clips]
    )


def write_graph(model: Model, form: str, path: Path, calibrating: Array) -> None:
    """Writes a tower's graph as the exporter does, in one of `_FORMS`."""
    side = model.image_size
    example = torch.empty(2, 3, side, side, device="meta")
    axes = {0: Dim("T", max=1024)}
    graph = trace(model.skeleton, example, axes, ["pixel_values"], ["features"])
    bind(graph, model.tower.state_dict().__getitem__, lambda: None)
    simplify(graph)
    if form == "int8":
        quantize_tower(graph)
    elif form == "int8-static":
        quantize_vision(graph, observe(model.tower, [calibrating]))
    ir.save(graph, path, external_data=f"{path.name}.data")


def sides(
    model: Model, paths: dict[str, Path], calibrating: Array, threads: int
) -> Iterator[tuple[str, Side | str]]:
    """Yields every side by name; or why it is not run."""
    yield "torch fp32", torch_side(model.tower, torch.float32)
    if has_bf16() or model.trained:
        yield _BF16, torch_side(copy.deepcopy(model.tower).bfloat16(), torch.bfloat16)
    else:
        yield _BF16, _EMULATED
    for form, path in paths.items():
        yield f"ours, {form}", onnxruntime_side(path, threads, alone=form == "int8")
    there = find_spec("openvino") is not None
    for form in ("fp32", "int8-static"):
        name = f"ours, OpenVINO, {form}"
        yield name, backend_side(paths[form], model, threads) if there else _MISSING
    yield (
        "OpenVINO, NNCF int8",
        nncf_side(paths["fp32"], calibrating, threads) if there and find_spec("nncf") else _MISSING,
    )


def torch_side(tower: torch.nn.Module, dtype: torch.dtype) -> Side:
    """Eager torch."""
    return lambda pixels: tower(torch.from_numpy(pixels).to(dtype)).float().numpy()


def onnxruntime_side(path: Path, threads: int, alone: bool) -> Side:
    """The session that the runtime opens; `alone` is one frame a run."""
    session = open_session(path, threads)

    def run(pixels: Array) -> Array:
        feeds = [pixels[at : at + 1] for at in range(len(pixels))] if alone else [pixels]
        outs = [session.run(None, {"pixel_values": feed})[0] for feed in feeds]
        return np.concatenate(outs)

    return run


def backend_side(path: Path, model: Model, threads: int) -> Side:
    """The runtime's own OpenVINO backend."""
    from ppllava_engines.openvino import OpenVINOEngine

    square = (model.image_size, model.image_size)
    proto = ir.load(path)
    width = proto.graph.outputs[0].shape
    assert width is not None
    axes = tuple(axis if isinstance(axis, int) else str(axis) for axis in width)
    spec = GraphSpec(
        str(path),
        (TensorSpec("pixel_values", "float32", ("T", 3, *square)),),
        (TensorSpec("features", "float32", axes),),
    )
    engine = OpenVINOEngine(path, spec, threads)
    return lambda pixels: engine.run({"pixel_values": pixels})["features"]


def nncf_side(path: Path, calibrating: Array, threads: int) -> Side:
    """OpenVINO on what NNCF's own post-training quantization makes of the fp32 graph."""
    import nncf
    import openvino

    graph = openvino.Core().read_model(path)
    frames = nncf.Dataset([calibrating[at : at + 1] for at in range(len(calibrating))])
    transformer = nncf.ModelType.TRANSFORMER
    quantized = nncf.quantize(graph, frames, model_type=transformer, subset_size=len(calibrating))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(quantized, "CPU", options)
    return lambda pixels: np.array(compiled(pixels)[0])


def features(side: Side, pixels: Array) -> Array:
    """What a side gives (n, tokens, C), a frame at a time."""
    return np.concatenate([side(pixels[at : at + 1]) for at in range(len(pixels))])


def loss(got: Array, expected: Array) -> float:
    """The mean of 1 - cosine over all tokens."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.mean(1 - (a * b).sum(axis=-1) / norms))


if __name__ == "__main__":
    main()
