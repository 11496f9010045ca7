"""Floats → int8 or int4 in blocks along the input channels, symmetric, one scale per block."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Quantization = Literal["int8", "int4"]
Bits = Literal[4, 8]

# ONNX Runtime runs blocks of any power of two from 16 on as weight-only products. Longer blocks
# than these save little (a scale is 2 or 4 bytes); int4 loses more with each channel in a block.
_BLOCKS = {8: 128, 4: 32}
_LEAST_BLOCK = 16
# Where the largest magnitude of an int4 block may land. Past 7 or 8 it is clipped, which the many
# small weights repay: against 7 alone the error of Gaussian weights falls from 0.097 to 0.087 and
# SmolLM2's perplexity from 31.8 to 26.1 (examples/smollm2). Six times the candidates: 0.086, 26.8.
_PEAKS = (7.0, 7.6, 8.3, 9.0)


def block_size(channels: int, bits: Bits) -> int | None:
    """Returns how many of so many input channels share a scale, None if no block fits.

    It is the largest power of two from 16 on that divides `channels`, and at most 128 for int8 and
    32 for int4.
    """
    block = _BLOCKS[bits]
    while channels % block:
        block //= 2
    return block if block >= _LEAST_BLOCK else None


def quantize(
    blocks: NDArray[np.float32], bits: Bits, scale_dtype: np.dtype[Any]
) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Returns integers like `blocks` and their scales, whose product comes close to `blocks`.

    Args:
        blocks: (num_blocks, block, N), finite; each column of a block gets a scale of its own.
        bits: 8: integers in [-127, 127]. 4: in [-8, 7], of least squared error among a few scales.
        scale_dtype: Float type of the scales (num_blocks, N), all of them positive; the integers
            are chosen for the scales as rounded to it.
    """
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    scales = peak / np.float32(127) if bits == 8 else _least_squares(blocks, peak)
    # Zeros need a scale as well: TensorRT takes none that is not positive.
    least = np.finfo(np.float16 if scale_dtype == np.float16 else np.float32).tiny  # also bfloat16
    rounded = np.maximum(scales, least).astype(scale_dtype)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    integers = blocks / rounded.astype(np.float32)
    np.rint(integers, out=integers)
    np.clip(integers, low, high, out=integers)
    return integers.astype(np.int8), rounded[:, 0]


def pack_int4(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Returns rows (K, N), N even, as ONNX stores int4: two in a byte, the first one lower."""
    nibbles = integers.view(np.uint8)
    low, high = nibbles[:, 0::2] & np.uint8(0xF), nibbles[:, 1::2] << np.uint8(4)
    packed: NDArray[np.uint8] = low | high
    return packed


def _least_squares(blocks: NDArray[np.float32], peak: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the best scales (num_blocks, 1, N) found for int4.

    Given the integers q of any scale, s = w·q / q·q is the best scale for them, and leaves the
    squared error w·w - s (w·q). So each candidate is judged by s (w·q).
    """
    peak = np.maximum(peak, np.float32(1e-30))  # of nothing but zeros, any scale is as good
    integers, product = np.empty_like(blocks), np.empty_like(blocks)
    best = scales = np.zeros_like(peak)
    for at in _PEAKS:
        np.multiply(blocks, np.float32(at) / peak, out=integers)
        np.rint(integers, out=integers)
        np.clip(integers, -8, 7, out=integers)
        along = np.multiply(blocks, integers, out=product).sum(axis=1, keepdims=True)
        norm = np.multiply(integers, integers, out=product).sum(axis=1, keepdims=True)
        scale = along / np.maximum(norm, 1)
        gain = scale * along
        better = gain > best
        best, scales = np.where(better, gain, best), np.where(better, scale, scales)
    return scales
