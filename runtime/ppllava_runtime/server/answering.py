"""Work that a thread does while the event loop goes on: its items come out there, one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from threading import Lock
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")

_SMALL = 1 << 18  # bytes, whose reading takes about as long as handing them to a thread


class Left(Exception):
    """Nobody waits any more for what is being made."""


class Check:
    """Whether anybody still waits; to be called between any two steps, and as a `Progress`."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._has_left = False
        self._ends: list[Callable[[], object]] = []

    def __call__(self, *_: int) -> None:
        """Passes where somebody waits.

        Raises:
            Left: Nobody does.
        """
        if self._has_left:
            raise Left

    def leave(self) -> None:
        """From now on nobody waits; `end` is to be called then."""
        with self._lock:
            self._has_left = True

    def end(self) -> None:
        """Calls what is to be called when nobody waits, which may wait for the device."""
        for end in self._ends:
            end()

    def on_leaving(self, end: Callable[[], object]) -> None:
        """Has `end` called, from another thread, when nobody waits any more."""
        with self._lock:
            has_left = self._has_left
            if not has_left:
                self._ends.append(end)
        if has_left:
            end()


async def in_thread(
    threads: Executor,
    produce: Callable[[Check], Generator[Item, None, None]],
    put: Callable[[Item], object],
) -> None:
    """Nothing, once a thread has produced all items and each was `put` in the event loop.

    Cancelling it ends the production at its next step; it returns when that has happened, so that
    whatever it stands in is not given to others before.

    Args:
        threads: Where the thread is from.
        produce: What the thread runs: it is closed where it stands when nobody waits.
        put: Called in the event loop.

    Raises:
        Exception: What `produce` raises.
    """
    loop, check = asyncio.get_running_loop(), Check()

    def work() -> None:
        with closing(produce(check)) as items:
            for item in items:
                check()
                loop.call_soon_threadsafe(put, item)

    working = loop.run_in_executor(threads, work)
    try:
        await asyncio.wait([working])
    except asyncio.CancelledError:
        check.leave()
        # In a thread of its own, as to end something may take until the device is free, and files
        # of others may keep all that are shared.
        own = ThreadPoolExecutor(1, "leaving")
        leaving = loop.run_in_executor(own, check.end)
        own.shutdown(wait=False)
        await settled(working, leaving)
        if not working.cancelled():
            working.exception()  # looked at, though nobody is to hear of it
        raise
    working.result()


async def aside(size: int, read: Callable[[], Found]) -> Found:
    """What `read` makes of so many bytes; of many in a thread, as others want the event loop too.

    Raises:
        Exception: What `read` raises.
    """
    return await asyncio.to_thread(read) if size > _SMALL else read()


async def settled(*futures: asyncio.Future[None]) -> None:
    """Nothing, once all are done, however often this is cancelled meanwhile."""
    cancelled = False
    while waiting := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
