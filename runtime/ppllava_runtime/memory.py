"""What was seen: all that later questions need, so that no frame is encoded twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.engine import Engine

# Enough frames at a time to keep the cores busy, few enough to keep the activations small.
_FRAMES_PER_RUN = 4
_THUMBNAIL_SIDE = 480


@dataclass(frozen=True)
class Memory:
    """A video as the model remembers it.

    Attributes:
        keys: (T,L,P), what a question is compared with; float32 or float16 as the bundle.
        hidden: (T,L,D), what is pooled; the same dtype.
        grid: Patches (h,w) of a frame; L = h·w.
        timestamps: (T,) float64, seconds since the first frame of the file.
        thumbnails: (T,H,W,3) uint8 RGB, the frames at no more than 480 pixels a side, for people.
    """

    keys: NDArray[Any]
    hidden: NDArray[Any]
    grid: tuple[int, int]
    timestamps: NDArray[np.float64]
    thumbnails: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, int, int]:
        """The number of tokens per axis: (T,h,w)."""
        return (len(self.keys), *self.grid)


def encode(
    vision: Engine,
    pixel_values: NDArray[np.float32],
    frames_coupled: bool,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Keys (T,L,P) and hidden (T,L,D) of all frames.

    Args:
        vision: The engine of the vision graph.
        pixel_values: (T,3,S,S).
        frames_coupled: Whether frames see each other, and so must go in together.
        progress: Called with the number of frames done and T, before the first and after each run.
    """
    num_frames = len(pixel_values)
    values = pixel_values.astype(vision.inputs[0].dtype, copy=False)
    whole: dict[str, NDArray[Any]] = {}
    step = num_frames if frames_coupled else _FRAMES_PER_RUN
    for first in range(0, num_frames, step):
        if progress:
            progress(first, num_frames)
        for name, part in vision.run({"pixel_values": values[first : first + step]}).items():
            if name not in whole:  # filled in place: hidden may be hundreds of megabytes
                whole[name] = np.empty((num_frames, *part.shape[1:]), part.dtype)
            whole[name][first : first + step] = part
    if progress:
        progress(num_frames, num_frames)
    return whole["keys"], whole["hidden"]


def thumbnails(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(T,h,w,3) uint8: the frames, shrunk to 480 pixels on the longer side if they are larger."""
    from PIL import Image

    _, height, width, _ = frames.shape
    scale = _THUMBNAIL_SIDE / max(height, width)
    if scale >= 1:
        return frames
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smaller = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames)
    return np.stack([np.asarray(picture) for picture in smaller])
