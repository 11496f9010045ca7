"""Media on their way through: files of one request, in a private folder, gone when it ends."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ppllava_engines.errors import StorageError, UsageError
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.server.errors import ApiError

_OWN = "spool-"
# What is handed to a thread at once: it costs less than the way there.
_BLOCK_BYTES = 1 << 20
_FULL_SECONDS = 2.0
_MOST_REMOVALS = 3


@dataclass(frozen=True)
class Spooled:
    """A file of a request.

    Attributes:
        path: Where it is until the request ends; its name says nothing of what is in it.
        sha256: Of its content, in hexadecimal.
        num_bytes: Its size.
    """

    path: Path
    sha256: str
    num_bytes: int


class Spool:
    """Room on disk for the media of requests that are being answered.

    Several servers may share `folder`: each has a folder of its own in it, and removes those that
    servers left behind which are no more.

    Args:
        folder: Made where it is not there; for this user alone.
        limits: How large one file may be.
        budget_bytes: The most bytes of all files together, and so of one request's.

    Raises:
        StorageError: The folder cannot be made or written, or is a link.
        UsageError: It is another user's.
    """

    def __init__(self, folder: Path, limits: MediaLimits, budget_bytes: int = 2 << 30) -> None:
        self.limits = limits
        self.budget_bytes = budget_bytes
        self.num_bytes = 0  # of all files that are there
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with ExitStack() as starting:
                place = _opened(folder)
                starting.callback(os.close, place)
                _make_private(folder, place)
                # One server at a time starts: none takes for left behind what another has just
                # made.
                fcntl.flock(place, fcntl.LOCK_EX)
                for left in folder.glob(f"{_OWN}*"):
                    _remove_unused(left)
                self.folder = Path(tempfile.mkdtemp(prefix=_OWN, dir=folder))
                self._lock = _opened(self.folder)
                fcntl.flock(self._lock, fcntl.LOCK_EX)  # until this process ends
        except OSError as error:
            raise StorageError(
                f"spool {folder}: {error.strerror}; choose another folder"
            ) from error

    def request(self) -> Files:
        """The files of one request: `async with spool.request() as files`."""
        return Files(self)

    def close(self) -> None:
        """Removes what there still is; nothing can be added then."""
        if self._lock >= 0:
            for _ in range(_MOST_REMOVALS):  # a thread may be writing one more file meanwhile
                shutil.rmtree(self.folder, ignore_errors=True)
                if not self.folder.exists():
                    break
            os.close(self._lock)
            self._lock = -1

    def take(self, num_bytes: int, of_this: int) -> None:
        """Counts bytes that are about to be written.

        Args:
            num_bytes: So many.
            of_this: All of the same request's, with these.

        Raises:
            ApiError: 400: they never fit. 429: not beside those of other requests.
        """
        if of_this > self.budget_bytes:
            raise ApiError(
                400,
                f"media: the files of a request have more than {self.budget_bytes} bytes together, "
                "the most that this server takes; send fewer or smaller ones",
                code="media_too_large",
            )
        if self.num_bytes + num_bytes > self.budget_bytes:
            raise ApiError(
                429,
                "media: the files of all requests together would have more than "
                f"{self.budget_bytes} bytes; try again when others have been answered",
                code="rate_limit_exceeded",
                type="rate_limit_error",
                retry_after=_FULL_SECONDS,
            )
        self.num_bytes += num_bytes


class Files:
    """The files of one request, an asynchronous context manager that removes them."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._added: list[tuple[Path, int]] = []

    async def __aenter__(self) -> Files:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for path, taken in self._added:
            path.unlink(missing_ok=True)
            self._spool.num_bytes -= taken
        self._added.clear()

    async def add(self, chunks: AsyncGenerator[bytes, None]) -> Spooled:
        """What the chunks are together, as a file; the generator is closed in any case.

        Raises:
            ApiError: 400 "media_too_large": more than one file may have, or than there is room for.
                429: no room now. And what the generator raises.
            StorageError: It cannot be written.
        """
        limit = self._spool.limits.num_bytes
        hashed, size, taken = hashlib.sha256(), 0, 0
        descriptor, name = tempfile.mkstemp(dir=self._spool.folder)  # for this user alone
        path = Path(name)
        # Buffered, as closing it then waits for a thread that still writes to it.
        file = os.fdopen(descriptor, "wb")

        def write(block: bytes) -> None:
            hashed.update(block)
            file.write(block)

        try:
            async with aclosing(chunks):
                waiting = bytearray()
                async for chunk in chunks:
                    size += len(chunk)
                    if size > limit:
                        raise too_large(limit)
                    self._spool.take(len(chunk), sum(had for _, had in self._added) + size)
                    taken = size
                    waiting += chunk
                    if len(waiting) >= _BLOCK_BYTES:
                        block, waiting = bytes(waiting), bytearray()
                        await asyncio.to_thread(write, block)
                await asyncio.to_thread(write, bytes(waiting))
                await asyncio.to_thread(file.flush)
        except OSError as error:
            raise StorageError(f"spool {path}: {error.strerror or error}") from error
        finally:
            self._added.append((path, taken))
            with suppress(OSError):  # of what a failed write has left to write
                file.close()
        return Spooled(path, hashed.hexdigest(), size)


def too_large(limit: int) -> ApiError:
    """What is said of media of more than `limit` bytes."""
    return ApiError(
        400,
        f"media: a file has more than {limit} bytes, the most that this server takes; "
        "send a shorter or smaller one",
        code="media_too_large",
    )


def _make_private(folder: Path, descriptor: int) -> None:
    """Refuses a folder in which somebody else could put things in the place of ours."""
    if os.fstat(descriptor).st_uid != os.geteuid():
        raise UsageError(
            f"spool {folder}: it belongs to another user, expected a folder of the server's own; "
            "choose another"
        )
    os.fchmod(descriptor, 0o700)


def _remove_unused(folder: Path) -> None:
    """Removes the folder of a server that is no more."""
    # Another server is there, or has just removed it itself.
    with suppress(BlockingIOError, FileNotFoundError), ExitStack() as opened:
        place = _opened(folder)
        opened.callback(os.close, place)
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
