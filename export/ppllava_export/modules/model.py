"""The whole checkpoint as one module: what is loaded, traced and compared against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from .alignment import ClipProjector, Projector, SiglipProjector
from .bt_adapter import BTAdapterTower
from .config import ModelConfig, Window
from .tower import ClipVisionTower, SiglipVisionTower

VisionTower = ClipVisionTower | SiglipVisionTower
LanguageModel = LlamaForCausalLM | Qwen2ForCausalLM


class _VisionTower(nn.Module):
    """Holds the tower under the name that checkpoints give it."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.vision_model = tower


class PPLLaVA(nn.Module):
    """A PPLLaVA of any family; `state_dict` names are the checkpoint's."""

    multi_modal_projector: Projector

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _VisionTower(_vision_tower(config))
        siglip = config.family == "siglip"
        self.multi_modal_projector = SiglipProjector(config) if siglip else ClipProjector(config)
        self.image_newline = nn.Parameter(torch.zeros(config.decoder_width))
        self.language_model = language_model(config.decoder)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (keys (T, L, P), hidden (T, L, D)) of frames (T, 3, S, S)."""
        tokens = self.vision_tower.vision_model(pixel_values)
        return self.multi_modal_projector.keys(tokens), self.multi_modal_projector.hidden(tokens)

    def pool(
        self,
        keys: Tensor,
        hidden: Tensor,
        input_ids: Tensor,
        kernel: Window | None = None,
        stride: Window | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (pooled (N, D), relevance (T, h, w)) for question ids (1, n).

        The window is the checkpoint's for a video of so many frames unless it is given.
        """
        projector = self.multi_modal_projector
        own = self.config.window(keys.shape[0])
        return projector.pool(
            keys,
            hidden,
            projector.text_embed(input_ids),
            self.config.grid,
            kernel or own[0],
            stride or own[1],
        )

    def splice(self, input_ids: Tensor, pooled: Tensor) -> Tensor:
        """Returns prompt embeddings (1, n - 1 + N, D): pooled tokens replace the image token.

        Args:
            input_ids: Prompt ids (1, n) with exactly one image token.
            pooled: (N, D).
        """
        at = int((input_ids[0] == self.config.image_token_index).nonzero().item())
        embed = self.language_model.get_input_embeddings()
        before, after = embed(input_ids[:, :at]), embed(input_ids[:, at + 1 :])
        return torch.cat([before, pooled[None].to(before.dtype), after], dim=1)


def _vision_tower(config: ModelConfig) -> VisionTower:
    adapter = config.vision.btadapter
    if config.family == "siglip":
        return SiglipVisionTower(config.vision, config.trunk_blocks)
    if adapter is None or not config.frames_coupled:
        return ClipVisionTower(config.vision, config.trunk_blocks)
    return BTAdapterTower(config.vision, adapter, config.trunk_blocks, config.branch_blocks)


def language_model(decoder: Mapping[str, Any]) -> LanguageModel:
    """Returns the decoder that a config of `transformers`, resolved, describes."""
    if decoder["model_type"] == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**decoder))
    return LlamaForCausalLM(LlamaConfig(**decoder))
