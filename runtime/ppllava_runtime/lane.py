"""One device does one thing at a time: who waits for it is served in the order of asking."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

from numpy.typing import NDArray

from ppllava_engines.bundle import TensorSpec
from ppllava_engines.engine import Array, Engine

Loaded = TypeVar("Loaded")


class Lane:
    """A lock that is given in the order in which it was asked for; entered by `with`.

    A plain lock goes to whoever comes first when it is free, which is mostly the thread that has
    just released it: one long video would keep everybody else waiting. The thread that holds it may
    enter it again.
    """

    def __init__(self) -> None:
        self._lock = Lock()  # of what follows; never held for long
        self._holder: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, Lock]] = deque()

    def __enter__(self) -> None:
        thread = get_ident()
        turn, waits = Lock(), False
        turn.acquire()
        try:
            with self._lock:
                if self._holder in (None, thread):
                    self._holder = thread
                    self._depth += 1
                    return
                waits = True
                self._waiting.append((thread, turn))
            turn.acquire()
        except BaseException:  # Ctrl-C, which may come between any two steps
            if waits:
                with self._lock:
                    came = (thread, turn) not in self._waiting
                    if not came:
                        self._waiting.remove((thread, turn))
                if came:
                    self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            self._holder = None
            if self._waiting:
                # Handed over, so that nobody can come in between.
                self._holder, turn = self._waiting.popleft()
                self._depth = 1
                turn.release()

    @property
    def num_waiting(self) -> int:
        """How many threads wait for it now."""
        with self._lock:
            return len(self._waiting)


class LanedEngine:
    """An Engine, see there, that runs when it is its turn in a lane.

    Args:
        engine: What runs.
        lane: Of its device.
    """

    def __init__(self, engine: Engine, lane: Lane) -> None:
        self._engine = engine
        self._lane = lane

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes, in the graph's order."""
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives back, in the graph's order."""
        return self._engine.outputs

    @property
    def limits(self) -> Mapping[str, int]:
        """The largest size of each dynamic axis, by its name, where the backend has one."""
        return self._engine.limits

    def run(
        self, feeds: Mapping[str, Array], keep: Mapping[str, Array] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Every output by name but those in `keep`; see `Engine.run`."""
        with self._lane:
            return self._engine.run(feeds, keep)

    def empty(self, name: str, size: int) -> Array:
        """Room on the device for the output `name`, whose first axis has this size."""
        with self._lane:
            return self._engine.empty(name, size)


class _HasLane(Protocol):
    @property
    def lane(self) -> Lane: ...


class LoadedOnce(Generic[Loaded]):
    """A property that is computed in its object's `lane` when it is first needed, and kept.

    `functools.cached_property` has a lock of its own in some versions of Python, which waits for a
    lane whose holder may wait for it, and none in others, where two threads load the same twice.
    """

    def __init__(self, load: Callable[[Any], Loaded]) -> None:
        self._load = load
        self.__doc__ = load.__doc__

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> LoadedOnce[Loaded]: ...
    @overload
    def __get__(self, owner: _HasLane, kind: type) -> Loaded: ...
    def __get__(self, owner: _HasLane | None, kind: type) -> Loaded | LoadedOnce[Loaded]:
        if owner is None:
            return self
        with owner.lane:
            # Kept where Python looks before it asks here; another thread may have been sooner.
            found: dict[str, Loaded] = vars(owner)
            if self._name not in found:
                found[self._name] = self._load(owner)
            return found[self._name]

    if TYPE_CHECKING:  # without it, assigning to the name puts something else in its place

        def __set__(self, owner: _HasLane, value: Loaded) -> None: ...
