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
from ppllava_engines.errors import DataError, UsageError
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.memory import Memory
from ppllava_runtime.video import ClipInfo
from ppllava_runtime.watching import Progress


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


class _Watch:
    """What somebody watches, and how far that is."""

    def __init__(self) -> None:
        self.done: tuple[int, int] | None = None
        self.has_ended = False
        self.is_vain = False  # who watches the same would find nothing, and be no better off


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
        self._watches: dict[str, _Watch] = {}

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
    def watching(self, key: str, progress: Progress, leaving: Leaving) -> Iterator[Progress]:
        """The block, for one at a time with this key: who comes later finds what was put there.

        But where there is nothing, as it cannot be watched or has no room in the store, those who
        waited for that one no longer wait for each other. Yields what the one inside is to call
        with its progress: those who wait hear of it.

        Args:
            key: Under which what is seen will be kept.
            progress: Called with the progress, one's own or that of who is waited for; what it
                raises ends either.
            leaving: Who leaves waits no more.

        Raises:
            Left: Nobody waits for what is waited for.
        """
        mine = _Watch()
        with leaving.ending(self._wake):
            while (other := self._begin(key, mine)) is not mine:
                self._follow(other, progress, leaving)
                if other.is_vain:
                    break

        def tell(done: int, total: int) -> None:
            with self._changed:
                mine.done = done, total
                self._changed.notify_all()
            progress(done, total)

        try:
            yield tell
            mine.is_vain = self.get(key) is None
        except (DataError, UsageError):
            mine.is_vain = True
            raise
        finally:
            with self._changed:
                mine.has_ended = True
                if self._watches.get(key) is mine:
                    del self._watches[key]
                self._changed.notify_all()

    def _begin(self, key: str, mine: _Watch) -> _Watch:
        """Who watches what will be kept under a key: nobody else, or another."""
        with self._changed:
            return self._watches.setdefault(key, mine)

    def _follow(self, other: _Watch, progress: Progress, leaving: Leaving) -> None:
        """Returns when another has watched; calls `progress` with how far it is."""
        told: tuple[int, int] | None = None
        while not other.has_ended:
            with self._changed:
                while not (other.has_ended or other.done != told or leaving.has_left):
                    self._changed.wait()
                before, told = told, other.done
            leaving.check()
            if told and told != before:
                progress(*told)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


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
