"""A decoder on ONNX Runtime: one graph for prompt and steps, one cache that is written in place."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle, DecoderSpec
from ppllava_engines.errors import InternalError, UsageError
from ppllava_engines.onnxruntime import open_session
from ppllava_runtime.arrays import load_array
from ppllava_runtime.decoders.sampling import Sampling

# Isolated below ppllava_engines, which must be imported first (it switches telemetry off).
import onnxruntime as ort  # isort: skip

_CACHE_STEP = 256


class OnnxRuntimeDecoder:
    """A Decoder; see there.

    Args:
        session: Of the decoder graph.
        table: (V,D), the embedding of each id; usually memory-mapped.
        spec: What the manifest says of the two.
    """

    def __init__(
        self, session: ort.InferenceSession, table: NDArray[Any], spec: DecoderSpec
    ) -> None:
        self._session = session
        self._table = table
        self._spec = spec
        self._idle: _Cache | None = None

    @staticmethod
    def open(bundle: Bundle, threads: int | None = None) -> OnnxRuntimeDecoder:
        """The decoder of a bundle.

        Raises:
            DataError: The graph cannot be loaded, or the table is not what the manifest says.
        """
        spec = bundle.manifest.decoder
        shape = (spec.vocab_size, spec.width)
        table = load_array(bundle.file(spec.embedding), spec.dtype, shape)
        return OnnxRuntimeDecoder(open_session(bundle.file(spec.path), threads), table, spec)

    @property
    def max_positions(self) -> int:
        """The most tokens of prompt and answer together."""
        return self._spec.max_positions

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

    def _take_cache(self, needed: int) -> _Cache:
        """A cache that nobody uses: an answer that was left half-way keeps its own."""
        cache, self._idle = self._idle, None
        if cache is None or cache.capacity < needed:
            rounded = -(-needed // _CACHE_STEP) * _CACHE_STEP
            cache = _Cache(self._session, self._spec, min(rounded, self.max_positions))
        return cache


class _Cache:
    """Keys and values of up to `capacity` tokens, bound to the graph as its past and its present.

    Rewinding costs nothing: a run at length n overwrites whatever came after the first n tokens.
    """

    def __init__(self, session: ort.InferenceSession, spec: DecoderSpec, capacity: int) -> None:
        self.capacity = capacity
        self._session = session
        self._binding = session.io_binding()
        self._ones = np.ones((1, capacity), np.int64)
        dtype = np.dtype(spec.dtype).type
        self._logits = np.empty((1, 1, spec.vocab_size), dtype)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits))
        shape = (1, spec.num_kv_heads, capacity, spec.head_dim)
        for layer in range(spec.num_layers):
            for part in ("key", "value"):
                buffer = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, "cpu")
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", buffer)
                self._binding.bind_ortvalue_output(f"present.{layer}.{part}", buffer)

    def run(self, embeds: NDArray[Any], length: int) -> NDArray[np.float32]:
        """The logits (V,) after `embeds` (n,D), which follow the first `length` tokens."""
        # The mask's length is how the graph learns where these tokens stand.
        mask = self._ones[:, : length + len(embeds)]
        embeds = np.ascontiguousarray(embeds[None])
        try:
            self._binding.bind_cpu_input("inputs_embeds", embeds)
            self._binding.bind_cpu_input("attention_mask", mask)
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ORT's exceptions share no base class
            raise InternalError(f"decoder: ONNX Runtime failed: {error}") from error
        logits: NDArray[np.float32] = self._logits[0, 0].astype(np.float32)
        return logits
