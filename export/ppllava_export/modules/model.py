"""The whole checkpoint as one module: what is loaded, traced and compared against."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .alignment import Projector
from .config import ModelConfig, Window
from .tower import ClipVisionTower


class _VisionTower(nn.Module):
    """Holds the tower under the name that checkpoints give it."""

    def __init__(self, tower: ClipVisionTower) -> None:
        super().__init__()
        self.vision_model = tower


class PPLLaVA(nn.Module):
    """A PPLLaVA of the CLIP family; `state_dict` names are the checkpoint's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _VisionTower(ClipVisionTower(config.vision, config.feature_layer))
        self.multi_modal_projector = Projector(config)
        self.image_newline = nn.Parameter(torch.zeros(config.decoder_width))
        self.language_model = LlamaForCausalLM(LlamaConfig(**config.decoder))

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
        """Returns (pooled (N, D), relevance (T, h, w)) for question ids (1, n)."""
        projector = self.multi_modal_projector
        return projector.pool(
            keys,
            hidden,
            projector.text_embed(input_ids),
            self.config.grid,
            kernel or self.config.kernel,
            stride or self.config.stride,
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
