"""Plans of full-size graphs, compiled ahead of time by TensorRT-RTX: seconds, size and memory.

`python -m benchmarks.tensorrt_builds FOLDER [NAME...] [--compute-capability 8.6 8.9]`

Each checkpoint is written below FOLDER with random weights of the published shapes, exported, built
by `ppllava-build`, and removed; `--keep` leaves the bundles, and takes those that are there. No GPU
is needed. What comes out has been compiled, and was run by no one.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock, patch

from benchmarks.export_memory import CLIP, SIGLIP, decoder_config, write_checkpoint

from ppllava_engines.bundle import Bundle
from ppllava_engines.tensorrt.plans import FOLDER, RECORD, PlanSpec, Record
from ppllava_export import export_bundle

_ROOT = Path(__file__).resolve().parents[1]
_VIDEO = _ROOT / "examples/tiny_world/sample.mp4"
_RTX = Path(sys.prefix) / "tensorrt/rtx"
_MB = 1e6


def _vicuna(layers: int) -> dict[str, Any]:
    return decoder_config("llama", (4096, 11008, layers, 32, 32, 32064))


def _qwen2(layers: int) -> dict[str, Any]:
    return decoder_config("qwen2", (3584, 18944, layers, 28, 4, 152064))


@dataclass(frozen=True)
class Model:
    """A checkpoint's shapes; vision: of its tower; weights: of its decoder; None are fp16."""

    family: dict[str, Any]
    decoder: dict[str, Any]
    vision: Literal["int8"] | None = None
    weights: Literal["int8", "int4"] | None = None


_VIT = {**CLIP, "btadapter": False}
_MODELS = {
    "clip": Model(_VIT, _vicuna(4)),
    "clip-int8": Model(_VIT, _vicuna(4), "int8", "int8"),
    "siglip": Model(SIGLIP, _qwen2(4)),
    "siglip-int8": Model(SIGLIP, _qwen2(4), "int8", "int8"),
    "siglip-int4": Model(SIGLIP, _qwen2(28), None, "int4"),
    "btadapter-int4": Model(CLIP, _vicuna(32), None, "int4"),
}
# Graphs that an earlier model has as well are not built again.
_GRAPHS = {
    "clip-int8": ("vision", "decoder"),
    "siglip-int8": ("vision", "decoder"),
    "siglip-int4": ("decoder",),
    "btadapter-int4": ("vision", "decoder"),
}
_ALL = ("vision", "text", "pool", "decoder")


def export(folder: Path, name: str, layers: int | None) -> Path:
    """Returns the bundle of one model; a checkpoint is made and removed."""
    bundle, checkpoint, model = folder / name, folder / f"{name}-checkpoint", _MODELS[name]
    family, decoder = model.family, model.decoder
    if layers:
        decoder = decoder | {"num_hidden_layers": layers}
        # The last of CLIP's is not used.
        vision = family["vision_config"] | {"num_hidden_layers": layers + 1}
        family = family | {"vision_config": vision}
    if bundle.is_dir():
        return bundle
    try:
        write_checkpoint(checkpoint, family, decoder)
        with _without_parity():
            export_bundle(
                checkpoint,
                bundle,
                "fp16",
                vision=model.vision,
                decoder=model.weights,
                calibration=[_VIDEO] if model.vision else [],
                skip_tokenizer=True,
            )
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return bundle


@contextmanager
def _without_parity() -> Iterator[None]:
    """Exports random weights, whose parity takes minutes and means nothing, int8's least of all."""
    samples, parity = Mock(), Mock()
    samples.write = lambda path: path.write_bytes(b"")
    with (
        patch("ppllava_export.export.make_samples", return_value=samples),
        patch("ppllava_export.export.measure", return_value=parity),
    ):
        yield


def build(bundle: Path, graphs: Sequence[str], compute_capabilities: Sequence[str]) -> Record:
    """Returns what the graphs' plans took; the bundle has them."""
    command = [sys.executable, "-m", "ppllava_engines.build", str(bundle), "--library", "rtx"]
    command += ["--graphs", *graphs, "--compute-capability", *compute_capabilities]
    paths = [str(_RTX), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run(command, env=variables, check=True, stdout=sys.stderr)
    (record,) = (bundle / FOLDER).glob(f"*/{RECORD}")
    return Record.from_json(record.read_text(encoding="utf-8"), str(record))


def row(bundle: Bundle, graph: str, plan: PlanSpec) -> str:
    """Returns one line of the table."""
    manifest = bundle.manifest
    path = manifest.decoder.path if graph == "decoder" else manifest.graphs[graph].path
    weights = sum(file.size for name, file in manifest.files.items() if name.startswith(path))
    dtypes = {"vision": manifest.precision.vision, "decoder": manifest.precision.decoder}
    kind = dtypes.get(graph, "float").replace("float", manifest.precision.dtype)
    sizes = " | ".join(f"{size / _MB:.0f}" for size in (weights, plan.file.size, plan.peak_bytes))
    ranges = "; ".join(", ".join(_ranges(plan, place)) for place in range(len(plan.profiles)))
    return (
        f"| {bundle.path.name} | {graph} | {kind} | {ranges or 'fixed'} | {sizes} "
        f"| {plan.seconds:.0f} |"
    )


def _ranges(plan: PlanSpec, place: int) -> list[str]:
    """The sizes, from smallest to largest, that each dynamic axis may have."""
    shapes = plan.profiles[place].shapes
    axes = {
        axis: (low, high)
        for tensor in plan.spec.inputs
        if tensor.name in shapes
        for axis, low, _, high in zip(tensor.shape, *shapes[tensor.name], strict=True)
        if isinstance(axis, str)
    }
    return [f"{axis} {low}…{high}" for axis, (low, high) in axes.items()]


def main() -> None:
    """Prints a table of the plans, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="room for a checkpoint, its bundle and a plan")
    parser.add_argument("names", nargs="*", default=list(_MODELS), metavar="NAME",
        help=f"of {', '.join(_MODELS)} (default: all)")  # fmt: skip
    parser.add_argument("--compute-capability", nargs="+", default=["8.6", "8.9"], metavar="X.Y")
    parser.add_argument("--layers", type=int, help="of tower and decoder (default: the model's)")
    parser.add_argument("--keep", action="store_true", help="bundles, and take those there are")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print("| model | graph | weights | profiles | ONNX, MB | plan, MB | peak, MB | s |")
    print("|---|---|---|---|---|---|---|---|")
    record = None
    for name in arguments.names:
        path = export(arguments.folder, name, arguments.layers)
        bundle = Bundle.open(path)
        record = build(path, _GRAPHS.get(name, _ALL), arguments.compute_capability)
        for graph, plan in record.graphs.items():
            print(row(bundle, graph, plan), flush=True)
        if not arguments.keep:
            shutil.rmtree(path)
    assert record is not None
    print(f"\n{record.name}; python {platform.python_version()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
