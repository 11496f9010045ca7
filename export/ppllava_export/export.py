"""The whole export in one screen: checkpoint → graphs → decoder → parity → bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ppllava_engines.bundle import (
    MANIFEST,
    DecoderSpec,
    GraphSpec,
    Manifest,
    ModelSpec,
    hash_files,
    new_bundle,
)
from ppllava_engines.errors import UsageError

from . import Precision
from .checkpoint import Checkpoint, load_checkpoint
from .config_files import text_token_ids
from .decoder import export_decoder
from .graphs import export_pool, export_text, export_vision
from .parity import measure
from .precision import DTYPES
from .quiet import quiet
from .tokenizer_files import read_tokenizers

_CHAT_TEMPLATE = "USER: <image>\n{question} ASSISTANT: "
_TOOLS = (
    "ppllava-edge",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-genai",
)


def export(
    folder: Path,
    out: Path,
    precision: Precision,
    *,
    skip_tokenizer: bool,
    overwrite: bool,
    on_stage: Callable[[str], None] | None,
) -> Manifest:
    """Returns the manifest of the bundle made in `out`; see `ppllava_export.export_bundle`."""
    if precision not in DTYPES:
        raise UsageError(f"precision is {precision!r}, expected {' or '.join(DTYPES)}")
    dtype = DTYPES[precision]

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        if on_stage is not None:
            on_stage(name)
        with quiet(), torch.no_grad():
            yield

    with new_bundle(out, overwrite) as staging:
        with stage("checkpoint"):
            checkpoint = load_checkpoint(folder, limit=torch.finfo(dtype).max)
            tokenizers = None
            if not skip_tokenizer:
                tokenizers = read_tokenizers(checkpoint.config, checkpoint.files)
            model = checkpoint.model()
        with stage("vision graph"):
            graphs = {"vision": export_vision(model, dtype, staging)}
        with stage("text graph"):
            graphs["text"] = export_text(model, dtype, staging)
        with stage("pool graph"):
            graphs["pool"] = export_pool(model, dtype, staging)
        with stage("decoder"):
            decoder = export_decoder(model.language_model, checkpoint.config, dtype, staging)
        with stage("parity"):
            parity = measure(model, graphs, decoder, staging, precision)
            parity.require()
        with stage("bundle"):
            parity.write(staging)
            paths = tokenizers.write(staging) if tokenizers else {}
            manifest = _manifest(checkpoint, graphs, decoder, precision, paths, staging)
            (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _manifest(
    checkpoint: Checkpoint,
    graphs: dict[str, GraphSpec],
    decoder: DecoderSpec,
    precision: Precision,
    tokenizers: dict[str, str],
    staging: Path,
) -> Manifest:
    config = checkpoint.config
    begin_id, end_id = text_token_ids(config.text)
    return Manifest(
        model=ModelSpec(
            name=config.name,
            image_size=config.vision.image_size,
            grid=config.grid,
            vision_width=config.vision.encoder.hidden_size,
            key_width=config.projection_dim,
            decoder_width=config.decoder_width,
            max_frames=config.max_frames,
            frames_coupled=False,
            image_mean=config.image_mean,
            image_std=config.image_std,
            kernel=config.kernel,
            stride=config.stride,
            image_kernel=config.image_kernel,
            image_stride=config.image_stride,
            temperature=config.temperature,
            text_positions=config.text.positions,
            text_bos_token_id=begin_id,
            text_eos_token_id=end_id,
            image_token_index=config.image_token_index,
            chat_template=_CHAT_TEMPLATE,
            default_frames=checkpoint.files.num_frames,
        ),
        graphs=graphs,
        decoder=decoder,
        precision=precision,
        tokenizers=tokenizers,
        files=hash_files(staging),
        exporter=_versions(),
        source_sha256=checkpoint.weights.sha256(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:  # run from a source tree
            found[tool] = "unknown"
    return found
