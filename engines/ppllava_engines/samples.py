"""What torch was given and what it answered, in a file that any backend can replay.

What is stored was rounded to the graphs' own types, see `parity`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ppllava_engines.errors import DataError

if TYPE_CHECKING:
    from ppllava_engines.bundle import ModelSpec

Array = NDArray[Any]

SAMPLES = "samples.npz"


@dataclass(frozen=True)
class Samples:
    """What torch was given, and what it answered.

    Attributes:
        frames: (T, S, S, 3) uint8, already of the model's size.
        text_ids: (1, n) int64, the question for the text tower.
        prompt_before, prompt_after: (n,) int64, the decoder's ids around the pooled tokens.
        kernel, stride: (3,) int64, of the pooling.
        keys, hidden, text_embed, pooled: (T, L, P), (T, L, D), (1, P), (N, D), of the graphs' type.
        tokens: (T, L, C) float16, what keys and hidden are made of.
        norms: (T, L) float32, of each token the length of its key before it is made one.
        relevance: (T, h, w) float32.
        logits: (1, V) float32, of the prompt's last position.
        gain: () float32, by how much the pooling magnifies an error of the relevance:
            exp(logit_scale) / temperature x the largest weight of a token.
    """

    frames: Array
    text_ids: Array
    prompt_before: Array
    prompt_after: Array
    kernel: Array
    stride: Array
    tokens: Array
    norms: Array
    keys: Array
    hidden: Array
    text_embed: Array
    pooled: Array
    relevance: Array
    logits: Array
    gain: Array

    def pixel_values(self, model: ModelSpec, dtype: DTypeLike) -> Array:
        """Returns the frames as the vision graph takes them, (T, 3, S, S) of `dtype`."""
        return pixel_values(self.frames, model.image_mean, model.image_std, dtype)

    def write(self, path: Path) -> None:
        """Writes the file `path`, the same bytes for the same samples."""
        fields = dataclasses.fields(self)
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields})

    @staticmethod
    def read(path: Path) -> Samples:
        """Returns the samples in the file `path`.

        Raises:
            DataError: They are not whole, or not of the types that samples have.
        """
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                samples = Samples(**{name: np.asarray(arrays[name]) for name in arrays})
        except Exception as error:  # numpy and zipfile that are fed anything raise anything
            raise DataError(
                f"{path}: not the samples of an export, export the checkpoint again: {error}"
            ) from error
        for name, (kinds, num_axes) in _FIELDS.items():
            array = getattr(samples, name)
            if str(array.dtype) not in kinds or array.ndim != num_axes:
                raise DataError(
                    f"{path}: {name} is {array.dtype} of {array.ndim} axes, expected "
                    f"{' or '.join(kinds)} of {num_axes}: export the checkpoint again"
                )
        return samples


_FLOATS = ("float32", "float16")
_FIELDS: dict[str, tuple[tuple[str, ...], int]] = {
    "frames": (("uint8",), 4),
    "text_ids": (("int64",), 2),
    "prompt_before": (("int64",), 1),
    "prompt_after": (("int64",), 1),
    "kernel": (("int64",), 1),
    "stride": (("int64",), 1),
    "tokens": (("float16",), 3),
    "norms": (("float32",), 2),
    "keys": (_FLOATS, 3),
    "hidden": (_FLOATS, 3),
    "text_embed": (_FLOATS, 2),
    "pooled": (_FLOATS, 2),
    "relevance": (("float32",), 3),
    "logits": (("float32",), 2),
    "gain": (("float32",), 0),
}


def pixel_values(
    frames: Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: DTypeLike
) -> Array:
    """Returns uint8 frames (T, S, S, 3) normalised as (T, 3, S, S) of `dtype`."""
    scaled: Array = frames.astype(np.float32) / np.float32(255)
    values: Array = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2)).astype(dtype)


def prompt_embeds(
    table: Path, max_positions: int, before: Array, pooled: Array, after: Array
) -> Array:
    """Returns a prompt (1, n, D) of the type of the embeddings, its end if it is too long.

    Args:
        table: The decoder's embeddings, .npy (V, D).
        max_positions: The largest n.
        before: Ids (n,) before the pooled tokens.
        pooled: (N, D).
        after: Ids (n,) after them.

    Raises:
        DataError: An id that the table has not, or tokens of another width than its rows.
    """
    rows = np.load(table, mmap_mode="r")
    ids = np.concatenate([before, after])
    if ids.size and not 0 <= ids.min() <= ids.max() < len(rows):
        raise DataError(
            f"{table}: has {len(rows)} rows, and the samples' prompt has ids from {ids.min()} to "
            f"{ids.max()}: export the checkpoint again"
        )
    if pooled.shape[1] != rows.shape[1]:
        raise DataError(
            f"{table}: has rows of {rows.shape[1]}, and the samples' pooled tokens are of "
            f"{pooled.shape[1]}: export the checkpoint again"
        )
    embeds = np.concatenate([rows[before], pooled.astype(rows.dtype), rows[after]])
    return embeds[None, -max_positions:]
