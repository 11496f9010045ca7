"""What decoders with a cache of keys and values share: they differ in what one is."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import DecoderSpec
from ppllava_engines.errors import UsageError
from ppllava_runtime.decoders import FinishReason
from ppllava_runtime.decoders.sampling import Constraint, Sampling
from ppllava_runtime.lane import Lane

_CACHE_STEP = 256


class Cache(Protocol):
    """Keys and values of up to `capacity` tokens.

    Rewinding costs nothing: a run at length n overwrites whatever came after the first n tokens.
    """

    capacity: int

    def run(self, embeds: NDArray[Any], length: int) -> NDArray[np.float32]:
        """The logits (V,) after `embeds` (n,D), which follow the first `length` tokens."""
        ...

    def enlarge(self, capacity: int, length: int) -> None:
        """Makes room for so many tokens, more than before; the first `length` stay."""
        ...


class CachingDecoder:
    """A Decoder, but for `_new_cache`; see there.

    Args:
        table: (V,D), the embedding of each id; usually memory-mapped.
        spec: What the manifest says of the decoder.
        max_positions: The most tokens of prompt and answer together.
        lane: Of its device, in which every run is; None is one of its own.
    """

    def __init__(
        self,
        table: NDArray[Any],
        spec: DecoderSpec,
        max_positions: int,
        lane: Lane | None = None,
    ) -> None:
        self._table = table
        self._spec = spec
        self._max_positions = max_positions
        self._lane = lane or Lane()
        self._idle: _Tape | None = None

    @property
    def max_positions(self) -> int:
        """The most tokens of prompt and answer together."""
        return self._max_positions

    def embed(self, ids: Sequence[int]) -> NDArray[Any]:
        """(n,D): the embeddings of `ids`."""
        return np.asarray(self._table[list(ids)])

    def generate(
        self,
        parts: Sequence[NDArray[Any]],
        max_new_tokens: int,
        sampling: Sampling,
        constraint: Constraint | None = None,
        owner: str = "",
    ) -> Generator[int, None, FinishReason]:
        """The ids of the answer one by one; see `Decoder.generate`."""
        length = sum(map(len, parts))
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
        if not length:
            raise UsageError("the prompt is empty, expected 1 token or more")
        if length >= self.max_positions:
            raise UsageError(
                f"the prompt is {length} tokens long and the model holds {self.max_positions} with "
                "its answer: pool the video to fewer tokens, or shorten the question"
            )
        return self._generate(parts, max_new_tokens, sampling, constraint, owner)

    def _new_cache(self, capacity: int) -> Cache:
        """An empty cache for so many tokens, at most `max_positions`."""
        raise NotImplementedError

    def _generate(
        self,
        parts: Sequence[NDArray[Any]],
        max_new_tokens: int,
        sampling: Sampling,
        constraint: Constraint | None,
        owner: str,
    ) -> Generator[int, None, FinishReason]:
        # The last id is never fed back, so it needs no place in the cache.
        needed = min(sum(map(len, parts)) + max_new_tokens - 1, self.max_positions)
        most = min(max_new_tokens, self.max_positions - sum(map(len, parts)) + 1)
        random = np.random.default_rng(sampling.seed)
        with self._lane:
            tape, left = self._take_tape(parts, needed, owner)
        try:
            for part in left:
                with self._lane:
                    logits = tape.run(part)
            for count in range(1, most + 1):
                if constraint is not None:
                    logits[~constraint.allowed()] = -np.inf
                token = sampling.pick(logits, random)
                if token in self._spec.eos_token_ids:
                    return "stop"
                if constraint is not None:
                    constraint.accept(token)
                yield token
                if constraint is not None and constraint.finished:
                    return "stop"
                if count < most:
                    with self._lane:
                        logits = tape.run(self.embed([token]), is_step=True)
            return "length"
        finally:
            self._idle = tape

    def _take_tape(
        self, parts: Sequence[NDArray[Any]], needed: int, owner: str
    ) -> tuple[_Tape, Sequence[NDArray[Any]]]:
        """A tape that nobody uses, and what is left to run of the parts.

        An answer that was left half-way keeps its own.
        """
        parts = [part for part in parts if len(part)]
        tape, self._idle = self._idle, None
        left = parts if tape is None else tape.rewind(parts, owner)
        rounded = min(-(-needed // _CACHE_STEP) * _CACHE_STEP, self.max_positions)
        if tape is not None and tape.capacity < needed:
            if tape.length:
                tape.enlarge(rounded)
            else:
                tape = None  # its memory may be needed for the larger one
        return tape or _Tape(self._new_cache(rounded), owner), left


@dataclass(frozen=True)
class _Run:
    """What was run at once: rows (n,D), and whether it was an id of an answer."""

    embeds: NDArray[Any]
    is_step: bool


class _Tape:
    """A cache and the runs that it holds.

    A run's numbers depend on how many rows were run together, so it is only taken for the same run
    of another prompt, and of the same owner.
    """

    def __init__(self, cache: Cache, owner: str) -> None:
        self._cache = cache
        self._owner = owner
        self._runs: list[_Run] = []
        self._length = 0
        self._is_sound = True

    @property
    def capacity(self) -> int:
        """The most tokens."""
        return self._cache.capacity

    @property
    def length(self) -> int:
        """The tokens that it holds."""
        return self._length

    def run(self, embeds: NDArray[Any], is_step: bool = False) -> NDArray[np.float32]:
        """The logits (V,) after what it holds and `embeds` (n,D), which it holds from then on."""
        logits = self._cache.run(embeds, self.length)
        self._runs.append(_Run(np.array(embeds), is_step))  # the caller's array may change
        self._length += len(embeds)
        self._is_sound &= bool(np.isfinite(logits).all())
        return logits

    def rewind(self, parts: Sequence[NDArray[Any]], owner: str) -> list[NDArray[Any]]:
        """What is left to run of the parts of a prompt, none of them empty; at least one row.

        What it holds of another prompt, or for another owner, is forgotten.
        """
        left, kept = list(parts), 0
        # Numbers that are none spoil what is run after them, even where they are masked.
        is_good = self._is_sound and self._owner == owner
        self._owner = owner
        for run in self._runs if is_good else ():
            part, count = left[0], len(run.embeds)
            is_whole = count == len(part)
            if is_whole and len(left) == 1:
                break  # it is the logits after the last one that are wanted
            fits = is_whole or (run.is_step and count < len(part))
            if not fits or not np.array_equal(run.embeds, part[:count]):
                break
            left[:1] = [] if is_whole else [part[count:]]
            kept += 1
        del self._runs[kept:]
        self._length = sum(len(run.embeds) for run in self._runs)
        self._is_sound = True
        return left

    def enlarge(self, capacity: int) -> None:
        """Makes room for so many tokens; what it holds stays."""
        self._cache.enlarge(capacity, self.length)
