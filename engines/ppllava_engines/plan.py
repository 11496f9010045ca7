"""`ppllava-plan BUNDLE --device NAME`: whether a bundle fits a device, before anything is built.

Memory only. How fast a device is, only running on it would tell.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ppllava_engines import devices, strict_json
from ppllava_engines.bundle import Bundle
from ppllava_engines.errors import IncompatibleError, UnavailableError, UsageError, run_command
from ppllava_engines.manifest import Manifest
from ppllava_engines.memory_layout import MEMORY_GRAPHS, MEMORY_KINDS, MemoryLayout
from ppllava_engines.tensorrt.profiles import DEFAULT_TOKENS, FRAMES_PER_RUN, PART_OF_PROMPT

if TYPE_CHECKING:
    from rich.table import Table

Basis = Literal["file", "shape", "estimate", "assumed"]
LATENCY = "NOT RUN: latency is not predicted, no bundle ever ran on this device"

_GB = 1e9
# Assumed, for want of a measurement: what is gone before the first weight is loaded. On a board
# the desktop, the system and this program share the memory; on a card there is CUDA's context.
_SYSTEM_BYTES = 1_500_000_000
_CONTEXT_BYTES = 600_000_000
# TensorRT-RTX 1.7.1 took 2.9 to 3.6 times the weights of graphs of 1 GB or more (docs/tensorrt.md),
# which says nothing of other builders.
_BUILDER_FACTOR = 3.7
_HEAD_WIDTH = 64  # of the vision and text towers that are known here
_BITS = {"float": 16.0, "int8": 8.5, "int4": 4.5}  # per weight, scales included


@dataclass(frozen=True)
class Part:
    """One thing that takes memory.

    Attributes:
        name: What.
        num_bytes: How much.
        basis: "file": a file's size; "shape": follows from shapes; "estimate": an upper bound by
            arithmetic that TensorRT may stay below; "assumed": a round number.
    """

    name: str
    num_bytes: int
    basis: Basis


@dataclass(frozen=True)
class Kept:
    """One way of keeping a video for its next questions, on the CPU.

    Attributes:
        memory: As in `--memory`.
        num_bytes: Of one video.
        rerun: What each question about it runs again.
    """

    memory: str
    num_bytes: int
    rerun: str


@dataclass(frozen=True)
class Estimate:
    """What a bundle takes on a device.

    Attributes:
        device: The device's name.
        frames, tokens: Most of a video, most of prompt and answer.
        parts: While questions are answered; all at once.
        build_bytes: The most while the plans are built, one after the other: an estimate.
        memory_bytes: What the device has.
        remedies: What would make it fit, each by itself; empty when it fits.
        memories: What such a video takes where the CPU runs the bundle, in each memory it has.
        latency: That it is not predicted.
    """

    device: str
    frames: int
    tokens: int
    parts: tuple[Part, ...]
    build_bytes: int
    memory_bytes: int
    remedies: tuple[str, ...] = ()
    memories: tuple[Kept, ...] = ()
    latency: str = LATENCY

    @property
    def run_bytes(self) -> int:
        """The sum of all parts."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether the bundle can be built and run there."""
        return max(self.run_bytes, self.build_bytes) <= self.memory_bytes


@dataclass(frozen=True)
class Device:
    """As much of a device as memory is about."""

    name: str
    memory_bytes: int
    integrated: bool


def estimate(
    manifest: Manifest, device: Device, *, frames: int | None = None, tokens: int | None = None
) -> Estimate:
    """What the bundle of that manifest takes on a device, and what would make it fit.

    Args:
        manifest: The bundle's.
        device: Where.
        frames: Most frames of a video; None is the model's default_frames.
        tokens: Most tokens of prompt and answer; None as in `profiles.graph_profiles`.

    Raises:
        UsageError: More frames or tokens than the model takes, or none.
    """
    model, positions = manifest.model, manifest.decoder.max_positions
    frames = _bounded("--frames", frames, model.default_frames, model.max_frames)
    tokens = _bounded("--max-tokens", tokens, min(DEFAULT_TOKENS, positions), positions)
    found = _estimate(manifest, device, frames, tokens)
    found = replace(found, memories=tuple(_memories(manifest, frames)))
    if found.fits:
        return found
    return replace(found, remedies=tuple(_remedies(manifest, device, found)))


def main(argv: Sequence[str]) -> None:
    """Prints what a bundle takes on a device.

    Args:
        argv: The arguments without the program's name.

    Raises:
        IncompatibleError: It does not fit, after what it takes was printed.
        PPLLaVAError: The bundle or the device is not known.
        SystemExit: `--help`, or arguments that are not understood.
    """
    args = _parser().parse_args(argv)
    manifest = Bundle.open(args.bundle).manifest
    device, frames, tokens = _device(args.device, manifest)
    if args.frames is not None:
        frames = args.frames
    if args.max_tokens is not None:
        tokens = args.max_tokens
    found = estimate(manifest, device, frames=frames, tokens=tokens)
    if args.json:
        whole = asdict(found) | {"run_bytes": found.run_bytes, "fits": found.fits}
        print(strict_json.dumps(whole), end="")
    else:
        from rich.console import Console

        console = Console()
        console.print(table(found))
        if found.memories:
            console.print(memory_table(found))
        console.print(found.latency)
    if not found.fits:
        most = max(found.run_bytes, found.build_bytes)
        remedies = " or ".join(found.remedies) or "choose a larger device"
        when = "" if most == found.run_bytes else " while its plans are built"
        raise IncompatibleError(
            f"{args.bundle} takes {most / _GB:.1f} GB on {device.name}{when}, expected at most "
            f"{device.memory_bytes / _GB:.1f} GB: {remedies}"
        )


def run() -> int:
    """Returns the exit code of the command with the process's arguments."""
    return run_command(main)


def table(found: Estimate) -> Table:
    """What takes how much, and on what each number rests."""
    from rich.table import Table

    shown = Table(title=f"{found.device}: {found.frames} frames, {found.tokens} tokens")
    shown.add_column("memory of")
    shown.add_column("GB", justify="right")
    shown.add_column("basis")
    for part in found.parts:
        shown.add_row(part.name, f"{part.num_bytes / _GB:.2f}", part.basis)
    shown.add_section()
    shown.add_row("all of these", f"{found.run_bytes / _GB:.2f}", "")
    shown.add_row("most while plans are built", f"{found.build_bytes / _GB:.2f}", "estimate")
    shown.add_row("the device", f"{found.memory_bytes / _GB:.2f}", "")
    shown.add_row("fits" if found.fits else "does not fit", "", "")
    return shown


def memory_table(found: Estimate) -> Table:
    """What one video takes in each memory, and what its questions run again."""
    from rich.table import Table

    shown = Table(title=f"on the CPU: a video of {found.frames} frames")
    shown.add_column("--memory")
    shown.add_column("GB", justify="right")
    shown.add_column("each question runs")
    for kept in found.memories:
        shown.add_row(kept.memory, f"{kept.num_bytes / _GB:.3f}", kept.rerun)
    return shown


def _memories(manifest: Manifest, frames: int) -> Iterator[Kept]:
    if manifest.precision.dtype == "bf16":  # which no CPU runs here
        return
    for kind in MEMORY_KINDS:
        with suppress(IncompatibleError, UsageError):  # not of this bundle
            layout = MemoryLayout.of(manifest, kind)
            yield Kept(kind, layout.num_bytes(frames), layout.rerun)


def _estimate(manifest: Manifest, device: Device, frames: int, tokens: int) -> Estimate:
    model, decoder = manifest.model, manifest.decoder
    weights = _weights(manifest)
    float_bytes = 4 if manifest.precision.dtype == "fp32" else 2
    cache_bytes = 4 if decoder.dtype == "float32" and manifest.precision.dtype != "bf16" else 2
    patches = math.prod(model.grid)
    base = _SYSTEM_BYTES if device.integrated else _CONTEXT_BYTES
    video = frames * patches * (model.key_width + model.decoder_width) * float_bytes
    cache = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * tokens * cache_bytes
    parts = [Part("system and this program" if device.integrated else "CUDA", base, "assumed")]
    parts += [Part(f"weights of {name}", size, "file") for name, size in weights.items()]
    # Not the token embeddings: their file is mapped, and a row of it read where it is needed.
    parts += [
        Part(f"KV cache of {tokens} tokens", cache, "shape"),
        Part(f"keys and hidden of {frames} frames", video, "shape"),
        Part("activations of vision", _vision_bytes(manifest, frames, float_bytes), "estimate"),
        Part("activations of pool", _pool_bytes(manifest, frames, float_bytes), "estimate"),
        Part("activations of decoder", _decoder_bytes(manifest, tokens, float_bytes), "estimate"),
    ]
    build = base + round(_BUILDER_FACTOR * max(weights.values()))
    return Estimate(device.name, frames, tokens, tuple(parts), build, device.memory_bytes)


def _file_bytes(manifest: Manifest, path: str) -> int:
    """The size of a graph with its data beside it."""
    return sum(spec.size for name, spec in manifest.files.items()
               if name == path or name.startswith(f"{path}."))  # fmt: skip


def _vision_bytes(manifest: Manifest, frames: int, float_bytes: int) -> int:
    # The widest point of a layer is its attention, if the scores are written out, or its MLP.
    model = manifest.model
    frames = frames if model.frames_coupled else min(frames, FRAMES_PER_RUN)
    tokens, width = math.prod(model.grid) + 1, model.vision_width
    heads = max(1, width // _HEAD_WIDTH)
    per_frame = tokens * (2 * width + 4 * width + 2 * heads * tokens)
    return frames * per_frame * float_bytes


def _pool_bytes(manifest: Manifest, frames: int, float_bytes: int) -> int:
    # Built of plain operators, pooling copies every window; keys are compared in fp32.
    model = manifest.model
    grid = frames * math.prod(model.grid)
    overlap = math.prod(k / s for k, s in zip(model.kernel, model.stride, strict=True))
    copied = math.ceil(grid * overlap) * model.decoder_width * float_bytes
    return copied + grid * model.key_width * 4


def _decoder_bytes(manifest: Manifest, tokens: int, float_bytes: int) -> int:
    decoder = manifest.decoder
    heads = max(1, decoder.width // decoder.head_dim)
    part = min(PART_OF_PROMPT, tokens)  # each takes fp32 scores, and shares of the floats' type
    scores = heads * part * (tokens + part) * (4 + float_bytes)
    return scores + 8 * part * decoder.width * float_bytes + decoder.vocab_size * 4


def _remedies(manifest: Manifest, device: Device, found: Estimate) -> list[str]:
    """What would make it fit, each by itself."""
    remedies = []
    for option, name in (("frames", "--frames"), ("tokens", "--max-tokens")):
        if fitting := _largest(manifest, device, found, option):
            remedies.append(f"ask for {name} {fitting}")
    if manifest.precision.dtype == "fp32":
        remedies.append("export with --fp16")
    weights = _weights(manifest)
    decoder = weights.pop("decoder")
    bits = _BITS[manifest.precision.decoder]
    if (manifest.precision.dtype, manifest.precision.decoder) == ("fp32", "float"):
        bits *= 2
    for kind in ("int8", "int4"):
        smaller = round(decoder * _BITS[kind] / bits)
        most = max(smaller, *weights.values())
        build = found.parts[0].num_bytes + round(_BUILDER_FACTOR * most)
        after = max(found.run_bytes - decoder + smaller, build)
        if smaller < decoder and after <= device.memory_bytes:
            remedies.append(f"export with --decoder {kind}")
            break
    if device.integrated and found.run_bytes <= device.memory_bytes:
        missing = math.ceil((found.build_bytes - device.memory_bytes) / _GB)
        remedies.append(f"add {missing} GB of swap while the plans are built")
    return remedies


def _weights(manifest: Manifest) -> dict[str, int]:
    """Size of each graph with its data, in bytes."""
    paths = {
        name: graph.path for name, graph in manifest.graphs.items() if name not in MEMORY_GRAPHS
    }
    paths["decoder"] = manifest.decoder.path
    return {name: _file_bytes(manifest, path) for name, path in paths.items()}


def _largest(manifest: Manifest, device: Device, found: Estimate, option: str) -> int:
    """The most frames or tokens with which it fits, 0 when none do; no part shrinks with them."""
    low, high = 0, {"frames": found.frames, "tokens": found.tokens}[option]
    while low + 1 < high:
        middle = (low + high) // 2
        asked = {"frames": found.frames, "tokens": found.tokens} | {option: middle}
        if _estimate(manifest, device, asked["frames"], asked["tokens"]).fits:
            low = middle
        else:
            high = middle
    return low


def _bounded(option: str, asked: int | None, usual: int, most: int) -> int:
    if asked is None:
        return min(usual, most)
    if not 1 <= asked <= most:
        raise UsageError(f"{option} is {asked}, the model takes 1 to {most}")
    return asked


def _device(name: str, manifest: Manifest) -> tuple[Device, int | None, int | None]:
    """The device, and the frames and tokens that are recommended on it, where it is known."""
    if name != "auto":
        recipe: devices.Recipe | None = devices.recipe(name)
        assert recipe is not None
        device = Device(recipe.title, recipe.memory_bytes, recipe.integrated)
    elif (gpu := devices.find_gpu()) is not None:
        recipe = devices.recipe_for(gpu)
        device = Device(gpu.name, gpu.memory_bytes, gpu.integrated)
    else:
        raise UnavailableError(
            f"no GPU is here to plan for: name --device, one of {', '.join(devices.recipes())}"
        )
    if recipe is None:
        return device, None, None
    frames = min(recipe.frames, manifest.model.max_frames)
    return device, frames, min(recipe.tokens, manifest.decoder.max_positions)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppllava-plan",
        description="Say whether a bundle fits a device, before anything is built. Needs no GPU.",
    )
    add = parser.add_argument
    add("bundle", type=Path, help="folder that ppllava-export wrote")
    add("--device", default="auto", metavar="NAME",
        help="machine of devices.toml, or auto, the one at hand (default)")  # fmt: skip
    add("--frames", type=int, metavar="N", help="most frames of a video")
    add("--max-tokens", type=int, metavar="N", help="most tokens of prompt and answer")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(run())
