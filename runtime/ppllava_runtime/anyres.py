"""Stills at any resolution: one whole view and, from an enlarged copy, tiles side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Tiling:
    """How a picture becomes S×S views: the whole of it first, then its tiles row by row.

    This is LLaVA-NeXT's way, its rounding included. The picture is resized, its proportions kept,
    to fit into one of a few sizes that the model knows, and centred there on black.

    Attributes:
        picture: (height,width) of the picture, in pixels.
        canvas: The same of the size that its tiles cover; (0,0) when there is only the whole view.
        side: Of a view, S.
    """

    picture: Size
    canvas: Size
    side: int

    @staticmethod
    def of(picture: Size, pinpoints: Sequence[Size], side: int) -> Tiling:
        """The tiling of a picture: onto the size that keeps most of its pixels and wastes least.

        Args:
            picture: (height,width) in pixels, at least 1.
            pinpoints: The sizes to choose from, multiples of `side`; of equals the first is taken.
                None of them leaves the whole view alone.
            side: Of a view, S.
        """
        height, width = picture

        def merit(canvas: Size) -> tuple[int, int]:
            scale = min(canvas[1] / width, canvas[0] / height)
            kept = min(int(width * scale) * int(height * scale), height * width)
            return (kept, -(canvas[0] * canvas[1] - kept))

        return Tiling(picture, max(pinpoints, key=merit, default=(0, 0)), side)

    @property
    def grid(self) -> Size:
        """How many rows and columns of tiles there are."""
        return (self.canvas[0] // self.side, self.canvas[1] // self.side)

    @property
    def num_views(self) -> int:
        """The whole view and all tiles."""
        return 1 + math.prod(self.grid)

    def views(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(num_views,S,S,3) uint8: the picture (H,W,3) squashed to a square, then its tiles."""
        from PIL import Image

        image, side, bicubic = Image.fromarray(picture), self.side, Image.Resampling.BICUBIC
        views = np.zeros((self.num_views, side, side, 3), np.uint8)
        views[0] = np.asarray(image.resize((side, side), bicubic))
        rows, columns = self.grid
        if rows:
            (height, width), (tall, wide) = self._resized(), self.canvas
            canvas = np.zeros((tall, wide, 3), np.uint8)
            top, left = (tall - height) // 2, (wide - width) // 2
            resized = np.asarray(image.resize((width, height), bicubic))
            canvas[top : top + height, left : left + width] = resized
            tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
            views[1:] = tiles.reshape(-1, side, side, 3)
        return views

    def arranged(self, tiles: NDArray[Any]) -> NDArray[Any]:
        """(H',W',…): what was found in each tile, (rows·columns,h,w,…), side by side, unpadded."""
        rows, columns = self.grid
        _, h, w, *rest = tiles.shape
        whole = tiles.reshape(rows, columns, h, w, *rest).swapaxes(1, 2)
        whole = whole.reshape(rows * h, columns * w, *rest)
        top, left = self._padding(h, w)
        return whole[top : rows * h - top, left : columns * w - left]

    def assembled(self, pooled: NDArray[Any], newline: NDArray[Any]) -> NDArray[Any]:
        """(M,D): the embeddings of the views, (num_views,h,w,D), in the order of the prompt.

        The whole view comes first. A `newline` (D,) ends each row of the tiles; the whole view has
        none, unless it is alone: then one ends it.
        """
        whole = pooled[0].reshape(-1, pooled.shape[-1])
        if self.num_views == 1:
            return np.concatenate([whole, newline[None]])
        tiles = self.arranged(pooled[1:])
        ends = np.broadcast_to(newline, (len(tiles), 1, len(newline)))
        rows = np.concatenate([tiles, ends], axis=1)
        return np.concatenate([whole, rows.reshape(-1, len(newline))])

    def num_tokens(self, h: int, w: int) -> int:
        """M, the number of embeddings that `assembled` gives for views of h×w."""
        if self.num_views == 1:
            return h * w + 1
        rows, columns = self.grid[0] * h, self.grid[1] * w
        top, left = self._padding(h, w)
        return h * w + (rows - 2 * top) * (columns - 2 * left + 1)

    def _resized(self) -> Size:
        """(height,width) of the picture on the canvas, in pixels."""
        (height, width), (tall, wide) = self.picture, self.canvas
        if wide / width < tall / height:
            return (min(math.ceil(height * (wide / width)), tall), wide)
        return (tall, min(math.ceil(width * (tall / height)), wide))

    def _padding(self, h: int, w: int) -> Size:
        """Rows above and below, and columns left and right, to remove where a tile has h×w.

        The published model, which rounds like this, has as many rows as columns in a tile.
        """
        (height, width), (rows, columns) = self.picture, self.grid
        if width / height > columns / rows:
            kept = int(round(height * (columns * w / width) * (h / w), 7))
            return ((rows * h - kept) // 2, 0)
        kept = int(round(width * (rows * h / height) * (w / h), 7))
        return (0, (columns * w - kept) // 2)
