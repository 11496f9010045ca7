"""The graphs that serve other memories of a video, on samples of their export.

What such a memory keeps is made of the samples here, by the rounding that the runtime does; what
its graphs then give is compared with torch, which kept everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.memory_layout import to_int8

if TYPE_CHECKING:
    from ppllava_engines.bundle import ModelSpec
    from ppllava_engines.samples import Samples

Array = NDArray[Any]
Run = Callable[..., dict[str, Array]]

MEMORY_STAGES = (
    "pooled_fp16",
    "pooled_int8",
    "tokens",
    "norms",
    "relevance_tokens",
    "pooled_tokens",
)


def replay_memories(
    run: Run, samples: Samples, model: ModelSpec, graphs: Collection[str], dtype: str
) -> Iterator[tuple[str, Array, Array]]:
    """Yields (stage, what the graphs give, what torch gave), in the order of MEMORY_STAGES.

    Args:
        run: Name of a graph and its inputs by name → its outputs.
        samples: Of the same export.
        model: Says how frames are normalised, and whether they see each other.
        graphs: Those that the bundle has; stages of others are left out.
        dtype: Of pixel_values.
    """
    window = {"kernel": samples.kernel, "stride": samples.stride}
    asked = {"text_embed": samples.text_embed, **window}
    keys, hidden = (array.astype(np.float16) for array in (samples.keys, samples.hidden))
    if "pool_fp16" in graphs:
        got = run("pool_fp16", keys=keys, hidden=hidden, **asked)
        yield "pooled_fp16", got["pooled"], samples.pooled
    if "pool_int8" in graphs:
        rounded, scales = to_int8(samples.hidden)
        got = run("pool_int8", keys=keys, hidden=rounded, scales=scales, **asked)
        yield "pooled_int8", got["pooled"], samples.pooled
    if "vision_tokens" in graphs:
        # The tower was run already: one frame shows that this one is the same.
        num_frames = len(samples.frames) if model.frames_coupled else 1
        pixels = samples.pixel_values(model, dtype)[:num_frames]
        got = run("vision_tokens", pixel_values=pixels)
        yield "tokens", got["tokens"], samples.tokens[:num_frames]
        yield "norms", got["norms"], samples.norms[:num_frames]
    if "weigh_tokens" in graphs:
        kept = {"tokens": samples.tokens, "norms": samples.norms}
        weighed = run("weigh_tokens", text_embed=samples.text_embed, **kept)
        yield "relevance_tokens", weighed["relevance"], samples.relevance
        pooled = []
        for first in range(0, len(samples.tokens) - samples.kernel[0] + 1, samples.stride[0]):
            frames = slice(first, first + samples.kernel[0])
            group = {"tokens": samples.tokens[frames], "weights": weighed["weights"][frames]}
            pooled.append(run("pool_tokens", **group, **window)["pooled"])
        yield "pooled_tokens", np.concatenate(pooled), samples.pooled
