"""Between who brings and who works: the newest waits, and nothing queues however slow the work is.

There is one place for what waits: a newer one takes it, and the older one is counted as dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition, Thread
from typing import Generic, TypeVar

from ppllava_engines.errors import PPLLaVAError

Item = TypeVar("Item")


class Newest(Generic[Item]):
    """A place for the newest of something, from some threads to others."""

    def __init__(self) -> None:
        self.num_put = 0
        self.num_dropped = 0
        self._changed = Condition()
        self._item: tuple[Item] | None = None
        self._num_done = 0  # of those put there: done with, or dropped
        self._closed = False
        self._error: Exception | None = None

    def put(self, item: Item) -> None:
        """Puts it there, in the place of what was not taken."""
        with self._changed:
            if self._closed:
                return
            self.num_put += 1
            self.num_dropped += self._item is not None
            self._item = (item,)
            self._changed.notify_all()

    def take(self) -> Item | None:
        """What is there, as soon as something is; None when nothing more comes.

        Taking says that what was taken before is done with.

        Raises:
            Exception: What it was closed with.
        """
        with self._changed:
            self._num_done = self.num_put - (self._item is not None)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._item is not None or self._closed)
            if self._item is None:
                if self._error is not None:
                    raise self._error
                return None
            (item,), self._item = self._item, None
            return item

    def settle(
        self, timeout: float | None = None, given_up: Callable[[], bool] = lambda: False
    ) -> bool:
        """Whether all that was put there before was done with, or dropped, in this time.

        Args:
            timeout: In seconds; None is for ever.
            given_up: Whether nobody waits for it any more; `wake` has it asked.
        """
        with self._changed:
            before = self.num_put
            return self._changed.wait_for(
                lambda: self._closed or self._num_done >= before or given_up(), timeout
            )

    def wake(self) -> None:
        """Has who waits look again."""
        with self._changed:
            self._changed.notify_all()

    def close(self, error: Exception | None = None) -> None:
        """Nothing more comes: what is there may still be taken, then `error` is raised."""
        with self._changed:
            if not self._closed:
                self._closed, self._error = True, error
            self._changed.notify_all()


class Follower(Generic[Item]):
    """Does something with each newest item, in a thread that begins at once.

    Args:
        items: Where they come from.
        work: What to do with one.
        failed: Called with what is wrong with one; without it that ends everything.

    Attributes:
        has_ended: Whether it does nothing more.
    """

    def __init__(
        self,
        items: Newest[Item],
        work: Callable[[Item], None],
        failed: Callable[[PPLLaVAError], None] | None = None,
    ) -> None:
        self._items = items
        self._work = work
        self._failed = failed
        self._changed = Condition()
        self.has_ended = False
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, name="ppllava-follower", daemon=True)
        self._thread.start()

    def wait_for(self, reached: Callable[[], bool]) -> bool:
        """Whether `reached` is true, as soon as it is or nothing more can come.

        Raises:
            Exception: What ended it before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.has_ended or reached())
        self.check()
        return reached()

    def check(self) -> None:
        """Nothing, unless something went wrong.

        Raises:
            Exception: What ended it.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends it, after what it is at."""
        self._items.close()
        self._thread.join()

    def _run(self) -> None:
        error: Exception | None = None
        try:
            while (item := self._items.take()) is not None:
                try:
                    self._work(item)
                except PPLLaVAError as failure:
                    if self._failed is None:
                        raise
                    self._failed(failure)
                with self._changed:
                    self._changed.notify_all()
        except Exception as failure:
            error = failure
        with self._changed:
            self.has_ended, self._error = True, error
            self._changed.notify_all()
        # Last: who waits there for it to be done with what was put looks here then.
        self._items.close()
