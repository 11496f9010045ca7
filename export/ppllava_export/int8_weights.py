"""Weights of linear layers as int8 that no CPU's integer product overflows on.

x86 CPUs without VNNI multiply uint8 inputs by int8 weights and add each product to its neighbour's
in 16 bits: the first input's of a layer to the second's, the third's to the fourth's. Two weights
of 127 saturate there, and sums are off by any amount. So a step is chosen by pairs: no two weights
that are added so are more than 128 together, and 255 times that fits. Few pairs are both large, so
this costs little of the eight bits: where weights of 7 bits, which also fit, double the error of a
vision transformer, these raise it by a tenth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LEVELS = 127  # on either side of zero; -128 is left out, so that the range is symmetric


def column_steps(weight: Array) -> Array:
    """Returns the steps (N,) float32, one per output channel, that a weight (K, N) is rounded in.

    Magnitudes of rounded weights are at most 127, and those of rows 2i and 2i + 1 at most 128
    together. A column of zeros has the step 1/127.
    """
    sizes = np.abs(weight.astype(np.float32))
    pairs = sizes[::2]
    pairs[: len(sizes) // 2] += sizes[1::2]
    peaks = pairs.max(axis=0)  # rounding adds at most half a step to each of two
    steps: Array = np.where(peaks > 0, peaks, 1) / np.float32(LEVELS)
    return steps


def round_columns(weight: Array, steps: Array) -> Array:
    """Returns a weight (K, N) as int8 (K, N), in `steps` (N,) that are not below `column_steps`."""
    return np.rint(weight.astype(np.float32) / steps.astype(np.float32)).astype(np.int8)
