"""What may be kept of a video: the arrays of each kind of memory, and the graphs that serve it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import IncompatibleError, UsageError
from ppllava_engines.manifest import GraphSpec, Manifest, TensorSpec

MemoryKind = Literal["hidden", "hidden-fp32", "hidden-int8", "tokens"]
MEMORY_KINDS: tuple[MemoryKind, ...] = get_args(MemoryKind)

# Of memories that only a CPU has.
MEMORY_GRAPHS = ("pool_fp16", "pool_int8", "vision_tokens", "weigh_tokens", "pool_tokens")

_INT8_PEAK = 127
_RERUN = {
    "tokens": "text, distances, hidden of every token (linear_1), pooling, linear_2",
    "hidden": "text, distances, pooling, linear_2",
}


@dataclass(frozen=True)
class MemoryLayout:
    """One kind of memory, as a bundle fills and reads it.

    Attributes:
        kind: "hidden": keys and hidden in float16, on a GPU in the graph's own type; "hidden-fp32":
            both in float32; "hidden-int8": hidden in int8 with a scale per token; "tokens": the
            tower's tokens in float16 with a norm per token, from which the rest is made anew.
        arrays: What is kept; the first axis, "T", counts frames.
        vision: The graph that sees.
        pool: The graph that answers; of "tokens" once per group of frames.
        weigh: The graph that weighs all tokens beforehand; None where `pool` does that.
    """

    kind: MemoryKind
    arrays: tuple[TensorSpec, ...]
    vision: str
    pool: str
    weigh: str | None = None

    @staticmethod
    def of(manifest: Manifest, kind: MemoryKind, device: str = "cpu") -> MemoryLayout:
        """The layout of this kind in a bundle.

        Raises:
            IncompatibleError: The bundle has no graphs for it.
            UsageError: No such kind, one the device has not, or one that would keep nothing more.
        """
        if kind not in MEMORY_KINDS:
            raise UsageError(f"memory is {kind!r}, expected one of {', '.join(MEMORY_KINDS)}")
        if device == "tensorrt" and kind != "hidden":
            raise UsageError(
                f"memory is {kind!r}, but a GPU keeps 'hidden' in its graphs' own type: leave it "
                "out, or use device 'cpu'"
            )
        dtype = manifest.precision.dtype
        if kind == "hidden-fp32" and dtype == "fp16":
            raise UsageError(
                "memory is 'hidden-fp32', but the bundle computes in float16, of which 'hidden' "
                "loses nothing: use that"
            )
        vision, weigh, pool = "vision", None, "pool"
        if kind == "tokens":
            vision, weigh, pool = "vision_tokens", "weigh_tokens", "pool_tokens"
        elif kind == "hidden-int8":
            pool = "pool_int8"
        elif kind == "hidden" and dtype == "fp32" and device != "tensorrt":
            pool = "pool_fp16"
        for name in (vision, pool, *([weigh] if weigh else [])):
            if name not in manifest.graphs:
                raise IncompatibleError(
                    f"model {manifest.model.name}: the bundle has no graph {name!r}, which memory "
                    f"{kind!r} needs: export the checkpoint again, or choose another memory"
                )
        native = kind == "hidden-fp32" or device == "tensorrt"
        arrays = _arrays(manifest.graphs[vision], kind, native)
        return MemoryLayout(kind, arrays, vision, pool, weigh)

    def num_bytes(self, frames: int) -> int:
        """The size of what is kept of so many frames."""
        return frames * sum(
            math.prod(axis for axis in spec.shape if isinstance(axis, int))
            * np.dtype(spec.dtype).itemsize
            for spec in self.arrays
        )

    @property
    def rerun(self) -> str:
        """What each question runs again, in a few words."""
        return _RERUN["tokens" if self.kind == "tokens" else "hidden"]


def to_int8(hidden: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 (...,D) from -127 to 127 and the scale of each token (...): their product is `hidden`.

    Rounded, by half a step at most.
    """
    wide = hidden.astype(np.float32, copy=False)
    scales = np.abs(wide).max(axis=-1) / np.float32(_INT8_PEAK)
    steps = wide / np.where(scales > 0, scales, 1)[..., None]
    # A scale so small that it is not exact itself could lead beyond the peak.
    return np.clip(np.rint(steps), -_INT8_PEAK, _INT8_PEAK).astype(np.int8), scales


def _arrays(vision: GraphSpec, kind: MemoryKind, native: bool) -> tuple[TensorSpec, ...]:
    """What the graph gives, in the types in which it is kept."""
    if native:
        return vision.outputs
    types = {"keys": "float16", "hidden": "float16", "tokens": "float16", "norms": "float32"}
    if kind == "hidden-int8":
        types["hidden"] = "int8"
    arrays = [replace(spec, dtype=types[spec.name]) for spec in vision.outputs]
    if kind == "hidden-int8":
        hidden = next(spec for spec in arrays if spec.name == "hidden")
        arrays.append(TensorSpec("scales", "float32", hidden.shape[:2]))
    return tuple(arrays)
