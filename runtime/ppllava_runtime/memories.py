"""Memories of several videos within a budget: one that comes again need not be watched again."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition

from ppllava_engines.bundle import FileSpec
from ppllava_engines.errors import UsageError
from ppllava_runtime.memory import Memory
from ppllava_runtime.video import ClipInfo
from ppllava_runtime.watching import Progress

_NOTHING_YET = (0, 0)


@dataclass(frozen=True)
class Watched:
    """A video, a picture or several, once seen.

    Attributes:
        memory: What is kept.
        info: About the file and the frames chosen from it.
        paths: The files that `info` names.
        seer: By what it was seen, see `Source`.
    """

    memory: Memory
    info: ClipInfo
    paths: tuple[Path, ...] = ()
    seer: tuple[str, ...] = ()

    def of(self, paths: Sequence[Path]) -> Watched:
        """The same, seen in files of the same content, which `info` names from then on."""
        begun, rest = "", self.info.damage or ""
        # Each file is named at most once, and in order.
        for before, now in zip(self.paths, paths, strict=True):
            head, found, tail = rest.partition(f" {before}: ")
            if found:
                begun, rest = f"{begun}{head} {now}: ", tail
        info = replace(self.info, damage=begun + rest or None)
        return replace(self, info=info, paths=tuple(paths))


class MemoryStore:
    """The memories that were used last, as many as fit. Several threads may share one.

    Args:
        budget_bytes: The most bytes of all memories in it together. One that is larger by itself
            is not kept; those that are in use elsewhere stay there.

    Raises:
        UsageError: A budget below 1.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 1:
            raise UsageError(f"the budget of memories is {budget_bytes} bytes, expected 1 or more")
        self.budget_bytes = budget_bytes
        self._changed = Condition()
        self._found: OrderedDict[str, Watched] = OrderedDict()  # the one used last is last
        self._nbytes = 0
        self._watched: dict[str, tuple[int, int]] = {}  # by someone now, who is that far

    def __len__(self) -> int:
        with self._changed:
            return len(self._found)

    @property
    def nbytes(self) -> int:
        """The size of all memories in it, in bytes."""
        with self._changed:
            return self._nbytes

    def get(self, key: str) -> Watched | None:
        """What was put there under this key, if it is still there."""
        with self._changed:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)

    def put(self, key: str, watched: Watched) -> None:
        """Keeps this under a key, in the place of what is longest unused where room is short."""
        size = watched.memory.nbytes
        if size > self.budget_bytes:
            return
        with self._changed:
            if (before := self._found.pop(key, None)) is not None:
                self._nbytes -= before.memory.nbytes
            while self._nbytes + size > self.budget_bytes:
                _, oldest = self._found.popitem(last=False)
                self._nbytes -= oldest.memory.nbytes
            self._found[key] = watched
            self._nbytes += size

    @contextmanager
    def watching(self, key: str, progress: Progress | None) -> Iterator[Progress]:
        """The block, for one at a time with this key: who comes later finds what was put there.

        Yields what the one inside is to call with its progress; those who wait hear of it.

        Args:
            key: Under which what is seen will be kept.
            progress: Called with the progress, one's own or that of who is waited for; what it
                raises ends the waiting.
        """
        heard = _NOTHING_YET
        while (now := self._enter(key, heard)) is not None:
            heard = now
            if progress and heard != _NOTHING_YET:
                progress(*heard)

        def tell(done: int, total: int) -> None:
            with self._changed:
                self._watched[key] = done, total
                self._changed.notify_all()
            if progress:
                progress(done, total)

        try:
            yield tell
        finally:
            with self._changed:
                del self._watched[key]
                self._changed.notify_all()

    def _enter(self, key: str, heard: tuple[int, int]) -> tuple[int, int] | None:
        """None when it is one's turn; until then how far the other is, each time that changes."""
        with self._changed:
            while self._watched.get(key) == heard:
                self._changed.wait()
            if key in self._watched:
                return self._watched[key]
            self._watched[key] = _NOTHING_YET
            return None


class Source:
    """Files at one moment, known by their content.

    Args:
        paths: The files, in order.
        sampling: What else decides what is seen of them, e.g. the number of frames.
        seer: By what: the seal of a bundle, a kind of memory and the like.
        owner: For whom: nobody finds what was seen for another, nor learns whether it was.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        sampling: Sequence[object],
        seer: Sequence[object],
        owner: str = "",
    ) -> None:
        self.paths = tuple(paths)
        self._stamps = self._now()
        self._said = [list(sampling), list(seer), owner]

    def key(self) -> str | None:
        """The key of what is seen; None where there are no such files to read.

        It is by content and by suffix, which may decide how a file is read.
        """
        with suppress(OSError):
            # Others, such as pipes, can be read only once.
            if all(path.is_file() for path in self.paths):
                contents = [(FileSpec.of(path).sha256, path.suffix.lower()) for path in self.paths]
                text = json.dumps([contents, *self._said])
                return hashlib.sha256(text.encode()).hexdigest()
        return None

    def is_unchanged(self) -> bool:
        """Whether the files are still those of the beginning, as far as size and time tell."""
        return self._stamps == self._now()

    def _now(self) -> list[tuple[int, int]] | None:
        with suppress(OSError):
            stats = [path.stat() for path in self.paths]
            return [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        return None
