"""Making a folder so that others see all of it or none of it, whatever happens meanwhile."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ppllava_engines.errors import StorageError, UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def replaced_folder(out: Path, overwrite: bool, mark: str, keys: Iterable[str]) -> Iterator[Path]:
    """An empty staging folder beside `out`, which takes its place when the block ends well.

    Folders above `out` are made where they are missing, and are gone again when the block fails.

    Args:
        out: The folder to make.
        overwrite: Whether a folder that is there may be replaced.
        mark: A file that such a folder has, a JSON object.
        keys: What that object has at least; a folder without is someone else's and stays.

    Raises:
        StorageError: Making, syncing or moving a folder failed. When only the last sync did, the
            new folder is in place already, and the error says so.
        UsageError: `out` is there and may not be replaced.
    """
    out = out.resolve()
    keys = set(keys)
    with ExitStack() as undo:
        try:
            undo.callback(_remove_empty, [path for path in out.parents if not path.exists()])
            out.parent.mkdir(parents=True, exist_ok=True)
            _put_back(out, mark, keys)
            _check_replaceable(out, overwrite, mark, keys)
            _clean(out, mark, keys)
            staging, lock = _new_staging(out)
            undo.callback(os.close, lock)
            # By then it is the unfinished folder, or the old one that was swapped out.
            undo.callback(shutil.rmtree, staging, ignore_errors=True)
        except OSError as error:
            raise StorageError(f"{out}: cannot make a folder beside it: {error}") from error
        yield staging
        try:
            _sync(staging)
            _check_replaceable(out, overwrite, mark, keys)
            _put_in_place(staging, out, mark)
        except OSError as error:
            raise StorageError(f"{out}: cannot put the new folder in place: {error}") from error
        try:
            _sync_one(out.parent)
        except OSError as error:
            raise StorageError(
                f"{out}: the new folder is in place, but may not outlast a power failure: {error}"
            ) from error


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty, or not made after all
            folder.rmdir()


def _check_replaceable(out: Path, overwrite: bool, mark: str, keys: set[str]) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _has_keys(out / mark, keys):
        raise UsageError(
            f"{out} is there and has no {mark} with {', '.join(sorted(keys))}, so it is not "
            "replaced: choose another"
        )
    if not overwrite:
        raise UsageError(f"{out} is there already: choose another, or ask to overwrite it")


def _has_keys(path: Path, keys: set[str]) -> bool:
    """Whether `path` is a JSON object with these keys; many programs have a manifest.json."""
    if not path.is_file():
        return False
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and keys <= value.keys()


def _new_staging(out: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock.

    The lock is the kernel's and ends with the process, however it ends, so a folder that can be
    locked is one that nobody works on. No process ids, which are reused.
    """
    while True:
        staging = out.with_name(f"{_staging_prefix(out)}{secrets.token_hex(4)}")
        staging.mkdir()
        with suppress(FileNotFoundError):  # another process may clean it before it is locked
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if staging.is_dir():
                return staging, lock
            os.close(lock)


@contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Holds the lock of a folder, which goes along when the folder is moved."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(lock)


def _staging_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _displaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")


def _put_back(out: Path, mark: str, keys: set[str]) -> None:
    """Undoes the swap of a process that was killed between its two renames."""
    displaced = _displaced(out)
    if not out.exists() and _has_keys(displaced / mark, keys):
        with suppress(FileNotFoundError, BlockingIOError), _locked(displaced, fcntl.LOCK_NB):
            displaced.rename(out)


def _clean(out: Path, mark: str, keys: set[str]) -> None:
    """Removes what a process that was killed left beside `out`, and nothing of anybody else."""
    displaced = _displaced(out)
    if _has_keys(displaced / mark, keys):
        with suppress(FileNotFoundError, BlockingIOError), _locked(displaced, fcntl.LOCK_NB):
            _remove(displaced, mark)
    with suppress(OSError):  # it is not empty, which is to say not what `_remove` leaves
        displaced.rmdir()
    prefix = _staging_prefix(out)
    for stale in [path for path in out.parent.iterdir() if path.name.startswith(prefix)]:
        with suppress(FileNotFoundError, BlockingIOError), _locked(stale, fcntl.LOCK_NB):
            shutil.rmtree(stale)


def _remove(folder: Path, mark: str) -> None:
    """Removes a folder, its mark at last: whatever is left of it can be told by that."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != mark:
            path.unlink()
    (folder / mark).unlink()
    folder.rmdir()


def _sync(folder: Path) -> None:
    """Returns when everything below `folder` is on the disk."""
    for parent, _, files in os.walk(folder):
        for path in [*(Path(parent, name) for name in files), Path(parent)]:
            _sync_one(path)


def _put_in_place(staging: Path, out: Path, mark: str) -> None:
    """Moves `staging` to `out`; what was there is afterwards at `staging`, or gone."""
    if not out.exists() or not any(out.iterdir()):
        staging.rename(out)
    elif not _exchange(staging, out):
        # This file system cannot swap two folders in one step: `_put_back` mends it when the
        # process is killed between these, and leaves it alone as long as it is locked.
        displaced = _displaced(out)
        with _locked(out):
            out.rename(displaced)
            try:
                staging.rename(out)
            except OSError:
                displaced.rename(out)
                raise
            with suppress(OSError):  # what stays is removed by the next one
                _remove(displaced, mark)


def _exchange(first: Path, second: Path) -> bool:
    """Whether the two folders were swapped in one step; False where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in _NO_EXCHANGE:
            return False
        raise OSError(code, os.strerror(code), str(second))
    return True


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
