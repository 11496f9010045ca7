"""Frames → the numbers that the vision tower was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pixel_values(
    frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.float32]:
    """(T,3,size,size) float32: frames resized to a square, scaled to [0,1], normalised per channel.

    Pixel for pixel what the published processor computes: PIL's bicubic filter, which averages when
    shrinking, on 8-bit values; the aspect ratio is not kept and nothing is cut off.

    Args:
        frames: (T,H,W,3) uint8 RGB, or T pictures (H,W,3) that differ in size.
        size: Side of the square, S.
        mean: Per RGB channel, of values in [0,1].
        std: The same.
    """
    return normalised([squared(frame, size) for frame in frames], mean, std)


def squared(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(size,size,3) uint8: a frame (H,W,3) resized as `pixel_values` says."""
    from PIL import Image

    resized = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def normalised(
    squares: Sequence[NDArray[np.uint8]], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """(T,3,S,S) float32: T ≥ 1 frames (S,S,3) uint8 with the values that `pixel_values` says."""
    # Only 256 values go in, so normalise those and look the rest up. Scaling in float64 and
    # rounding once to float32 is what the processor does, and decides the last bit.
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    table = (scaled[:, None] - np.array(mean, np.float32)) / np.array(std, np.float32)
    values = np.empty((len(squares), 3, *squares[0].shape[:2]), np.float32)
    for pixels, out in zip(squares, values, strict=True):
        for channel in range(3):
            out[channel] = table[pixels[..., channel], channel]
    return values
