"""Frames → what is kept of them: the tower runs, and its outputs are stored in their last form."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Manifest
from ppllava_engines.engine import Array, Engine
from ppllava_engines.errors import UsageError
from ppllava_engines.memory_layout import MemoryLayout, to_int8
from ppllava_engines.tensorrt.device import DeviceArray
from ppllava_runtime.lane import Lane
from ppllava_runtime.window import Window

# More frames at once make no operator of a tower faster, and what decodes the next ones waits.
_MOST_FRAMES_PER_RUN = 4
# Where the system does not tell; of the devices this is made for, few have less.
_USUAL_CACHE_BYTES = 4 << 20
_NUM_COLOURS = 3


@dataclass(frozen=True)
class Record:
    """What is kept of the frames that were seen, in one of the forms of `MemoryLayout`.

    Attributes:
        layout: Which.
        arrays: By the layout's names; on the device of its engines. The first axis is T: frames of
            a video, views of a picture or pictures.
    """

    layout: MemoryLayout
    arrays: Mapping[str, Array]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def nbytes(self) -> int:
        """The size of all arrays, in bytes."""
        return sum(array.nbytes for array in self.arrays.values())

    def pool(
        self, text_embed: NDArray[Any], window: Window, pool: Engine, weigh: Engine | None
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """What a question makes of it: pooled (N,D) and relevance (T,h,w) float32.

        Args:
            text_embed: (1,P), the question.
            window: By which is pooled.
            pool: The engine of the layout's graph of that name.
            weigh: The same.
        """
        axes = {
            "kernel": np.array(window.kernel, np.int64),
            "stride": np.array(window.stride, np.int64),
        }
        if weigh is None:
            found = pool.run({**self.arrays, "text_embed": text_embed, **axes})
            return found["pooled"], found["relevance"]
        weighed = weigh.run({**self.arrays, "text_embed": text_embed})
        # Frames that are pooled together at a time: hidden of all of them would be what this kind
        # of memory does not keep. Where windows overlap in time, hidden is made more than once.
        kernel, stride = window.kernel[0], window.stride[0]
        tokens, weights = self.arrays["tokens"], weighed["weights"]
        parts = []
        for first in range(0, len(tokens) - kernel + 1, stride):
            frames = slice(first, first + kernel)
            found = pool.run({"tokens": tokens[frames], "weights": weights[frames], **axes})
            parts.append(found["pooled"])
        return np.concatenate(parts), weighed["relevance"]


class Recorder:
    """Runs the tower on some frames at a time and stores what comes out, row by row, in any order.

    Args:
        vision: The engine of the layout's vision graph.
        layout: What to keep.
        manifest: Of the bundle.
        num_rows: T, how many frames, views or pictures are kept.
        coupled: Whether they see each other: then one call of `encode` brings all of them.
        lane: Of the engine's device, where several threads may use it at once.
    """

    def __init__(
        self,
        vision: Engine,
        layout: MemoryLayout,
        manifest: Manifest,
        num_rows: int,
        coupled: bool,
        lane: Lane | None = None,
    ) -> None:
        self._vision = vision
        self._layout = layout
        self._coupled = coupled
        self._lane = lane or Lane()
        if coupled or manifest.model.frames_coupled:  # all, or none
            self._frames_per_run = num_rows if coupled else 1
        else:
            self._frames_per_run = frames_per_run(vision, manifest)
        # Filled in place: they may be hundreds of megabytes.
        self._arrays = {
            spec.name: vision.empty(spec.name, num_rows)
            if spec in vision.outputs
            else np.empty((num_rows, *map(int, spec.shape[1:])), spec.dtype)
            for spec in layout.arrays
        }

    @property
    def frames_per_run(self) -> int:
        """How many frames at a time are worth waiting for; all of those that see each other."""
        return self._frames_per_run

    def encode(self, rows: Sequence[int], pixel_values: NDArray[np.float32]) -> None:
        """Stores what the tower makes of frames.

        Args:
            rows: Where each goes, n of them.
            pixel_values: (n,3,S,S).

        Raises:
            UsageError: A value that is too large for float16, which names the memory that is not.
        """
        values = pixel_values.astype(self._vision.inputs[0].dtype, copy=False)
        if self._coupled and len(values) == _NUM_COLOURS:
            # Such a graph computes what the reference does, which takes the time of exactly three
            # frames for their colours. Swapped beforehand, they are seen as they are.
            values = np.ascontiguousarray(values.swapaxes(0, 1))
        step = self._frames_per_run
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            if self._is_on_device:
                self._keep(rows[part], values[part])
            else:
                self._store(rows[part], self._vision.run({"pixel_values": values[part]}))

    def repeat(self, row: int, rows: Sequence[int]) -> None:
        """Copies a row that is there into others."""
        for array in self._arrays.values():
            for other in rows:
                if isinstance(array, DeviceArray):
                    source, target = array[row : row + 1], array[other : other + 1]
                    with self._lane:
                        array.owner.device.copy(target.pointer, source.pointer, source.nbytes)
                else:
                    array[other] = array[row]

    def finish(self) -> Record:
        """What is kept, once every row is there; rows that come later change it."""
        return Record(self._layout, self._arrays)

    @property
    def _is_on_device(self) -> bool:
        return any(isinstance(array, DeviceArray) for array in self._arrays.values())

    def _keep(self, rows: Sequence[int], values: NDArray[Any]) -> None:
        """The device writes neighbouring rows at once, and no others."""
        for first, end in _neighbours(rows):
            target = slice(rows[first], rows[end - 1] + 1)
            keep = {name: array[target] for name, array in self._arrays.items()}
            self._vision.run({"pixel_values": values[first:end]}, keep)

    def _store(self, rows: Sequence[int], found: Mapping[str, NDArray[Any]]) -> None:
        places = list(rows)
        for name, values in found.items():
            target = np.asarray(self._arrays[name])
            if target.dtype == np.int8:
                for row, value in zip(places, values, strict=True):
                    target[row], np.asarray(self._arrays["scales"])[row] = to_int8(value)
                continue
            try:
                with np.errstate(over="raise"):
                    target[places] = values
            except FloatingPointError as error:
                raise UsageError(
                    f"vision: {name} goes up to {np.abs(values).max():.1e}, expected at most "
                    f"{np.finfo(target.dtype).max:.1e} of {target.dtype}: keep this video with "
                    "memory 'hidden-fp32'"
                ) from error


def frames_per_run(vision: Engine, manifest: Manifest) -> int:
    """How many frames that do not see each other are encoded at once.

    As many as leave what the widest point of a layer takes (its MLP: 4 times the width, beside its
    input and its output) in the last cache before memory, from 1 to 4. But one where linear layers
    are rounded by what each run brings: a frame is the same whichever others were chosen.
    """
    if manifest.precision.vision == "int8":
        return 1
    if "T" in vision.limits:  # for which the plan was tuned
        return vision.limits["T"]
    model = manifest.model
    floats = (math.prod(model.grid) + 1) * 6 * model.vision_width
    return max(1, min(_MOST_FRAMES_PER_RUN, _cache_bytes() // (4 * floats)))


def _cache_bytes() -> int:
    """The size of this CPU's last level of cache."""
    try:
        found = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (OSError, ValueError):
        found = 0
    return max(found, _USUAL_CACHE_BYTES)


def _neighbours(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields where rows that follow each other begin and end in `rows`."""
    for _, group in groupby(range(len(rows)), lambda place: rows[place] - place):
        places = list(group)
        yield places[0], places[-1] + 1
