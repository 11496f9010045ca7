"""The golden checkpoint against what the reference code returned for it, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle
from ppllava_engines.onnxruntime import open_session
from ppllava_export import export_bundle
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.parity import vision_with_tokens

Array = NDArray[Any]

STAGES = ("vision_tokens", "text_embed", "relevance", "pooled", "multi_image", "logits")
TOLERANCES = {"fp32": 2e-5, "fp16": 5e-3}  # of the largest magnitude; fp16 chains the stages
IMAGE_FRAMES = 3


@dataclass(frozen=True)
class Golden:
    """A golden checkpoint with its inputs and the outputs expected."""

    checkpoint: Path
    arrays: Mapping[str, Array]

    @property
    def question(self) -> Array:
        """The question's own tokens: padding after them changes nothing."""
        return self.arrays["clip_ids"][:, : int(self.arrays["clip_mask"].sum())]

    @property
    def frames(self) -> Array:
        return self.arrays["pixel_values"][:, 0]

    def expected(self, stage: str) -> Array:
        value = self.arrays[stage]
        return value[:, -1] if stage == "logits" else value.reshape(-1, *value.shape[2:])


@pytest.fixture(scope="module")
def clip(golden: Path) -> Golden:
    with np.load(golden / "clip/expected.npz") as arrays:
        return Golden(golden / "clip/checkpoint", dict(arrays))


@pytest.fixture(scope="module")
def from_torch(clip: Golden) -> dict[str, Array]:
    model = load_checkpoint(clip.checkpoint).model()
    config, projector = model.config, model.multi_modal_projector
    with torch.no_grad():
        tokens = model.vision_tower.vision_model(torch.from_numpy(clip.frames))
        keys, hidden = model.encode(torch.from_numpy(clip.frames))
        question = torch.from_numpy(clip.question)
        pooled, relevance = model.pool(keys, hidden, question)
        images, _ = model.pool(
            keys[:IMAGE_FRAMES],
            hidden[:IMAGE_FRAMES],
            question,
            config.image_kernel,
            config.image_stride,
        )
        embeds = model.splice(torch.from_numpy(clip.arrays["input_ids"]), pooled)
        logits = model.language_model(inputs_embeds=embeds).logits[:, -1]
        outputs = (tokens, projector.text_embed(question), relevance, pooled, images, logits)
    return dict(zip(STAGES, (output.numpy() for output in outputs), strict=True))


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def from_graphs(
    request: pytest.FixtureRequest, clip: Golden, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Array]]:
    out = tmp_path_factory.mktemp("golden") / request.param
    manifest = export_bundle(clip.checkpoint, out, request.param, skip_tokenizer=True)
    assert manifest.tokenizers == {}  # the golden checkpoints have none
    return request.param, run_bundle(out, clip)


def run_bundle(folder: Path, clip: Golden) -> dict[str, Array]:
    """Every stage from the graphs alone, each fed by the ones before."""
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    config = load_checkpoint(clip.checkpoint).config
    pixels = clip.frames.astype(manifest.decoder.dtype)
    with vision_with_tokens(manifest.graphs["vision"], folder, config) as engine:
        video = engine.run({"pixel_values": pixels})
    tokens = video.pop("vision_tokens")
    text = bundle.engine("text").run({"input_ids": clip.question})
    pool = bundle.engine("pool")
    model = manifest.model

    def window(kernel: tuple[int, ...], stride: tuple[int, ...]) -> dict[str, Array]:
        return {"kernel": np.array(kernel), "stride": np.array(stride)}

    pooled = pool.run(video | text | window(model.kernel, model.stride))
    images = {name: value[:IMAGE_FRAMES] for name, value in video.items()}
    images = pool.run(images | text | window(model.image_kernel, model.image_stride))
    logits = last_logits(bundle, clip.arrays["input_ids"][0], pooled["pooled"])
    outputs = (
        tokens,
        text["text_embed"],
        pooled["relevance"],
        pooled["pooled"],
        images["pooled"],
        logits,
    )
    return dict(zip(STAGES, outputs, strict=True))


def last_logits(bundle: Bundle, ids: Array, pooled: Array) -> Array:
    decoder = bundle.manifest.decoder
    table = np.load(bundle.file(decoder.embedding), mmap_mode="r")
    at = int(np.flatnonzero(ids == bundle.manifest.model.image_token_index).item())
    embeds = np.concatenate([table[ids[:at]], pooled, table[ids[at + 1 :]]])[None]
    session = open_session(bundle.file(decoder.path))
    empty = np.zeros((1, decoder.num_kv_heads, 0, decoder.head_dim), decoder.dtype)
    feeds = {v.name: empty for v in session.get_inputs() if v.name.startswith("past_key_values")}
    feeds |= {"inputs_embeds": embeds, "attention_mask": np.ones((1, embeds.shape[1]), np.int64)}
    logits: Array = session.run(["logits"], feeds)[0][:, -1]
    return logits


def check(stage: str, got: Array, expected: Array, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = np.abs(got.astype(np.float32) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{stage}: {error:.1e}"


@pytest.mark.parametrize("stage", STAGES)
def test_torch_modules(clip: Golden, from_torch: dict[str, Array], stage: str) -> None:
    expected = clip.expected(stage) if "vision" not in stage else clip.arrays[stage]
    check(stage, from_torch[stage], expected.reshape(from_torch[stage].shape), TOLERANCES["fp32"])


@pytest.mark.parametrize("stage", STAGES)
def test_exported_graphs(
    clip: Golden, from_graphs: tuple[str, dict[str, Array]], stage: str
) -> None:
    precision, outputs = from_graphs
    expected = clip.expected(stage) if "vision" not in stage else clip.arrays[stage]
    check(stage, outputs[stage], expected.reshape(outputs[stage].shape), TOLERANCES[precision])
