"""A decoder on TensorRT: its cache stays on the GPU, and a step is launched as one CUDA graph."""

from __future__ import annotations

from ppllava_engines.bundle import Bundle
from ppllava_engines.tensorrt.cache import CachedDecoder
from ppllava_runtime.arrays import load_array
from ppllava_runtime.decoders.caching import Cache, CachingDecoder
from ppllava_runtime.lane import Lane


class TensorRTDecoder(CachingDecoder):
    """A Decoder; see there. Its table stays with the CPU: a step reads one row of it.

    Args:
        bundle: With plans for this machine.
        lane: See `CachingDecoder`.

    Raises:
        DataError: The table is not what the manifest says, or a plan is damaged.
        IncompatibleError, InternalError, NotFoundError, UnavailableError: See
            `TensorRTEngine.open`.
    """

    def __init__(self, bundle: Bundle, lane: Lane | None = None) -> None:
        spec = bundle.manifest.decoder
        shape = (spec.vocab_size, spec.width)
        table = load_array(bundle.file(spec.embedding), spec.dtype, shape)
        self._decoder = CachedDecoder.open(bundle)
        super().__init__(table, spec, min(spec.max_positions, self._decoder.capacity), lane)

    def _new_cache(self, capacity: int) -> Cache:
        return self._decoder.cache(capacity)
