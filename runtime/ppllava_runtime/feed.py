"""From a source to whoever looks: the newest picture at a rate, through every interruption.

One thread reads and another watches over it; what they find goes where only the newest waits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from threading import Condition, Event, Thread

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import UnavailableError, UsageError
from ppllava_runtime.newest import Newest
from ppllava_runtime.sources import Lost, Shot, Source

# Threads that hang in a device's driver cannot be ended, only left behind: not more than these.
_MOST_HANGING = 3
# Seconds for a thread to notice that nobody wants its pictures.
_LEAVING = 1.0


class Clock:
    """The time that only goes forward."""

    def now(self) -> float:
        """Seconds since any moment."""
        return time.monotonic()

    def wait(self, changed: Condition, seconds: float | None) -> None:
        """Returns when `changed`, which is held, was notified, or after so many seconds."""
        changed.wait(seconds)


@dataclass(frozen=True)
class Patience:
    """How long a feed waits for what.

    Attributes:
        first: Seconds for the first picture of all, tries included: then it gives up.
        silence: Seconds without a picture after which a connection counts as lost.
        least: Seconds before the first new try; each next one waits up to twice as long.
        most: The longest wait between two tries.
    """

    first: float = 30.0
    silence: float = 10.0
    least: float = 0.5
    most: float = 15.0


class Backoff:
    """How long to wait before each new try: doubling, and by chance up to half as long.

    So that many that were cut off at once do not come back at once.
    """

    def __init__(self, patience: Patience, chance: random.Random) -> None:
        self._patience = patience
        self._chance = chance
        self._num_tries = 0

    def next(self) -> float:
        """Seconds to wait before the next try."""
        patience = self._patience
        # Beyond 2³² it is `most` anyway.
        longest = min(patience.most, patience.least * (1 << min(self._num_tries, 32)))
        self._num_tries += 1
        return longest * self._chance.uniform(0.5, 1)

    def reset(self) -> None:
        """The last try went well."""
        self._num_tries = 0


class Pace:
    """Chooses pictures by their times, so many a second on the whole.

    Args:
        fps: Pictures a second.

    Raises:
        UsageError: A rate that is not positive.
    """

    def __init__(self, fps: float) -> None:
        if not 0 < fps < float("inf"):
            raise UsageError(f"live: fps is {fps}, expected more than 0")
        self._period = 1 / fps
        self._due = float("-inf")

    def takes(self, seconds: float) -> bool:
        """Whether the picture of this time is one of them; times come in order."""
        # Of a source that has the rate itself, give or take a little, all are taken.
        if seconds < self._due - self._period / 4:
            return False
        # After a gap nothing is made up for.
        begin = seconds if seconds >= self._due + self._period else self._due
        self._due = begin + self._period
        return True


@dataclass(frozen=True)
class Frame:
    """A picture (H,W,3) uint8 RGB, upright, and when it was to be seen, in seconds."""

    picture: NDArray[np.uint8]
    seconds: float


class _Connection:
    """One opening of a source, read by a thread of its own, and how it goes."""

    def __init__(self, began: float) -> None:
        self.left = Event()
        self.last = began  # when the last picture came
        self.num_seen = 0
        self.has_ended = False
        self.error: Exception | None = None


class Feed:
    """The newest picture of a source at a rate; begins at once, in threads of its own.

    A connection that breaks off, or gives no picture for a while, is opened again after a wait that
    grows. Pictures of a recording come when its times say so, and it ends; the times of others are
    those at which they came, since the beginning.

    Args:
        source: What to read.
        fps: Pictures a second to hand over; others are decoded and left.
        patience: How long to wait for what.
        clock: The time.
        chance: Spreads new tries.
        tell: Called with a sentence when the source is lost, and when it is back.

    Attributes:
        frames: Where they are handed over; it is closed when a recording ends, and with the error
            of a source that cannot be read or never gave a picture.
        num_seen: Pictures that the source gave.
        num_lost: How often it was lost, or could not be reached.
        num_recovered: How often pictures came again after that.

    Raises:
        UsageError: A rate that is not positive.
    """

    def __init__(
        self,
        source: Source,
        fps: float,
        *,
        patience: Patience | None = None,
        clock: Clock | None = None,
        chance: random.Random | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.frames: Newest[Frame] = Newest()
        self.num_seen = 0
        self.num_lost = 0
        self.num_recovered = 0
        self._source = source
        self._pace = Pace(fps)
        self._patience = patience or Patience()
        self._clock = clock or Clock()
        self._backoff = Backoff(self._patience, chance or random.Random())
        self._tell = tell
        self._changed = Condition()
        self._left = False
        self._began = self._clock.now()
        self._readers: list[Thread] = []
        self._watcher = Thread(target=self._watch, name="ppllava-watchdog", daemon=True)
        self._watcher.start()

    @property
    def num_dropped(self) -> int:
        """Pictures that were due, but nobody took them before the next one came."""
        return self.frames.num_dropped

    def close(self) -> None:
        """Ends it; what it holds is freed as soon as nothing hangs any more."""
        with self._changed:
            self._left = True
            self._changed.notify_all()
        self.frames.close()
        self._watcher.join()
        until = time.monotonic() + _LEAVING
        for reader in self._readers:
            reader.join(max(0.0, until - time.monotonic()))

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        """Opens the source again and again, until it is to be left or nothing more can come."""
        error: Exception | None = None
        try:
            while (connection := self._connect()) and self._follow(connection):
                pass
        except Exception as failure:
            error = failure
        self.frames.close(error)

    def _connect(self) -> _Connection | None:
        """A new connection, which is being read; None when it is to be left."""
        with self._changed:
            while not self._left and sum(thread.is_alive() for thread in self._readers) >= (
                _MOST_HANGING
            ):
                self._clock.wait(self._changed, self._patience.most)
            if self._left:
                return None
            connection = _Connection(self._clock.now())
            read = Thread(target=self._read, args=(connection,), name="ppllava-source", daemon=True)
            self._readers = [*(thread for thread in self._readers if thread.is_alive()), read]
            read.start()
        return connection

    def _follow(self, connection: _Connection) -> bool:
        """Whether to connect again, after this connection ended or was given up.

        Raises:
            Exception: What no new try would change.
        """
        source, patience = self._source, self._patience
        with self._changed:
            while not (self._left or connection.has_ended):
                rest = connection.last + patience.silence - self._clock.now()
                if rest <= 0 and not source.is_recorded:
                    break
                self._clock.wait(self._changed, None if source.is_recorded else rest)
            connection.left.set()
            error = connection.error
            if self._left or (connection.has_ended and error is None):
                return False
            if error is not None and not isinstance(error, Lost):
                raise error
            self.num_lost += 1
            reason = str(error) if error else f"no picture for {patience.silence:g} s"
            waited = self._clock.now() - self._began
            if not self.num_seen and waited >= patience.first:
                raise UnavailableError(
                    f"{source.name}: no picture came in {waited:.0f} s ({reason}): check that it "
                    "is there and that its address is right"
                )
            if connection.num_seen:
                self._backoff.reset()
            pause = self._backoff.next()
            self._say(f"{source.name}: lost ({reason}), next try in {pause:.1f} s")
            until = self._clock.now() + pause
            while not self._left and (rest := until - self._clock.now()) > 0:
                self._clock.wait(self._changed, rest)
        return not self._left

    def _read(self, connection: _Connection) -> None:
        """What the connection's thread does."""
        try:
            with closing(self._source.shots(connection.left)) as shots:
                for shot in shots:
                    if not self._take(connection, shot):
                        break
        except Lost as error:
            # Without its traceback, which would hold this connection, and that the traceback: what
            # the decoder holds would stay until such circles are looked for.
            connection.error = Lost(str(error))
        except Exception as error:
            connection.error = error
        with self._changed:
            connection.has_ended = True
            self._changed.notify_all()

    def _take(self, connection: _Connection, shot: Shot) -> bool:
        """Whether the connection goes on, after this picture of it was handed over or left."""
        seconds = self._time(connection, shot)
        with self._changed:
            # One that was given up may come to itself again.
            if self._left or connection.left.is_set():
                return False
            if self.num_lost and not connection.num_seen:
                self.num_recovered += 1
                self._say(f"{self._source.name}: here again")
            self.num_seen += 1
            connection.num_seen += 1
            connection.last = self._clock.now()
            is_due = self._pace.takes(seconds)
        if is_due:
            picture = shot.picture()
            with self._changed:
                # It may have been given up meanwhile, and newer ones be there from the next.
                if self._left or connection.left.is_set():
                    return False
                self.frames.put(Frame(picture, seconds))
        return True

    def _time(self, connection: _Connection, shot: Shot) -> float:
        """When the picture is to be seen, now at the latest."""
        if not self._source.is_recorded or shot.seconds is None:
            return self._clock.now() - self._began
        if not connection.num_seen:  # which is when a recording begins
            self._began = self._clock.now() - shot.seconds
        with self._changed:
            while not (self._left or connection.left.is_set()):
                rest = self._began + shot.seconds - self._clock.now()
                if rest <= 0:
                    break
                self._clock.wait(self._changed, rest)
        return shot.seconds

    def _say(self, sentence: str) -> None:
        if self._tell:
            self._tell(sentence)
