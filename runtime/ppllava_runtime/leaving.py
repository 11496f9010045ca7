"""Who waits for something may leave: then it need not be made any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock


class Left(Exception):
    """Nobody waits any more for what is being made."""


class Leaving:
    """Whether somebody still waits; any thread may ask or tell."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._has_left = False
        self._ends: list[Callable[[], object]] = []

    @property
    def has_left(self) -> bool:
        """Whether nobody waits any more."""
        return self._has_left

    def check(self) -> None:
        """Passes where somebody waits; to be called between any two steps.

        Raises:
            Left: Nobody does.
        """
        if self._has_left:
            raise Left

    def checking(self, progress: Callable[[int, int], object] | None) -> Callable[[int, int], None]:
        """What calls `progress`, if somebody still waits; see `check`."""

        def checked(done: int, total: int) -> None:
            self.check()
            if progress:
                progress(done, total)

        return checked

    def leave(self) -> None:
        """From now on nobody waits; `end` is to be called then."""
        with self._lock:
            self._has_left = True

    def end(self) -> None:
        """Ends what is under way, see `ending`, which may wait for the device."""
        with self._lock:
            ends = list(self._ends)
        with ExitStack() as stack:
            for end in ends:
                stack.callback(end)  # all of them are called, whatever one raises

    @contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """The block, whose work `end` ends from another thread when nobody waits any more."""
        with self._lock:
            has_left = self._has_left
            if not has_left:
                self._ends.append(end)
        if has_left:
            end()
        try:
            yield
        finally:
            with self._lock:
                if end in self._ends:
                    self._ends.remove(end)
