"""Strided weighted pooling: the reference arithmetic of prompt-guided pooling, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Window


def token_weights(relevance: Tensor, logit_scale: Tensor) -> Tensor:
    """Returns softmax weights (..., T, h, w) over ALL tokens of one relevance map.

    SigLIP's logit_bias is left out: it is the same for every token, so that no softmax sees it.

    Args:
        relevance: Cosines in [-1, 1], (..., T, h, w).
        logit_scale: One number; the logarithm of the learned inverse temperature.
    """
    logits = relevance.float() * logit_scale.float().exp()
    return logits.flatten(-3).softmax(-1).view(relevance.shape)


def strided_weighted_pool(
    values: Tensor, weights: Tensor, kernel: Window, stride: Window, temperature: float
) -> Tensor:
    """Returns pooled values (..., N, D), windows in (T, h, w) order, rows first.

    Per window: a = softmax(weights / temperature), out = sum_i a_i * values_i. Windows that
    do not fit are dropped: floor((I - k) / s) + 1 per axis.

    Args:
        values: (..., T, h, w, D).
        weights: (..., T, h, w), fp32, from `token_weights`.
        kernel: Window extents.
        stride: Window steps.
        temperature: tau, > 0.

    Raises:
        ValueError: The kernel is larger than the grid on some axis.
    """
    size = weights.shape[-3:]
    if any(k > i for k, i in zip(kernel, size, strict=True)):
        raise ValueError(f"kernel {kernel} does not fit into {tuple(size)} tokens")
    for axis in range(3):
        # unfold appends the window's extent, so the next axis is at the same negative index
        weights = weights.unfold(-3, kernel[axis], stride[axis])
        values = values.unfold(-4, kernel[axis], stride[axis])
    shares = (weights.flatten(-3) / temperature).softmax(-1).to(values.dtype)
    # values: (..., nT, nh, nw, D, kt, kh, kw); shares: (..., nT, nh, nw, kt*kh*kw)
    pooled = torch.matmul(values.flatten(-3), shares.unsqueeze(-1)).squeeze(-1)
    return pooled.flatten(-4, -2)
