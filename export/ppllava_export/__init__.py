"""Trained PPLLaVA checkpoints → bundles that run without torch. The only package with torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ppllava_engines.bundle import Manifest

STAGES = (
    "checkpoint",
    "calibration",
    "vision graph",
    "text graph",
    "pool graph",
    "decoder",
    "parity",
    "bundle",
)


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    *,
    vision: Literal["int8"] | None = None,
    decoder: Literal["int8", "int4"] | None = None,
    prefill: Literal["int8"] | None = None,
    calibration: Sequence[str | Path] = (),
    clip: str | None = None,
    skip_tokenizer: bool = False,
    overwrite: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Manifest:
    """Returns the manifest of the bundle it makes of a checkpoint folder, in `out`.

    Every graph is compared with torch before the bundle takes its place; a failed or killed export
    leaves nothing, or the bundle that was there.

    Args:
        checkpoint: Folder with config.json and weights: safetensors, or pickled ones that torch
            can read without running anything.
        out: The bundle's folder.
        precision: Type of the graphs' floats. fp16 and bf16 keep fp32 where it matters; bf16 is for
            TensorRT, ONNX Runtime's CPU cannot run it.
        vision: int8 quantizes the vision graph's linear layers: of the tower by what each run
            brings, for CPUs; with `calibration` all of them, by what those videos bring.
        decoder: Type of the decoder's weights where it is not that of the floats.
        prefill: int8 adds a second decoder graph, for CPUs, which reads prompts faster.
        calibration: Videos like those the model will see; only with `vision`.
        clip: `open_clip:MODEL[:FILE]` puts that model's text tower and projections in the place of
            the checkpoint's.
        skip_tokenizer: Allows a checkpoint without tokenizer files; such a bundle runs on ids.
        overwrite: Whether a bundle at `out` may be replaced.
        on_stage: Called with the name of each stage as it begins, in the order of `STAGES`.

    Raises:
        DataError: Broken weights, config, tokenizer or video, or one that the checkpoint misses;
            every tensor concerned is named.
        IncompatibleError: A model variant that this release does not export, or one that loses too
            much when it is quantized as asked.
        InternalError: A graph's outputs are further from torch than its tolerance.
        NotFoundError: No such folder, no config.json in it, or no such video or file of `clip`.
        StorageError: Writing failed.
        UnavailableError: A package is not installed; names the pip command.
        UsageError: `out` is there and may not be replaced, or options that do not go together.
    """
    from ppllava_engines.bundle import Precision
    from ppllava_engines.errors import UnavailableError

    try:
        from .export import Order, export
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"exporting needs the package {error.name!r}: pip install 'ppllava-edge[export]'"
        ) from error
    order = Order(
        checkpoint=Path(checkpoint),
        precision=Precision(
            dtype=precision,
            vision="int8-static" if vision == "int8" and calibration else vision or "float",
            decoder=decoder or "float",
            prefill=prefill or "same",
        ),
        calibration=tuple(Path(video) for video in calibration),
        clip=clip,
        skip_tokenizer=skip_tokenizer,
    )
    return export(order, Path(out), overwrite, on_stage or (lambda _stage: None))
