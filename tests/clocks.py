"""Time in tests: waiting for what other threads do, and a clock that runs by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Condition, Event

from ppllava_runtime.feed import Clock, Feed


def reached(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it is true in time."""
    until = time.monotonic() + seconds
    waiting = Event()
    while not condition() and time.monotonic() < until:
        waiting.wait(0.005)
    return condition()


class HandClock(Clock):
    """A clock of which short waits take no time, and others last until it is moved.

    However long a thread is kept from running: by this clock it is not late.

    Args:
        longest_pause: Seconds of the longest wait that is a short one.
    """

    def __init__(self, longest_pause: float = 0.05) -> None:
        self.seconds = 0.0
        self._longest_pause = longest_pause

    def now(self) -> float:
        return self.seconds

    def wait(self, changed: Condition, seconds: float | None) -> None:
        if seconds is None or seconds > self._longest_pause:
            changed.wait()
        elif not changed.wait(0.005):
            self.seconds += seconds

    def loses(self, feed: Feed, silence: float) -> bool:
        """Whether a feed loses its source once more, as it hears nothing for so long."""
        before = feed.num_lost

        def is_lost() -> bool:
            with feed._changed:
                if feed.num_lost > before:
                    return True
                # Again and again: a picture may have been on its way.
                self.seconds += silence
                feed._changed.notify_all()
            return False

        return reached(is_lost)
