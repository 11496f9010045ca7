"""Work that a thread does while the event loop goes on: its items come out there, one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

from ppllava_runtime.leaving import Leaving

Item = TypeVar("Item")
Found = TypeVar("Found")

_SMALL = 1 << 18  # bytes, whose reading takes about as long as handing them to a thread


async def in_thread(
    threads: Executor,
    produce: Callable[[Leaving], Generator[Item, None, Found]],
    put: Callable[[Item], object],
) -> Found:
    """What `produce` returns, once a thread has produced all items and each was `put`.

    Cancelling it ends the production at its next step; it returns when that has happened, so that
    whatever it stands in is not given to others before.

    Args:
        threads: Where the thread is from.
        produce: What the thread runs: it is closed where it stands when nobody waits.
        put: Called in the event loop.

    Raises:
        Exception: What `produce` raises.
    """
    loop, leaving = asyncio.get_running_loop(), Leaving()

    def work() -> Found:
        with closing(produce(leaving)) as items:
            while True:
                try:
                    item = next(items)
                except StopIteration as last:
                    found: Found = last.value
                    return found
                leaving.check()
                loop.call_soon_threadsafe(put, item)

    working = loop.run_in_executor(threads, work)
    try:
        await asyncio.wait([working])
    except asyncio.CancelledError:
        leaving.leave()
        # In a thread of its own, as to end something may take until the device is free, and files
        # of others may keep all that are shared.
        own = ThreadPoolExecutor(1, "leaving")
        ending = loop.run_in_executor(own, leaving.end)
        own.shutdown(wait=False)
        await settled(working, ending)
        if not working.cancelled():
            working.exception()  # looked at, though nobody is to hear of it
        raise
    return working.result()


async def aside(size: int, read: Callable[[], Found]) -> Found:
    """What `read` makes of so many bytes; of many in a thread, as others want the event loop too.

    Raises:
        Exception: What `read` raises.
    """
    return await asyncio.to_thread(read) if size > _SMALL else read()


async def settled(*futures: asyncio.Future[Any]) -> None:
    """Nothing, once all are done, however often this is cancelled meanwhile."""
    cancelled = False
    while waiting := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
