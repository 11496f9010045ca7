"""The whole export in one screen: checkpoint → graphs → decoder → parity → bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from ppllava_engines.bundle import (
    MANIFEST,
    FileSpec,
    Manifest,
    ModelSpec,
    Precision,
    hash_files,
    new_bundle,
)
from ppllava_engines.errors import UsageError
from ppllava_engines.samples import SAMPLES

from .checkpoint import Checkpoint, load_checkpoint
from .config_files import text_token_ids
from .decoder import export_decoder
from .graphs import export_newline, export_pool, export_text, export_vision
from .memory_graphs import export_memory_graphs
from .open_clip_source import OpenClipSpec
from .parity import make_samples, measure
from .precision import DTYPES
from .quiet import quiet
from .tokenizer_files import (
    chat_template,
    end_token_ids,
    next_turn_template,
    read_tokenizers,
)
from .vision_int8 import Channels

_TOOLS = (
    "ppllava-edge",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-genai",
    "open_clip_torch",
)


@dataclass(frozen=True)
class Order:
    """What is to be exported, and how; see `ppllava_export.export_bundle`.

    Raises:
        UsageError: Options that do not go together, or a precision that there is not.
    """

    checkpoint: Path
    precision: Precision
    calibration: tuple[Path, ...] = ()
    clip: str | None = None
    skip_tokenizer: bool = False

    def __post_init__(self) -> None:
        dtype, vision, decoder, prefill = vars(self.precision).values()
        for name, value, choices in (
            ("precision", dtype, tuple(DTYPES)),
            ("vision", vision, ("float", "int8", "int8-static")),
            ("decoder", decoder, ("float", "int8", "int4")),
            ("prefill", prefill, ("same", "int8")),
        ):
            if value not in choices:
                raise UsageError(f"{name} is {value!r}, expected {' or '.join(choices)}")
        if vision == "int8-static" and not self.calibration:
            raise UsageError(
                "a static int8 vision graph is calibrated on videos: give some like those that the "
                "model will see, by --calibrate"
            )
        if self.calibration and vision != "int8-static":
            raise UsageError("calibration videos are for an int8 vision graph: add --vision int8")
        if vision == "int8" and dtype != "fp32":
            raise UsageError(
                f"an int8 vision graph without calibration is for CPUs and float32, not {dtype}: "
                "leave --dtype away, or give videos by --calibrate"
            )
        if prefill == "int8" and (decoder == "float" or dtype != "fp32"):
            raise UsageError(
                f"an int8 prefill graph is for CPUs and goes with an int8 or int4 decoder of "
                f"float32, not with {decoder} of {dtype}: add --decoder int8, leave --dtype away"
            )


def export(order: Order, out: Path, overwrite: bool, on_stage: Callable[[str], None]) -> Manifest:
    """Returns the manifest of the bundle made in `out`; see `ppllava_export.export_bundle`."""
    precision = order.precision
    dtype, quantization = DTYPES[precision.dtype], precision.decoder

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        on_stage(name)
        with quiet(), torch.no_grad():
            yield

    with new_bundle(out, overwrite) as staging:
        with stage("checkpoint"):
            limit = torch.finfo(dtype).max
            checkpoint = load_checkpoint(order.checkpoint, limit=limit, clip=order.clip)
            tokenizers = None
            if not order.skip_tokenizer:
                tokenizers = read_tokenizers(checkpoint.config, checkpoint.files)
        with stage("calibration"):
            layers: Mapping[str, Channels] | Literal["int8"] | None = None
            if precision.vision == "int8":
                layers = "int8"
            elif precision.vision == "int8-static":
                from .calibration import calibrate

                layers = calibrate(checkpoint, order.calibration)
        with stage("vision graph"):
            graphs = {"vision": export_vision(checkpoint, dtype, staging, layers)}
        with stage("text graph"):
            graphs["text"] = export_text(checkpoint, dtype, staging)
        with stage("pool graph"):
            graphs["pool"] = export_pool(checkpoint, dtype, staging)
            projector, grid = checkpoint.model().multi_modal_projector, checkpoint.config.grid
            graphs |= export_memory_graphs(projector, grid, dtype, staging)
            newline = export_newline(checkpoint, dtype, staging)
        tokenizer = tokenizers.decoder if tokenizers else None
        with stage("decoder"):
            decoder = export_decoder(
                checkpoint.model().language_model,
                end_token_ids(tokenizer, checkpoint.config),
                dtype,
                staging,
                quantization=None if quantization == "float" else quantization,
                prefill=precision.prefill == "int8",
                release=checkpoint.weights.release,
            )
        model = _model_spec(checkpoint, tokenizer)
        with stage("parity"):
            samples = make_samples(checkpoint, graphs, decoder, staging)
            samples.write(staging / SAMPLES)
            parity = measure(
                staging, samples, model=model, graphs=graphs, decoder=decoder, precision=precision
            )
            parity.require()
            parity.write(staging)
        with stage("bundle"):
            manifest = Manifest(
                model=model,
                graphs=graphs,
                decoder=decoder,
                precision=precision,
                tokenizers=tokenizers.write(staging) if tokenizers else {},
                image_newline=newline,
                samples=SAMPLES,
                files=hash_files(staging),
                exporter=_versions(),
                sources=_sources(checkpoint, order.clip),
            )
            (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _model_spec(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> ModelSpec:
    config = checkpoint.config
    begin_id, end_id = text_token_ids(config.text)
    template = chat_template(tokenizer, config)
    return ModelSpec(
        name=config.name,
        family=config.family,
        image_size=config.vision.image_size,
        grid=config.grid,
        vision_width=config.vision.encoder.hidden_size,
        key_width=config.projection_dim,
        decoder_width=config.decoder_width,
        max_frames=config.max_frames,
        frames_coupled=config.frames_coupled,
        image_mean=config.image_mean,
        image_std=config.image_std,
        kernel=config.kernel,
        stride=config.stride,
        image_kernel=config.image_kernel,
        image_stride=config.image_stride,
        pooling=config.pooling,
        temperature=config.temperature,
        image_grid_pinpoints=config.image_grid_pinpoints,
        text_positions=config.text.positions,
        text_bos_token_id=begin_id,
        text_eos_token_id=end_id,
        text_pad_token_id=config.text.pad_token_id,
        image_token_index=config.image_token_index,
        chat_template=template,
        next_turn_template=next_turn_template(template),
        default_frames=checkpoint.files.num_frames,
    )


def _sources(checkpoint: Checkpoint, clip: str | None) -> dict[str, str]:
    sources = {"checkpoint": checkpoint.weights.sha256()}
    if clip is not None:
        file = OpenClipSpec.parse(clip).file
        sources[clip] = FileSpec.of(file).sha256 if file else ""
    return sources


def _versions() -> dict[str, str]:
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found
