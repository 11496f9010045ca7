"""What decoders with a cache of keys and values share: they differ in what one is."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import DecoderSpec
from ppllava_engines.errors import UsageError
from ppllava_runtime.decoders.sampling import Sampling

_CACHE_STEP = 256


class Cache(Protocol):
    """Keys and values of up to `capacity` tokens.

    Rewinding costs nothing: a run at length n overwrites whatever came after the first n tokens.
    """

    capacity: int

    def run(self, embeds: NDArray[Any], length: int) -> NDArray[np.float32]:
        """The logits (V,) after `embeds` (n,D), which follow the first `length` tokens."""
        ...


class CachingDecoder:
    """A Decoder, but for `_new_cache`; see there.

    Args:
        table: (V,D), the embedding of each id; usually memory-mapped.
        spec: What the manifest says of the decoder.
        max_positions: The most tokens of prompt and answer together.
    """

    def __init__(self, table: NDArray[Any], spec: DecoderSpec, max_positions: int) -> None:
        self._table = table
        self._spec = spec
        self._max_positions = max_positions
        self._idle: Cache | None = None

    @property
    def max_positions(self) -> int:
        """The most tokens of prompt and answer together."""
        return self._max_positions

    def embed(self, ids: Sequence[int]) -> NDArray[Any]:
        """(n,D): the embeddings of `ids`."""
        return np.asarray(self._table[list(ids)])

    def generate(
        self, prompt_embeds: NDArray[Any], max_new_tokens: int, sampling: Sampling
    ) -> Generator[int, None, None]:
        """The ids of the answer one by one; see `Decoder.generate`."""
        length = len(prompt_embeds)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
        if length >= self.max_positions:
            raise UsageError(
                f"the prompt is {length} tokens long and the model holds {self.max_positions} with "
                "its answer: pool the video to fewer tokens, or shorten the question"
            )
        return self._generate(prompt_embeds, max_new_tokens, sampling)

    def _new_cache(self, capacity: int) -> Cache:
        """An empty cache for so many tokens, at most `max_positions`."""
        raise NotImplementedError

    def _generate(
        self, prompt_embeds: NDArray[Any], max_new_tokens: int, sampling: Sampling
    ) -> Generator[int, None, None]:
        # The last id is never fed back, so it needs no place in the cache.
        needed = min(len(prompt_embeds) + max_new_tokens - 1, self.max_positions)
        random = np.random.default_rng(sampling.seed)
        cache = self._take_cache(needed)
        try:
            embeds, length = prompt_embeds, 0
            for _ in range(max_new_tokens):
                logits = cache.run(embeds, length)
                length += len(embeds)
                token = sampling.pick(logits, random)
                if token in self._spec.eos_token_ids:
                    return
                yield token
                if length == self.max_positions:
                    return
                embeds = self.embed([token])
        finally:
            self._idle = cache

    def _take_cache(self, needed: int) -> Cache:
        """A cache that nobody uses: an answer that was left half-way keeps its own."""
        cache, self._idle = self._idle, None
        if cache is None or cache.capacity < needed:
            cache = None  # its memory may be needed for the larger one
            rounded = -(-needed // _CACHE_STEP) * _CACHE_STEP
            cache = self._new_cache(min(rounded, self.max_positions))
        return cache
