"""Cases of strided weighted pooling, and what each must give: one table for every implementation.

The tolerance is relative to the window's sum of share x |hidden| in that column, which is what
rounding shares, products and sums scales with. For float16 and bfloat16 most of it is torch's and
the function body's: they round the shares to that type as well. The kernels round only the result,
and are held to that. int8 values stand for multiples of their token's scale; what comes out is
float32 then, as are all sums.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import product
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]
Triple = tuple[int, int, int]
Values = Literal["mixed", "peaked", "extreme", "zeros", "subnormal", "large"]

NUMPY: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
}
# A share times a scale is one more rounding of the sixteen that 1e-6 has room for.
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.5e-2, "int8": 1e-6}
# Half a unit in the last place, relative to the value that is rounded; of fp32 it is in the above.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 0.0}
# The smallest number above zero: below it, and in sums of such, rounding is no longer relative.
# Of int8 it is what a share times a scale is rounded to, 127 times that of a value.
SMALLEST = {
    "float32": 2.0**-149,
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
    "int8": 127 * 2.0**-149,
}
LARGEST = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}

HUGE = 2**62
GEOMETRIES: list[tuple[Triple, Triple, Triple, int]] = [  # size, kernel, stride, width
    ((4, 6, 6), (2, 3, 3), (2, 3, 3), 8),
    ((16, 3, 3), (2, 3, 3), (2, 3, 3), 3),
    ((5, 7, 8), (2, 3, 3), (2, 3, 3), 33),  # windows that do not divide the grid
    ((4, 6, 6), (2, 3, 3), (1, 1, 1), 5),  # that overlap
    ((4, 9, 2), (2, 9, 1), (2, 1, 1), 15),
    ((2, 4, 9), (1, 2, 2), (1, 4, 3), 7),  # that leave gaps
    ((6, 2, 2), (5, 1, 2), (3, 1, 4), 31),
    ((1, 6, 6), (1, 3, 3), (1, 3, 3), 16),  # one frame
    ((1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    ((3, 5, 7), (3, 5, 7), (1, 1, 1), 64),  # the whole grid
    ((8, 3, 3), (8, 1, 1), (1, 1, 1), 17),
    ((2, 16, 16), (2, 16, 16), (1, 1, 1), 24),  # more tokens than are summed at once
    ((1, 1, 300), (1, 1, 257), (1, 1, 40), 12),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1), 1027),  # wider than a slice, not a multiple of a vector
    ((2, 2, 2), (1, 2, 2), (1, 1, 1), 4099),
    ((2, 3, 4), (1, 1, 1), (HUGE, 1, HUGE), 9),
    ((2, 3, 4), (3, 1, 1), (1, 1, 1), 8),  # no window: the kernel is larger than the grid,
    ((2, 3, 4), (HUGE, HUGE, HUGE), (1, 1, 1), 4),
    ((3, 4, 5), (0, 1, 1), (1, 1, 1), 2),  # or there is no such kernel or stride
    ((3, 4, 5), (1, 1, 1), (1, 0, -1), 6),
]


@dataclass(frozen=True)
class PoolCase:
    """One pooling; `hidden` (T, h, w, D) and `weights` (T, h, w) are the same every time."""

    size: Triple
    kernel: Triple
    stride: Triple
    width: int
    dtype: str
    values: Values

    def __str__(self) -> str:
        axes = ("x".join(map(str, axes)) for axes in (self.size, self.kernel, self.stride))
        return "-".join((*axes, str(self.width), self.dtype, self.values))

    @property
    def temperature(self) -> float:
        """Its value in float32, which is what every implementation is given."""
        return 1.0 if self.values in ("zeros", "subnormal") else float(np.float32(0.01))

    @property
    def windows(self) -> Triple:
        """Windows along each axis."""
        fits = all(
            1 <= kernel <= size and stride >= 1
            for size, kernel, stride in zip(self.size, self.kernel, self.stride, strict=True)
        )
        frames, rows, columns = (
            (size - kernel) // stride + 1 if fits else 0
            for size, kernel, stride in zip(self.size, self.kernel, self.stride, strict=True)
        )
        return frames, rows, columns

    def arrays(self) -> tuple[Array, Array]:
        """Returns hidden, of this case's type, and weights, float32."""
        rng = np.random.default_rng(list(str(self).encode()))
        shape = (*self.size, self.width)
        hidden: Array = rng.standard_normal(shape)
        if self.dtype == "int8":
            hidden = rng.integers(-127, 128, shape)
        weights: Array = rng.dirichlet(np.ones(math.prod(self.size))).reshape(self.size)
        match self.values:
            case "peaked":
                weights = np.zeros(self.size)
                weights.flat[rng.integers(weights.size)] = 1
            case "extreme":
                weights = rng.choice([-3e30, -1.0, -0.0, 1e-40, 2.9e30, 3e30], self.size)
            case "zeros":
                hidden = rng.choice([-0.0, 0.0, 1.0], shape)
                weights = rng.choice([-0.0, 0.0], self.size)
            case "subnormal":
                if self.dtype != "int8":
                    hidden = rng.integers(-100, 100, shape) * SMALLEST[self.dtype]
                weights = rng.integers(0, 100, self.size) * 2.0**-149
            case "large":
                if self.dtype != "int8":
                    hidden = rng.uniform(-0.9, 0.9, shape) * LARGEST[self.dtype]
                weights = rng.uniform(0.9, 0.92, self.size)  # how scores round decides
        return hidden.astype(NUMPY[self.dtype]), weights.astype(np.float32)

    def scales(self) -> Array:
        """Returns what each token's values are multiplied by, float32 (T, h, w); of int8 only."""
        rng = np.random.default_rng([1, *str(self).encode()])
        match self.values:
            case "large":
                scales: Array = rng.uniform(-0.9, 0.9, self.size) * LARGEST["float32"] / 127
            case "subnormal":
                scales = rng.integers(-100, 100, self.size) * SMALLEST["float32"]
            case "zeros":
                scales = rng.choice([-0.0, 0.0, 1.0], self.size)
            case _:
                scales = rng.uniform(0, 0.05, self.size)
        return scales.astype(np.float32)

    @property
    def pooled_dtype(self) -> str:
        """What comes out."""
        return "float32" if self.dtype == "int8" else self.dtype

    def gathered(self, array: Array) -> Array:
        """Returns (N, tokens of a window, ...) of an array (T, h, w, ...)."""
        views = sliding_window_view(array, self.kernel, axis=(0, 1, 2))
        steps = tuple(slice(None, None, min(stride, 2**31)) for stride in self.stride)
        views = np.moveaxis(views[steps], (-3, -2, -1), (3, 4, 5))
        return views.reshape(math.prod(self.windows), math.prod(self.kernel), *array.shape[3:])

    def expected(self, *, rounds_shares: bool) -> tuple[Array, Array]:
        """Returns pooled (N, D) from a softmax and sums in double, and how far off it may be.

        Args:
            rounds_shares: Whether shares are rounded to the values' type, or the result alone.
        """
        if 0 in self.windows:
            return np.empty((0, self.width)), np.empty((0, self.width))
        hidden, weights = self.arrays()
        # Dividing by the temperature is fp32 by definition: the softmax magnifies its rounding.
        scores = self.gathered(weights / np.float32(self.temperature)).astype(np.float64)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        tokens = self.gathered(hidden).astype(np.float64)
        if self.dtype == "int8":
            tokens *= self.gathered(self.scales())[..., None]
        magnitude = np.einsum("nk,nkd->nd", shares, np.abs(tokens))
        smallest = SMALLEST["int8" if self.dtype == "int8" else "float32"]
        absolute = tokens.shape[1] * smallest + SMALLEST[self.dtype]
        pooled = np.einsum("nk,nkd->nd", shares, tokens)
        if rounds_shares:
            return pooled, TOLERANCE[self.dtype] * magnitude + absolute
        rounding = ROUNDING[self.dtype] * np.abs(pooled)
        return pooled, TOLERANCE["float32"] * magnitude + rounding + absolute

    def write(self, file: BinaryIO) -> None:
        """Writes the case as tests/native/pool_test.cpp reads it."""
        hidden, weights = self.arrays()
        axes = (*self.size, self.width, *self.kernel, *self.stride)
        file.write(struct.pack("=i10q", list(NUMPY).index(self.dtype), *axes))
        file.write(struct.pack("=fd", self.temperature, TOLERANCE[self.dtype]))
        file.write(hidden.astype(np.float32).tobytes() + weights.tobytes())
        if self.dtype == "int8":
            file.write(self.scales().tobytes())


CASES = [
    PoolCase(size, kernel, stride, width, dtype, values)
    for (size, kernel, stride, width), dtype, values in product(
        GEOMETRIES, NUMPY, ("mixed", "peaked", "extreme", "zeros", "subnormal", "large")
    )
]
