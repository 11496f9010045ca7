"""A decoder on ONNX Runtime: one graph for prompt and steps, one cache that is written in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle, DecoderSpec
from ppllava_engines.errors import InternalError
from ppllava_engines.manifest import ROWS_BEFORE_PREFILL
from ppllava_engines.onnxruntime import open_session
from ppllava_runtime.arrays import load_array
from ppllava_runtime.decoders.caching import Cache, CachingDecoder
from ppllava_runtime.lane import Lane

# Isolated below ppllava_engines, which must be imported first (it switches telemetry off).
import onnxruntime as ort  # isort: skip


class OnnxRuntimeDecoder(CachingDecoder):
    """A Decoder; see there.

    Args:
        step: Of the decoder graph.
        prefill: Of the graph for prompts; None where there is only the one.
        table: (V,D), the embedding of each id; usually memory-mapped.
        spec: What the manifest says of these.
        lane: See `CachingDecoder`.
    """

    def __init__(
        self,
        step: ort.InferenceSession,
        prefill: ort.InferenceSession | None,
        table: NDArray[Any],
        spec: DecoderSpec,
        lane: Lane | None = None,
    ) -> None:
        super().__init__(table, spec, spec.max_positions, lane)
        self._step = step
        self._prefill = prefill

    @staticmethod
    def open(
        bundle: Bundle, threads: int | None = None, lane: Lane | None = None
    ) -> OnnxRuntimeDecoder:
        """The decoder of a bundle.

        Raises:
            DataError: A graph cannot be loaded, or the table is not what the manifest says.
        """
        spec = bundle.manifest.decoder
        shape = (spec.vocab_size, spec.width)
        table = load_array(bundle.file(spec.embedding), spec.dtype, shape)
        step = open_session(bundle.file(spec.path), threads, awake=True)
        prefill = open_session(bundle.file(spec.prefill), threads) if spec.prefill else None
        return OnnxRuntimeDecoder(step, prefill, table, spec, lane)

    def _new_cache(self, capacity: int) -> Cache:
        return _Cache(self._step, self._prefill, self._spec, capacity)


class _Cache:
    """A Cache, whose memory is bound to both graphs as their past and their present at once."""

    def __init__(
        self,
        step: ort.InferenceSession,
        prefill: ort.InferenceSession | None,
        spec: DecoderSpec,
        capacity: int,
    ) -> None:
        self.capacity = 0
        self._dtype = np.dtype(spec.dtype).type
        self._heads = (spec.num_kv_heads, spec.head_dim)
        self._names = [
            f"{layer}.{part}" for layer in range(spec.num_layers) for part in ("key", "value")
        ]
        self._buffers: dict[str, NDArray[Any]] = {}
        self._logits = np.empty((1, 1, spec.vocab_size), self._dtype)
        self._sessions = {"step": step} | ({"prefill": prefill} if prefill else {})
        self._bindings = {name: each.io_binding() for name, each in self._sessions.items()}
        logits = ort.OrtValue.ortvalue_from_numpy(self._logits)
        for binding in self._bindings.values():
            binding.bind_ortvalue_output("logits", logits)
        self.enlarge(capacity, 0)

    def enlarge(self, capacity: int, length: int) -> None:
        """Makes room for so many tokens, more than before; the first `length` stay."""
        num_heads, head_dim = self._heads
        for name in self._names:  # one after the other, so that little is held twice
            buffer = np.empty((1, num_heads, capacity, head_dim), self._dtype)
            if length:
                buffer[:, :, :length] = self._buffers[name][:, :, :length]
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            for binding in self._bindings.values():
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                binding.bind_ortvalue_output(f"present.{name}", value)
            self._buffers[name] = buffer
        self._ones = np.ones((1, capacity), np.int64)
        self.capacity = capacity

    def run(self, embeds: NDArray[Any], length: int) -> NDArray[np.float32]:
        """The logits (V,) after `embeds` (n,D), which follow the first `length` tokens."""
        first = len(embeds)
        if "prefill" in self._sessions and first > ROWS_BEFORE_PREFILL:
            first = max(0, ROWS_BEFORE_PREFILL - length)
        if first:
            self._run("step", embeds[:first], length)
        if first < len(embeds):
            self._run("prefill", embeds[first:], length + first)
        logits: NDArray[np.float32] = self._logits[0, 0].astype(np.float32)
        return logits

    def _run(self, kind: str, embeds: NDArray[Any], length: int) -> None:
        binding = self._bindings[kind]
        # The mask's length is how the graph learns where these tokens stand.
        mask = self._ones[:, : length + len(embeds)]
        embeds = np.ascontiguousarray(embeds[None])
        try:
            binding.bind_cpu_input("inputs_embeds", embeds)
            binding.bind_cpu_input("attention_mask", mask)
            self._sessions[kind].run_with_iobinding(binding)
        except Exception as error:  # ORT's exceptions share no base class
            raise InternalError(f"decoder: ONNX Runtime failed: {error}") from error
