"""The vision towers, only as deep as their features are needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import VisionConfig
from .encoder import Encoder


class ClipVisionEmbeddings(nn.Module):
    """Class token and patches, each with its learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        h, w = config.grid
        self.class_embedding = nn.Parameter(torch.zeros(config.encoder.hidden_size))
        self.patch_embedding = _patch_embedding(config, bias=False)
        self.position_embedding = nn.Embedding(h * w + 1, config.encoder.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns embeddings (T, 1 + L, C) of pixel_values (T, 3, S, S)."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches], dim=1)
        return tokens + self.position_embedding.weight.to(tokens.dtype)


class ClipVisionTower(nn.Module):
    """CLIP's vision transformer up to the hidden state that PPLLaVA reads.

    The published checkpoints read `hidden_states[-2]`: the last block and the post-norm are
    never built. `pre_layrnorm` is spelt as in every CLIP checkpoint.
    """

    def __init__(self, config: VisionConfig, num_layers: int) -> None:
        super().__init__()
        self.embeddings = ClipVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(
            config.encoder.hidden_size, eps=config.encoder.layer_norm_eps
        )
        self.encoder = Encoder(config.encoder, num_layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns patch tokens (T, L, C) in row-major order, without the class token.

        Args:
            pixel_values: Normalised frames (T, 3, S, S).
        """
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))[:, 1:]


class SiglipVisionEmbeddings(nn.Module):
    """Patches with their learned positions; there is no class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        h, w = config.grid
        self.patch_embedding = _patch_embedding(config, bias=True)
        self.position_embedding = nn.Embedding(h * w, config.encoder.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns embeddings (T, L, C) of pixel_values (T, 3, S, S)."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight.to(patches.dtype)


class SiglipVisionTower(nn.Module):
    """SigLIP's vision transformer up to the hidden state that PPLLaVA reads.

    The published checkpoints read `hidden_states[-1]`, which precedes the post-norm: that norm and
    the pooling head belong to the alignment (`SiglipProjector`).
    """

    def __init__(self, config: VisionConfig, num_layers: int) -> None:
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = Encoder(config.encoder, num_layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns patch tokens (T, L, C) in row-major order.

        Args:
            pixel_values: Normalised frames (T, 3, S, S).
        """
        return self.encoder(self.embeddings(pixel_values))


def _patch_embedding(config: VisionConfig, bias: bool) -> nn.Conv2d:
    size = config.patch_size
    return nn.Conv2d(3, config.encoder.hidden_size, kernel_size=size, stride=size, bias=bias)
