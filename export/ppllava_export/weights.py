"""The safetensors files of a checkpoint folder → named, memory-mapped tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ppllava_engines.errors import DataError, IncompatibleError, NotFoundError

from .sections import Section

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CHUNK_BYTES = 1 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")


class Weights(Mapping[str, Tensor]):
    """Tensors by name; each is mapped from its file and read only where it is touched.

    Attributes:
        files: The safetensors files, in the order of their names.
        shapes: Every tensor's shape by name.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the weights in `folder`: one file, or shards with an index.

        Raises:
            DataError: A header that is truncated or malformed, or an index that disagrees with
                the shards it lists.
            NotFoundError: No safetensors weights, or a listed shard is missing.
        """
        self._index = _read_index(folder)
        self.files = sorted({folder / name for name in self._index.values()}) or [folder / SINGLE]
        self._open = {path: _open(path) for path in self.files}
        names = {path: set(file.keys()) for path, file in self._open.items()}
        self._held = {name: path for path, held in names.items() for name in held}
        if self._index:
            self._held = {name: folder / shard for name, shard in self._index.items()}
            absent = [
                f"{n} in {path.name}" for n, path in self._held.items() if n not in names[path]
            ]
            if absent:
                raise DataError(f"{folder / INDEX}: the shards do not hold {', '.join(absent)}")
        slices = {name: self._open[path].get_slice(name) for name, path in self._held.items()}
        self.shapes = {name: tuple(slice_.get_shape()) for name, slice_ in slices.items()}
        self._dtypes = {name: slice_.get_dtype() for name, slice_ in slices.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._held[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def check_values(self, names: Mapping[str, object], limit: float) -> None:
        """Reads the named tensors once; returns nothing when each is finite floats.

        Args:
            names: Which tensors.
            limit: The largest magnitude that the export's float type holds.

        Raises:
            DataError: NaN, infinity or a magnitude above `limit`; names every such tensor.
            IncompatibleError: A tensor that is not of a float type, e.g. quantized.
        """
        typed = [f"{name} ({self._dtypes[name]})" for name in names if not self._float(name)]
        if typed:
            raise IncompatibleError(
                f"{self.files[0].parent}: weights that are not floats: {', '.join(typed)}: "
                "export the checkpoint they were quantized from"
            )
        peaks = {name: _peak(self[name]) for name in names}
        bad = [f"{name} ({peak})" for name, peak in peaks.items() if not peak <= limit]
        if bad:
            raise DataError(
                f"{self.files[0].parent}: weights that are NaN, infinite or above {limit:g}, the "
                f"largest magnitude to export: {', '.join(bad)}"
            )

    def sha256(self) -> str:
        """Returns the hash in hexadecimal of the files' bytes, one after the other."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()

    def _float(self, name: str) -> bool:
        return self._dtypes[name] in _FLOATS


def _read_index(folder: Path) -> dict[str, str]:
    """Returns tensor name → shard file name, empty where the weights are one file."""
    if (folder / SINGLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        advice = "convert the pickled weights, which are never loaded" if pickled else "none there"
        raise NotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}: {advice}")
    index = Section.read(folder / INDEX).section("weight_map")
    for name, shard in index.values.items():
        # A plain name: an index must not lead to files outside the checkpoint.
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise index.wrong(name, shard, "a file name")
    if not index.values:
        raise DataError(f"{folder / INDEX}: weight_map lists no tensors")
    missing = sorted({shard for shard in index.values.values() if not (folder / shard).is_file()})
    if missing:
        raise NotFoundError(f"{folder}: missing shards {', '.join(missing)}")
    return index.values


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not whole safetensors, copy it again: {error}") from error


def _peak(tensor: Tensor) -> float:
    """Returns the largest magnitude; NaN where there is any."""
    if tensor.numel() == 0:
        return 0.0
    return float(torch.maximum(tensor.amax(), -tensor.amin()))
