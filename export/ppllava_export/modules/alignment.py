"""Vision-prompt alignment and the projector around the pooling (paper: fine-grained alignment)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import EncoderConfig, ModelConfig, Window
from .encoder import FeedForward
from .pooling import strided_weighted_pool, token_weights
from .text import ClipTextTower, SiglipTextTower, TextTower


class Projector(nn.Module, ABC):
    """`multi_modal_projector`: keys, question embedding, relevance and the two linear layers.

    Everything before the question (`keys`, `hidden`) is separate from everything after it
    (`text_embed`, `pool`), because a video is encoded once and asked many times.
    """

    clip_text_model: TextTower
    logit_scale: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, d = config.vision.encoder.hidden_size, config.decoder_width
        self.projection_dim = config.projection_dim
        self.temperature = config.temperature
        self.linear_1 = nn.Linear(c, d)
        self.linear_2 = nn.Linear(d, d)
        head = config.visual_head or config.vision.encoder
        self.clip_visual_ln = nn.LayerNorm(c, eps=head.layer_norm_eps)

    @abstractmethod
    def aligned_tokens(self, tokens: Tensor) -> Tensor:
        """Returns patch tokens (T, L, C) in the space they share with questions, (T, L, P)."""

    @abstractmethod
    def aligned_text(self, input_ids: Tensor) -> Tensor:
        """Returns questions (batch, n) in the space they share with patches, (batch, P)."""

    def keys(self, tokens: Tensor) -> Tensor:
        """Returns unit-length keys (T, L, P) of patch tokens (T, L, C)."""
        return F.normalize(self.aligned_tokens(tokens), dim=-1)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Returns gelu(linear_1(tokens)), (T, L, D): all of the projector that precedes pooling."""
        return F.gelu(self.linear_1(tokens))

    def text_embed(self, input_ids: Tensor) -> Tensor:
        """Returns the unit-length embedding (batch, P) of question ids (batch, n)."""
        return F.normalize(self.aligned_text(input_ids), dim=-1)

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


class ClipProjector(Projector):
    """The projector of the CLIP family: both towers end in a linear projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        c, p = config.vision.encoder.hidden_size, config.projection_dim
        self.clip_text_model = ClipTextTower(config.text)
        self.clip_text_projection = nn.Linear(config.text.encoder.hidden_size, p, bias=False)
        self.clip_visual_projection = nn.Linear(c, p, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def aligned_tokens(self, tokens: Tensor) -> Tensor:
        """Returns (T, L, P)."""
        return self.clip_visual_projection(self.clip_visual_ln(tokens))

    def aligned_text(self, input_ids: Tensor) -> Tensor:
        """Returns (batch, P)."""
        return self.clip_text_projection(self.clip_text_model(input_ids))


class _Values(nn.Module):
    """The value projection of a packed attention, whose query and key parts nothing reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., width)."""
        packed = 2 * x.shape[-1]
        return F.linear(x, self.in_proj_weight[packed:], self.in_proj_bias[packed:])


class ValueHead(nn.Module):
    """SigLIP's attention pooling head, of which only what a token contributes is computed."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = _Values(config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns (T, L, C)."""
        values = self.attention(tokens)
        return values + self.mlp(self.layernorm(values))


class SiglipProjector(Projector):
    """The projector of the SigLIP family: both towers end in a head, and P is C."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.clip_text_model = SiglipTextTower(config.text, config.projection_dim)
        self.clip_visual_head = ValueHead(config.visual_head or config.vision.encoder)
        self.logit_scale = nn.Parameter(torch.zeros(1))

    def aligned_tokens(self, tokens: Tensor) -> Tensor:
        """Returns (T, L, P)."""
        return self.clip_visual_head(self.clip_visual_ln(tokens))

    def aligned_text(self, input_ids: Tensor) -> Tensor:
        """Returns (batch, P)."""
        return self.clip_text_model(input_ids)
