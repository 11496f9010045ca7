"""The modules of every family, against transformers' own and as graphs of any length."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ppllava_engines.engine import open_engine
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.graphs import export_text, export_vision
from ppllava_export.modules.bt_adapter import BTAdapterTower, SpaceBlock, as_the_reference_reads
from ppllava_export.modules.config import EncoderConfig, TextConfig, VisionConfig
from ppllava_export.modules.text import ClipTextTower, SiglipTextTower
from ppllava_export.modules.tower import ClipVisionTower, SiglipVisionTower
from tiny_checkpoint import write_checkpoint

TOLERANCE = 2e-5  # of the largest magnitude, fp32
VISION_VARIANTS: dict[str, dict[str, Any]] = {
    "bt-adapter": {"btadapter": True},
    "bt-adapter, all blocks": {"btadapter": True, "vision_feature_layer": -1},
    "siglip": {"family": "siglip"},
}
TEXT_VARIANTS: dict[str, dict[str, Any]] = {
    "clip, unextended": {"extend_clip": False},
    "siglip": {"family": "siglip"},
    "siglip, unextended": {"family": "siglip", "extend_clip": False},
}
SIZES = EncoderConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
)
SIGLIP_SIZES = dataclasses.replace(SIZES, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
WIDTHS: dict[str, Any] = dataclasses.asdict(SIZES)
VOCABULARY, END = 50, 48


@pytest.fixture(scope="module")
def coupled(tmp_path_factory: pytest.TempPathFactory) -> BTAdapterTower:
    folder = write_checkpoint(tmp_path_factory.mktemp("coupled"), btadapter=True)
    tower = load_checkpoint(folder).model().vision_tower.vision_model
    assert isinstance(tower, BTAdapterTower)
    return tower


def frames(number: int, side: int = 32) -> Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(number))


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("variant", VISION_VARIANTS)
def test_one_graph_takes_any_number_of_frames(variant: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_checkpoint(tmp_path, **VISION_VARIANTS[variant]))
    spec = export_vision(checkpoint, torch.float32, tmp_path)
    assert spec.inputs[0].shape == ("T", 3, 32, 32)
    model, engine = checkpoint.model(), open_engine(tmp_path / spec.path, spec)
    for number in (1, 2, 3, 7, checkpoint.config.max_frames):
        seen = engine.run({"pixel_values": frames(number).numpy()})
        for name, expected in zip(("keys", "hidden"), model.encode(frames(number)), strict=True):
            close(torch.from_numpy(seen[name]), expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", TEXT_VARIANTS)
def test_the_text_graph_takes_a_question(variant: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_checkpoint(tmp_path, **TEXT_VARIANTS[variant]))
    spec, text = export_text(checkpoint, torch.float32, tmp_path), checkpoint.config.text
    padded = text.pad_token_id is not None
    assert spec.inputs[0].shape == (1, text.positions if padded else "n")
    projector = checkpoint.model().multi_modal_projector
    engine = open_engine(tmp_path / spec.path, spec)
    for length in {text.positions, *(() if padded else (1, 2, 9))}:
        question = torch.randint(3, text.vocab_size - 2, (1, length))
        question[0, -1] = text.eos_token_id
        got = engine.run({"input_ids": question.numpy()})["text_embed"]
        close(torch.from_numpy(got), projector.text_embed(question))


# Against transformers


@torch.no_grad()
@pytest.mark.parametrize("end", [END, 2])  # 2: OpenAI's configs, where the highest id is the end
def test_clip_text_equals_transformers(end: int) -> None:
    torch.manual_seed(0)
    special: dict[str, Any] = {"bos_token_id": 47, "eos_token_id": end, "pad_token_id": 0}
    theirs = CLIPTextModelWithProjection(
        CLIPTextConfig(**WIDTHS, vocab_size=VOCABULARY, projection_dim=32, **special)
    ).eval()
    config = TextConfig(SIZES, VOCABULARY, 77, extended=False, bos_token_id=47, eos_token_id=end)
    ours = ClipTextTower(config)
    ours.load_state_dict(_inner(theirs))
    question = torch.tensor([[47, 5, 9, 30, 49 if end == 2 else END]])
    padded = torch.nn.functional.pad(question, (0, 72))
    mask = (torch.arange(77) < 5).long()[None]
    expected = theirs(input_ids=padded, attention_mask=mask).text_embeds
    close(theirs.text_projection(ours(question)), expected)


@torch.no_grad()
def test_siglip_text_equals_transformers() -> None:
    torch.manual_seed(0)
    sizes = dataclasses.asdict(SIGLIP_SIZES)
    theirs = SiglipTextModel(
        SiglipTextConfig(
            **sizes, vocab_size=VOCABULARY, projection_size=24, bos_token_id=0, eos_token_id=1
        )
    ).eval()
    ours = SiglipTextTower(TextConfig(SIGLIP_SIZES, VOCABULARY, 64, False, None, 1, 1), 24)
    ours.load_state_dict(_inner(theirs))
    ids = torch.nn.functional.pad(torch.tensor([[5, 9, 30, 1]]), (0, 60), value=1)
    close(ours(ids), theirs(input_ids=ids).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_towers_equal_transformers(layer: int) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"image_size": 30, "patch_size": 8}  # 6 pixels a side fill no patch
    clip = CLIPVisionModel(CLIPVisionConfig(**WIDTHS, **size)).eval()
    siglip = SiglipVisionModel(
        SiglipVisionConfig(**dataclasses.asdict(SIGLIP_SIZES), **size)
    ).eval()
    blocks = layer % 4
    ours = ClipVisionTower(VisionConfig(SIZES, **size), blocks)
    ours.load_state_dict(_inner(clip), strict=False)
    states = clip(pixel_values=frames(2, 30), output_hidden_states=True).hidden_states
    close(ours(frames(2, 30)), states[layer][:, 1:])
    wide = SiglipVisionTower(VisionConfig(SIGLIP_SIZES, **size), blocks)
    wide.load_state_dict(_inner(siglip), strict=False)
    states = siglip(pixel_values=frames(2, 30), output_hidden_states=True).hidden_states
    close(wide(frames(2, 30)), states[layer])


def _inner(model: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a tower by the names that they have inside of it."""
    state = model.state_dict()
    for part in ("text_model.", "vision_model."):
        state = {name.removeprefix(part): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if "projection" not in name}


# The temporal branch


@torch.no_grad()
def test_frames_of_one_video_are_coupled(coupled: BTAdapterTower) -> None:
    video = frames(5)
    changed = video.clone()
    changed[4] += 1
    before, after = coupled(video), coupled(changed)
    assert (before[0] - after[0]).abs().max() > 1e-3


@torch.no_grad()
def test_only_the_time_embedding_knows_the_order(coupled: BTAdapterTower) -> None:
    order = torch.tensor([3, 1, 4, 0, 2])
    assert (coupled(frames(5)[order]) - coupled(frames(5))[order]).abs().max() > 1e-3
    times = coupled.btadapter_time_embed.weight.clone()
    coupled.btadapter_time_embed.weight.zero_()
    try:
        close(coupled(frames(5)[order]), coupled(frames(5))[order])
    finally:
        coupled.btadapter_time_embed.weight.copy_(times)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_three_frames_are_read_as_the_reference_reads_them(number: int) -> None:
    video = frames(number)
    expected = video.transpose(0, 1) if number == 3 else video
    assert torch.equal(as_the_reference_reads(video), expected)


def test_the_branch_has_its_own_epsilon(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, btadapter=True, vision_config={"layer_norm_eps": 1e-3})
    tower = load_checkpoint(folder).skeleton().vision_tower.vision_model
    found: dict[bool, set[float]] = {True: set(), False: set()}
    for name, part in tower.named_modules():
        if isinstance(part, torch.nn.LayerNorm):
            found["btadapter" in name].add(part.eps)
    assert found == {True: {1e-5}, False: {1e-3}}
    assert any(isinstance(part, SpaceBlock) for part in tower.modules())
