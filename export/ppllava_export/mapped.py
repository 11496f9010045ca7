"""Weights mapped from files: computing with them in little memory, which is given back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

_MAPS = Path("/proc/self/maps")
_RELEASE_BYTES = 1 << 20  # less is not worth a call
_DONTNEED = 4  # Linux's MADV_DONTNEED


def release(files: Iterable[Path]) -> None:
    """Takes the pages of mapped `files` out of this process's memory, and returns nothing.

    What was read of them stays in the system's cache as long as there is room, so that reading it
    again is cheap. Tensors keep their values: the files are mapped without being written to. Where
    mappings cannot be listed, nothing happens.
    """
    names = {os.fsencode(path.resolve()) for path in files}
    try:
        maps = _MAPS.read_bytes()
    except OSError:  # not Linux
        return
    libc = ctypes.CDLL(None)
    for line in maps.splitlines():
        # address perms offset dev inode path; a newline in the path is escaped
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5].replace(b"\\012", b"\n") not in names:
            continue
        first, last = (int(address, 16) for address in fields[0].split(b"-"))
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)


@contextmanager
def streamed_fp32(model: nn.Module, release: Callable[[], None]) -> Iterator[nn.Module]:
    """Yields a model whose weights are mapped in any float types, and lets it compute in fp32.

    Each module's own weights are fp32 only while it runs, and their pages are given back after it:
    all at once they may not fit into memory. Where a module reads weights of another that does not
    run, it takes them in the type of what it computes.

    Args:
        model: Given fp32 inputs, it returns fp32.
        release: Gives pages back.
    """

    def widen(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def narrow(module: nn.Module, *_: object) -> None:
        size = 0
        for parameter in module.parameters(recurse=False):
            parameter.data = stored.pop(parameter)
            size += parameter.nbytes
        if size > _RELEASE_BYTES:
            release()

    def widen_output(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output.float()

    stored: dict[nn.Parameter, Tensor] = {}
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # of a large table, only some rows are read
            hooks.append(module.register_forward_hook(widen_output))
        elif any(True for _ in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(narrow))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
