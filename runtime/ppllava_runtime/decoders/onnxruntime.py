"""A decoder on ONNX Runtime: one graph for prompt and steps, one cache that is written in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle, DecoderSpec
from ppllava_engines.errors import InternalError
from ppllava_engines.onnxruntime import open_session
from ppllava_runtime.arrays import load_array
from ppllava_runtime.decoders.caching import Cache, CachingDecoder

# Isolated below ppllava_engines, which must be imported first (it switches telemetry off).
import onnxruntime as ort  # isort: skip


class OnnxRuntimeDecoder(CachingDecoder):
    """A Decoder; see there.

    Args:
        session: Of the decoder graph.
        table: (V,D), the embedding of each id; usually memory-mapped.
        spec: What the manifest says of the two.
    """

    def __init__(
        self, session: ort.InferenceSession, table: NDArray[Any], spec: DecoderSpec
    ) -> None:
        super().__init__(table, spec, spec.max_positions)
        self._session = session

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

    def _new_cache(self, capacity: int) -> Cache:
        return _Cache(self._session, self._spec, capacity)


class _Cache:
    """A Cache, whose memory is bound to the graph as its past and its present at once."""

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
