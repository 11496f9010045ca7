"""What was seen: all that later questions need, so that no frame is encoded twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import ModelSpec
from ppllava_engines.engine import Array
from ppllava_runtime.anyres import Tiling
from ppllava_runtime.recorder import Record
from ppllava_runtime.window import (
    Axes,
    Window,
    choose_pictures_window,
    choose_tile_window,
    choose_window,
)

Kind = Literal["video", "image", "images"]

THUMBNAIL_SIDE = 480


@dataclass(frozen=True)
class Memory:
    """A video, a picture or several as the model remembers them.

    Attributes:
        kind: Which of these; None is nothing at all.
        record: What questions are compared with, and what is pooled; None of nothing.
        grid: Patches (h,w) of a frame; L = h·w.
        timestamps: (T,) float64, seconds since the first frame of the file; 0 of pictures.
        thumbnails: The frames or pictures (H,W,3) uint8 RGB at no more than 480 pixels a side, for
            people.
        tiling: How a picture was cut into views; None where nothing was.
    """

    kind: Kind | None
    record: Record | None
    grid: tuple[int, int]
    timestamps: NDArray[np.float64]
    thumbnails: tuple[NDArray[np.uint8], ...]
    tiling: Tiling | None = None

    @staticmethod
    def of_nothing(model: ModelSpec) -> Memory:
        """The memory of having seen nothing: of no frames."""
        return Memory(None, None, model.grid, np.empty(0), ())

    @property
    def arrays(self) -> Mapping[str, Array]:
        """What is kept by name, see `MemoryLayout`; the first axis is T."""
        return {} if self.record is None else self.record.arrays

    @property
    def nbytes(self) -> int:
        """The size of what is kept, thumbnails included, in bytes."""
        seen = 0 if self.record is None else self.record.nbytes
        # Frames that repeat show one and the same.
        return seen + sum({id(small): small.nbytes for small in self.thumbnails}.values())

    @property
    def size(self) -> Axes:
        """The number of tokens per axis: (T,h,w); T counts frames, views or pictures."""
        return (0 if self.record is None else len(self.record), *self.grid)

    @property
    def captions(self) -> list[str]:
        """A few words under each thumbnail."""
        if self.kind == "video":
            return [_clock(seconds) for seconds in self.timestamps]
        count = len(self.thumbnails)
        return [f"picture {i + 1}" if count > 1 else "" for i in range(count)]

    def window(
        self,
        model: ModelSpec,
        kernel: Axes | None = None,
        stride: Axes | None = None,
        num_tokens: int | None = None,
    ) -> Window:
        """The pooling window that a caller asked for, or the model's own for this kind.

        The views of one picture have no order in time: nothing is pooled over them.

        Raises:
            UsageError: See `choose_window`, `choose_pictures_window` and `choose_tile_window`.
        """
        asked = (kernel, stride, num_tokens)
        own = Window(model.image_kernel, model.image_stride)
        if self.tiling is not None:
            return choose_tile_window(self.tiling, self.grid, own, *asked)
        if self.kind == "images":
            return choose_pictures_window(self.size, own, *asked)
        if self.kind == "video":
            own = Window(*model.video_window(self.size))
        return choose_window(self.size, own, *asked)

    def num_places(self, window: Window) -> int:
        """How many places of a prompt take what was pooled: one per picture that stays apart."""
        if self.kind == "images":
            return self.size[0] if window.kernel[0] == window.stride[0] == 1 else 1
        return 0 if self.kind is None else 1

    def splices(
        self, pooled: NDArray[Any], window: Window, newline: NDArray[Any] | None
    ) -> list[NDArray[Any]]:
        """What goes into each place of the prompt, (n,D) each.

        Args:
            pooled: (N,D), all windows of all frames.
            window: By which they were pooled.
            newline: (D,), between the rows of a picture's tiles.
        """
        if self.tiling is not None and newline is not None:
            _, h, w = window.output(self.size)
            return [self.tiling.assembled(pooled.reshape(self.size[0], h, w, -1), newline)]
        return np.split(pooled, self.num_places(window))

    def maps(self, relevance: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The relevance (h,w) over each thumbnail; of a picture in tiles, the finer one of these.

        Args:
            relevance: (T,h,w), of every frame or view.
        """
        if self.tiling is not None and self.tiling.num_views > 1:
            fine = self.tiling.arranged(relevance[1:])
            return [fine if fine.size else relevance[0]]
        return list(relevance)


def thumbnails(pictures: Iterable[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], ...]:
    """The pictures (H,W,3) uint8, shrunk to 480 pixels on the longer side if they are larger."""
    from PIL import Image

    smaller = []
    for picture in pictures:
        height, width, _ = picture.shape
        scale = THUMBNAIL_SIDE / max(height, width)
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            shrunk = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
            smaller.append(np.asarray(shrunk))
        else:
            smaller.append(picture)
    return tuple(smaller)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(float(seconds) * 100), 6000)
    return f"{minutes}:{rest / 100:05.2f}"
