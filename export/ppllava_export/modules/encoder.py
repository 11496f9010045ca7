"""The pre-norm transformer encoder that every tower is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import EncoderConfig

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


def activation(name: str, x: Tensor) -> Tensor:
    """Returns `x` through the activation that configs call `name`.

    Raises:
        ValueError: `name` is none of ACTIVATIONS.
    """
    match name:
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "gelu":
            return F.gelu(x)
        case "gelu_pytorch_tanh":
            return F.gelu(x, approximate="tanh")
    raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(ACTIVATIONS)}")


class Attention(nn.Module):
    """Multi-head self-attention; scores and softmax are left to one fused operator."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Returns attended tokens (batch, length, width)."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers around the config's activation."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, length, width)."""
        return self.fc2(activation(self.hidden_act, self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Returns (batch, length, width)."""
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The first `num_layers` blocks of a published encoder."""

    def __init__(self, config: EncoderConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(num_layers))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Returns the hidden states after the last block built, (batch, length, width)."""
        for block in self.layers:
            x = block(x, causal)
        return x
