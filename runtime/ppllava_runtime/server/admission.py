"""Who is answered now, who waits, and who is told to come back: no queue without an end."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ppllava_runtime.server.errors import ApiError

_MOST_SECONDS_AWAY = 60.0
_SHARE_OF_THE_LAST = 0.2  # in the running mean of service times


class Admission:
    """Slots, given in the order in which they were asked for. It belongs to one event loop.

    Args:
        num_slots: Holders at once; 0 refuses everybody.
        num_waiting: Who may wait for one; the next is refused at once.
        what: What a slot is for, in the sentence of a refusal.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        num_slots: int,
        num_waiting: int,
        what: str = "requests",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_slots = num_slots
        self.num_waiting = num_waiting
        self._what = what
        self._clock = clock
        self._num_held = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_seconds = 1.0
        self._is_closed = False

    @property
    def num_held(self) -> int:
        """Slots that are taken."""
        return self._num_held

    @property
    def num_queued(self) -> int:
        """Who waits for a slot."""
        return len(self._waiting)

    def close(self) -> None:
        """From now on nobody else gets in; those that wait have got in."""
        self._is_closed = True

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A slot for the time of the block, as soon as those before have had theirs.

        To cancel is allowed at any time, and leaves no slot behind.

        Raises:
            ApiError: 403: there are none. 429: all are taken and all places to wait too. 503: it
                was closed.
        """
        await self._acquire()
        began = self._clock()
        try:
            yield
        finally:
            elapsed = self._clock() - began
            self._mean_seconds += _SHARE_OF_THE_LAST * (elapsed - self._mean_seconds)
            self._release()

    async def _acquire(self) -> None:
        if self._is_closed:
            raise ApiError(
                503,
                f"admission: the server was told to stop and takes no more {self._what}: ask "
                "another",
                code="not_ready",
                type="server_error",
            )
        if self.num_slots == 0:
            raise ApiError(
                403,
                f"admission: {self._what} are switched off on this server: ask another, or start "
                "it with 1 or more",
                code="switched_off",
            )
        if self._num_held < self.num_slots:  # then nobody waits: a slot is handed on, not put back
            self._num_held += 1
            return
        if len(self._waiting) >= self.num_waiting:
            raise self._refusal()
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # given in the moment of giving up
                self._release()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def _release(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else it has been given up, and does not know of it yet
                turn.set_result(None)
                return
        self._num_held -= 1

    def _refusal(self) -> ApiError:
        waves = (len(self._waiting) + 1) / self.num_slots
        seconds = min(_MOST_SECONDS_AWAY, max(1.0, waves * self._mean_seconds))
        queue = f" and {self.num_waiting} wait" if self.num_waiting else ""
        return ApiError(
            429,
            f"admission: {self._num_held} {self._what} are running{queue}, which is the most: "
            f"try again in {seconds:.0f} s",
            code="server_busy",
            type="rate_limit_error",
            retry_after=seconds,
        )
