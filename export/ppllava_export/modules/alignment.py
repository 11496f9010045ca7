"""Vision-prompt alignment and the projector around the pooling (paper: fine-grained alignment)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig, Window
from .pooling import strided_weighted_pool, token_weights
from .text import ClipTextTower


class Projector(nn.Module):
    """`multi_modal_projector`: keys, question embedding, relevance and the two linear layers.

    Everything before the question (`keys`, `hidden`) is separate from everything after it
    (`text_embed`, `pool`), because a video is encoded once and asked many times.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, d, p = config.vision.encoder.hidden_size, config.decoder_width, config.projection_dim
        self.temperature = config.temperature
        self.linear_1 = nn.Linear(c, d)
        self.linear_2 = nn.Linear(d, d)
        self.clip_text_model = ClipTextTower(config.text)
        self.clip_text_projection = nn.Linear(config.text.encoder.hidden_size, p, bias=False)
        self.clip_visual_ln = nn.LayerNorm(c, eps=config.vision.encoder.layer_norm_eps)
        self.clip_visual_projection = nn.Linear(c, p, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def keys(self, tokens: Tensor) -> Tensor:
        """Returns unit-length keys (T, L, P) of patch tokens (T, L, C)."""
        return F.normalize(self.clip_visual_projection(self.clip_visual_ln(tokens)), dim=-1)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Returns gelu(linear_1(tokens)), (T, L, D): all of the projector that precedes pooling."""
        return F.gelu(self.linear_1(tokens))

    def text_embed(self, input_ids: Tensor) -> Tensor:
        """Returns the unit-length embedding (batch, P) of question ids (batch, n)."""
        return F.normalize(self.clip_text_projection(self.clip_text_model(input_ids)), dim=-1)

    def pool(
        self,
        keys: Tensor,
        hidden: Tensor,
        text_embed: Tensor,
        grid: tuple[int, int],
        kernel: Window,
        stride: Window,
    ) -> tuple[Tensor, Tensor]:
        """Returns pooled tokens (N, D) and the relevance map (T, h, w) in [-1, 1].

        linear_2 runs on pooled tokens only: a window's shares sum to one, so it commutes.

        Args:
            keys: (T, L, P).
            hidden: (T, L, D).
            text_embed: (1, P).
            grid: (h, w), L = h * w.
            kernel: Window extents over (T, h, w).
            stride: Window steps.
        """
        frames = keys.shape[0]
        relevance = (keys @ text_embed[0]).view(frames, *grid)
        pooled = strided_weighted_pool(
            hidden.view(frames, *grid, -1),
            token_weights(relevance, self.logit_scale),
            kernel,
            stride,
            self.temperature,
        )
        return self.linear_2(pooled), relevance
