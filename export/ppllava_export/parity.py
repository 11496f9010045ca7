"""Torch in fp32 → the samples that every graph of a bundle is compared with.

What torch is given and what it gives is rounded to the graphs' own types when it is stored, and
each stage starts from what was stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ppllava_engines.bundle import DecoderSpec, GraphSpec, ModelSpec, Precision
from ppllava_engines.parity import Parity, replay
from ppllava_engines.samples import Samples, pixel_values, prompt_embeds

from .checkpoint import Checkpoint
from .config_files import text_token_ids
from .mapped import streamed_fp32
from .modules.config import ModelConfig, TextConfig, Window
from .modules.model import PPLLaVA
from .modules.pooling import token_weights
from .precision import widen
from .vision_int8 import count_layers

Array = np.ndarray[Any, np.dtype[Any]]

_SEED = 0
_QUESTION_TOKENS = 12
_PROMPT_TOKENS = 8  # on either side of the pooled ones
_MAX_KERNEL_FRAMES = 4  # of the samples' pooling: full-size towers take seconds for a frame
_COARSE = (3, 6, 6)  # of which smooth pictures over (T, h, w) are made
_VOCABULARY_ROWS = 8192  # of the head, widened at a time
_LEAST_NORM = 1e-12  # that of torch's normalize
_BACKEND = "ONNX Runtime's CPU"


def make_samples(
    checkpoint: Checkpoint, graphs: Mapping[str, GraphSpec], decoder: DecoderSpec, folder: Path
) -> Samples:
    """Returns what torch is given and what it answers, seeded.

    Args:
        checkpoint: Its weights are widened to fp32 a module at a time.
        graphs: Say the type that samples are stored in.
        decoder: Its embedding table is what the prompt is made of.
        folder: Holds the table.
    """
    config, model = checkpoint.config, checkpoint.model()
    dtype = np.dtype(graphs["vision"].outputs[0].dtype)
    inputs = _inputs(config)
    frames, text_ids, kernel, stride = (
        inputs[name] for name in ("frames", "text_ids", "kernel", "stride")
    )
    with torch.no_grad(), streamed_fp32(model, checkpoint.weights.release):
        pixels = pixel_values(frames, config.image_mean, config.image_std, dtype)
        projector = model.multi_modal_projector
        tokens = model.vision_tower.vision_model(_given(pixels))
        aligned = projector.aligned_tokens(tokens)
        norms = aligned.norm(dim=-1).clamp_min(_LEAST_NORM)
        keys = _stored(aligned / norms[..., None], dtype)
        hidden = _stored(projector.hidden(tokens), dtype)
        text_embed = _stored(projector.text_embed(torch.from_numpy(text_ids)), dtype)
        pooled, relevance = projector.pool(
            _given(keys),
            _given(hidden),
            _given(text_embed),
            config.grid,
            _triple(kernel),
            _triple(stride),
        )
        weight = float(token_weights(relevance, projector.logit_scale).max())
        stored = _stored(pooled, dtype)
        before, after = inputs["prompt_before"], inputs["prompt_after"]
        table = folder / decoder.embedding
        embeds = prompt_embeds(table, decoder.max_positions, before, stored, after)
        logits = _logits(model, _given(embeds), checkpoint)
    return Samples(
        **inputs,
        tokens=_stored(tokens, np.dtype(np.float16)),
        norms=norms.numpy(),
        keys=keys,
        hidden=hidden,
        text_embed=text_embed,
        pooled=stored,
        relevance=relevance.numpy(),
        logits=logits.numpy(),
        gain=np.array(checkpoint.logit_scale() / config.temperature * weight, np.float32),
    )


def measure(
    folder: Path,
    samples: Samples,
    *,
    model: ModelSpec,
    graphs: Mapping[str, GraphSpec],
    decoder: DecoderSpec,
    precision: Precision,
) -> Parity:
    """Returns how far the graphs in the bundle's `folder` are from torch, on this machine's CPU.

    A bfloat16 graph has no kernels there, and is measured on a copy that computes in fp32 with the
    same rounded weights.
    """
    parts: dict[str, Any] = {"model": model, "precision": precision}
    told = str(precision)
    if precision.vision != "float":
        rounded, layers = count_layers(folder / graphs["vision"].path)
        told += f" ({rounded} of {layers} vision layers are int8)"
    if precision.dtype != "bf16":
        stages = replay(folder, samples, graphs=graphs, decoder=decoder, lean=True, **parts)
        return Parity(told, _BACKEND, tuple(stages))
    with TemporaryDirectory(dir=folder) as name:
        wide = Path(name)
        for path in (*(graph.path for graph in graphs.values()), decoder.path):
            widen(folder / path, wide / path)
        (wide / decoder.embedding).symlink_to(folder.resolve() / decoder.embedding)
        stages = replay(wide, samples, graphs=graphs, decoder=decoder, lean=True, **parts)
        return Parity(told, f"{_BACKEND}, widened to fp32", tuple(stages))


def _inputs(config: ModelConfig) -> dict[str, Array]:
    """Returns what a model of this config takes, by its names in `Samples`."""
    rng = np.random.default_rng(_SEED)
    kernel, stride = (np.array(window, np.int64) for window in (config.kernel, config.stride))
    kernel[0], stride[0] = min(kernel[0], _MAX_KERNEL_FRAMES), min(stride[0], _MAX_KERNEL_FRAMES)
    num_frames = min(2 * int(kernel[0]), config.max_frames)
    prompt = rng.integers(0, config.decoder["vocab_size"], (2, _PROMPT_TOKENS))
    return {
        "frames": _pictures(rng, num_frames, config.vision.image_size),
        "text_ids": _question(rng, config.text),
        "prompt_before": prompt[0],
        "prompt_after": prompt[1],
        "kernel": kernel,
        "stride": stride,
    }


def _pictures(rng: np.random.Generator, num_frames: int, side: int) -> Array:
    """Returns smooth moving pictures (T, S, S, 3) uint8: noise would be nothing like a video."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, *_COARSE)).astype(np.float32))
    fine = F.interpolate(coarse, size=(num_frames, side, side), mode="trilinear")
    return fine[0].permute(1, 2, 3, 0).to(torch.uint8).numpy()


def _question(rng: np.random.Generator, text: TextConfig) -> Array:
    """Returns random ids (1, n) as the text tower takes them."""
    begin, end = text_token_ids(text)
    first = [] if begin is None else [begin]
    words = rng.integers(0, text.vocab_size, min(_QUESTION_TOKENS, text.positions) - 2)
    words = words[~np.isin(words, [*first, end, text.pad_token_id or end])]
    ids = np.concatenate([first, words, [end]]).astype(np.int64)
    if text.pad_token_id is not None:
        ids = np.pad(ids, (0, text.positions - len(ids)), constant_values=text.pad_token_id)
    return ids[None]


def _logits(model: PPLLaVA, embeds: Tensor, checkpoint: Checkpoint) -> Tensor:
    """Returns the logits (1, V) after a prompt; the head is the largest tensor, and never whole."""
    last = model.language_model.model(inputs_embeds=embeds).last_hidden_state[:, -1]
    logits = []
    for rows in model.language_model.lm_head.weight.split(_VOCABULARY_ROWS):
        logits.append(last @ rows.float().T)
        checkpoint.weights.release()
    return torch.cat(logits, dim=1)


def _triple(array: Array) -> Window:
    return int(array[0]), int(array[1]), int(array[2])


def _given(array: Array) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _stored(value: Tensor, dtype: np.dtype[Any]) -> Array:
    return value.numpy().astype(dtype)
