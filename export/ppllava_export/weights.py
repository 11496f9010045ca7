"""The weight files of a checkpoint folder → named, memory-mapped tensors."""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ppllava_engines.errors import DataError

from .mapped import release
from .sections import Section

# Suffix → all in one file, and the index of shards. The first that is there counts.
_NAMES = {
    ".safetensors": ("model.safetensors", "model.safetensors.index.json"),
    ".bin": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 64 << 20  # of a tensor, looked at before its pages are given back
_PROGRAM_BYTES = 64 << 20  # of a pickle and its notes: names and shapes take far less
_ZIP = b"PK\x03\x04"
_ZIP_LENGTHS = 26  # into an entry's header: the lengths of its name and its extra field
# How torch's safe loader names what a pickle wanted to run.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


class Weights(Mapping[str, Tensor]):
    """Tensors by name; each is mapped from its file and read only where it is touched.

    Attributes:
        files: The weight files, in the order of their names.
        shapes: Every tensor's shape by name.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the weights in `folder`: one file or shards with an index, safetensors or pickles.

        A pickle is only ever given to torch's safe loader, which runs nothing of it.

        Raises:
            DataError: No weights, a shard that is missing, a file that is malformed, hard-linked
                or asks to run code, or an index that disagrees with its shards.
        """
        index, shards = _find(folder)
        self.files = sorted({folder / shard for shard in shards.values()}) or [index]
        refuse_hard_links(self.files)
        held = {path: read_tensors(path) for path in self.files}
        absent = [f"{n} in {shard}" for n, shard in shards.items() if n not in held[folder / shard]]
        if absent:
            raise DataError(f"{index}: the shards do not hold {', '.join(absent)}")
        unlisted = sorted({n for part in held.values() for n in part} - shards.keys())
        if shards and unlisted:
            raise DataError(
                f"{index}: does not list {', '.join(unlisted)}, which the shards hold: copy the "
                "index again"
            )
        sharded = {name: held[folder / shard][name] for name, shard in shards.items()}
        self._tensors = sharded or held[index]
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def release(self) -> None:
        """Gives the files' pages in this process's memory back; the next read maps them again."""
        release(self.files)

    def sha256(self) -> str:
        """Returns the hash in hexadecimal of the files' bytes, one after the other."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


def check_values(
    tensors: Mapping[str, Tensor], where: str, limit: float, release: Callable[[], None]
) -> None:
    """Reads tensors once, a block at a time; returns nothing when each is finite floats.

    Args:
        tensors: By name.
        where: Names them in errors.
        limit: The largest magnitude that the export's float type holds.
        release: Called now and then, to let go of the pages that were read.

    Raises:
        DataError: A tensor that is not of a float type, e.g. quantized; NaN, infinity or a
            magnitude above `limit`; names every such tensor.
    """
    typed = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in _FLOATS]
    if typed:
        raise DataError(
            f"{where}: weights that are not floats: {', '.join(typed)}: export the checkpoint they "
            "were quantized from"
        )
    peaks, unreleased = {}, 0
    for name, tensor in tensors.items():
        extremes = [torch.zeros((), dtype=tensor.dtype)]
        for block in _blocks(tensor):
            extremes += [block.amax(), -block.amin()]
            unreleased += block.nbytes
            if unreleased > _BLOCK_BYTES:
                release()
                unreleased = 0
        peaks[name] = float(torch.stack(extremes).amax())  # NaN where there is any
    release()
    bad = [f"{name} ({peak})" for name, peak in peaks.items() if not peak <= limit]
    if bad:
        raise DataError(
            f"{where}: weights that are NaN, infinite or above {limit:g}, the largest magnitude to "
            f"export: {', '.join(bad)}"
        )


def differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """Returns every tensor that is missing, unexpected or misshapen, "" when there is none.

    Args:
        expected: Shapes by name.
        found: The same.
    """
    kinds = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{name} {shape}" for name, shape in found.items() if name not in expected],
        "misshapen": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    return "; ".join(f"{len(names)} {k}: {', '.join(names)}" for k, names in kinds.items() if names)


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yields a tensor's rows, as many at a time as make a block."""
    if tensor.numel() > 0:
        rows = tensor if tensor.ndim else tensor[None]
        yield from rows.split(max(1, _BLOCK_BYTES * len(rows) // rows.nbytes))


def _find(folder: Path) -> tuple[Path, dict[str, str]]:
    """Returns the file of all weights and {}, or the index of their shards and what it says."""
    for suffix, (whole, index) in _NAMES.items():
        if (folder / whole).is_file():
            return folder / whole, {}
        if (folder / index).is_file():
            return folder / index, _read_index(folder / index, suffix)
    names = ", ".join(name for pair in _NAMES.values() for name in pair)
    raise DataError(f"{folder}: no weights, expected one of {names}: copy the whole checkpoint")


def _read_index(path: Path, suffix: str) -> dict[str, str]:
    """Returns tensor name → file name of a shard that is there."""
    index = Section.read(path).section("weight_map")
    for name, shard in index.values.items():
        # A plain name: an index must not lead to files outside the checkpoint.
        plain = isinstance(shard, str) and Path(shard).name == shard and shard.endswith(suffix)
        if not plain or "\0" in shard:
            raise index.wrong(
                name, shard, f"the name of a {suffix} file in the checkpoint's folder"
            )
    if not index.values:
        raise DataError(f"{path}: weight_map lists no tensors")
    missing = sorted({s for s in index.values.values() if not _is_there(path.parent / s)})
    if missing:
        raise DataError(f"{path.parent}: missing shards {', '.join(missing)}: copy them as well")
    return index.values


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def refuse_hard_links(files: Iterable[Path]) -> None:
    """Returns nothing when each of `files` has one name.

    Raises:
        DataError: One has more; names all such.
    """
    # Another name can change the bytes while they are mapped, and outlives a copy that is checked.
    linked = [str(path) for path in files if path.stat().st_nlink > 1]
    if linked:
        raise DataError(
            f"weights with hard links elsewhere: {', '.join(linked)}: copy the checkpoint, so that "
            "its files have one name each"
        )


def read_tensors(path: Path, part: str | None = None) -> dict[str, Tensor]:
    """Returns the tensors in one file by name, mapped: safetensors by its suffix, else a pickle.

    Args:
        path: The file.
        part: Where a pickle may hold them, beside what else a training run saves; None where they
            are all there is.

    Raises:
        DataError: Malformed, not tensors by name, or a pickle that asks to run code.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, part)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, AttributeError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: not whole safetensors, copy it again: {error}") from error


def _read_pickle(path: Path, part: str | None) -> dict[str, Tensor]:
    with path.open("rb") as stream:
        if stream.read(len(_ZIP)) != _ZIP:
            raise DataError(
                f"{path}: not an archive of torch.save's since 1.6, older pickles are refused: "
                "convert it to safetensors"
            )
    entries = _entries(path)
    try:
        tensors: Any = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # an unpickler that is fed anything raises anything
        found = _REFUSED.search(str(error))
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if found:
            reason = f"it asks to run {found[1]}"
        raise DataError(f"{path}: torch's safe loader refuses it: {reason}") from error
    if isinstance(tensors, dict) and part is not None:
        tensors = tensors.get(part, tensors)
    if not isinstance(tensors, dict):
        raise DataError(f"{path}: holds a {type(tensors).__name__}, expected tensors by name")
    wrong = [str(name) for name, value in tensors.items() if not _plain(name, value)]
    if wrong:
        raise DataError(f"{path}: not plain tensors by name: {', '.join(wrong)}")
    _check_places(path, tensors, entries)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_places(path: Path, tensors: Mapping[str, Tensor], entries: Mapping[int, int]) -> None:
    """Returns nothing when each tensor is mapped from an entry of the archive, as large as it is.

    The loader maps what the pickle says from where an entry begins, even if that one is shorter,
    and so would take the bytes that follow for weights.

    Raises:
        DataError: One is not.
    """
    storages = {
        storage.data_ptr(): storage.nbytes()
        for tensor in tensors.values()
        if (storage := tensor.untyped_storage()).nbytes()
    }
    first, size = next(iter(storages.items()), (0, 0))
    # The file is mapped to somewhere that begins a page, the same for all.
    bases = [first - place for place, entry in entries.items() if entry == size]
    if storages and not any(
        base % mmap.PAGESIZE == 0
        and all(entries.get(place - base) == size for place, size in storages.items())
        for base in bases
    ):
        raise DataError(
            f"{path}: its tensors are not of the sizes of the archive's entries: copy it again"
        )


def _entries(path: Path) -> dict[int, int]:
    """Returns where in the file each entry of an archive begins → its size.

    Raises:
        DataError: Not a whole archive; an entry that is compressed, which torch.save never makes
            and torch inflates to any size; or one beside the tensors that is too large.
    """
    entries = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
            listed = archive.infolist()
            for info in listed:
                stream.seek(info.header_offset + _ZIP_LENGTHS)
                name, extra = struct.unpack("<HH", stream.read(4))
                entries[stream.tell() + name + extra] = info.file_size
    except Exception as error:  # zipfile that is fed anything raises anything
        raise DataError(f"{path}: not a whole archive, copy it again: {error}") from error
    for info in listed:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise DataError(
                f"{path}: its entry {info.filename!r} is compressed, expected as torch.save "
                "stores it: convert it to safetensors"
            )
        if "/data/" not in info.filename and info.file_size > _PROGRAM_BYTES:
            raise DataError(
                f"{path}: its entry {info.filename!r} has {info.file_size} bytes, expected at most "
                f"{_PROGRAM_BYTES} beside the tensors: convert it to safetensors"
            )
    return entries


def _plain(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and type(value) in (Tensor, torch.nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )
