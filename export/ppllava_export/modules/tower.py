"""The CLIP vision tower, only as deep as its features are needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import VisionConfig
from .encoder import Encoder


def layers_needed(num_hidden_layers: int, feature_layer: int) -> int:
    """Returns how many blocks `hidden_states[feature_layer]` depends on.

    `hidden_states` has one entry more than there are blocks: entry 0 is the embeddings.

    Raises:
        ValueError: The index is outside the hidden states.
    """
    entries = num_hidden_layers + 1
    if not -entries <= feature_layer < entries:
        raise ValueError(
            f"vision_feature_layer {feature_layer} is outside the {entries} hidden states"
        )
    return feature_layer % entries


class VisionEmbeddings(nn.Module):
    """Class token and patches, each with its learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.encoder.hidden_size
        h, w = config.grid
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(
            3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(h * w + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns embeddings (T, 1 + L, C) of pixel_values (T, 3, S, S)."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class ClipVisionTower(nn.Module):
    """CLIP's vision transformer up to the hidden state that PPLLaVA reads.

    The published checkpoints read `hidden_states[-2]`: the last block and the post-norm are
    never built. `pre_layrnorm` is spelt as in every CLIP checkpoint.
    """

    def __init__(self, config: VisionConfig, feature_layer: int = -2) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(
            config.encoder.hidden_size, eps=config.encoder.layer_norm_eps
        )
        self.encoder = Encoder(
            config.encoder, layers_needed(config.encoder.num_hidden_layers, feature_layer)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns patch tokens (T, L, C) in row-major order, without the class token.

        Args:
            pixel_values: Normalised frames (T, 3, S, S).
        """
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))[:, 1:]
