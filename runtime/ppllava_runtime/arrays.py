"""Arrays that lie in a bundle as files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import DataError


def load_array(path: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array in the .npy file `path`, memory-mapped.

    Raises:
        DataError: Not such a file, or another dtype or shape.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not an array of embeddings, export it again: {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise DataError(
            f"{path}: it is {array.dtype} {array.shape}, expected {dtype} {shape}: export it again"
        )
    return array
