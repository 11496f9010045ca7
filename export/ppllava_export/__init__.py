"""Trained PPLLaVA checkpoints → bundles that run without torch. The only package with torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from ppllava_engines.bundle import Manifest

Precision = Literal["fp32", "fp16"]
STAGES = (
    "checkpoint",
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
    precision: Precision = "fp32",
    *,
    skip_tokenizer: bool = False,
    overwrite: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Manifest:
    """Returns the manifest of the bundle it makes of a checkpoint folder, in `out`.

    Parity of every graph against torch is measured before the bundle takes its place; a failed or
    killed export leaves nothing, or the bundle that was there.

    Args:
        checkpoint: Folder with config.json and safetensors weights.
        out: The bundle's folder.
        precision: Type of the graphs' floats. fp16 keeps fp32 where it matters.
        skip_tokenizer: Allows a checkpoint without tokenizer files; no question can be asked of
            such a bundle in text.
        overwrite: Whether a bundle at `out` may be replaced.
        on_stage: Called with the name of each stage as it begins, in the order of `STAGES`.

    Raises:
        DataError: Broken weights, config or tokenizer; every tensor concerned is named.
        IncompatibleError: A model variant that this release does not export.
        InternalError: A graph's outputs are further from torch than its tolerance.
        NotFoundError: A file of the checkpoint is missing.
        StorageError: Writing failed.
        UnavailableError: A package of the export extra is not installed.
        UsageError: `out` is there and may not be replaced.
    """
    try:
        from .export import export
    except ModuleNotFoundError as error:
        from ppllava_engines.errors import UnavailableError

        raise UnavailableError(
            f"exporting needs the package {error.name!r}: pip install 'ppllava-edge[export]'"
        ) from error
    return export(
        Path(checkpoint),
        Path(out),
        precision,
        skip_tokenizer=skip_tokenizer,
        overwrite=overwrite,
        on_stage=on_stage,
    )
