"""The decoder's plan with its keys and values on the GPU: embeddings in, logits out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle, TensorSpec
from ppllava_engines.errors import InternalError
from ppllava_engines.tensorrt.device import ALIGNMENT, Device, Mirror
from ppllava_engines.tensorrt.engine import open_plan
from ppllava_engines.tensorrt.execution import Plan, itemsize
from ppllava_engines.tensorrt.profiles import Shape

_EMBEDS, _LENGTH, _LOGITS = "inputs_embeds", "length", "logits"
_PAST, _PRESENT = "past_key_values", "present"


class CachedDecoder:
    """The decoder's plan, and the memory that all its caches share: they run one after the other.

    Attributes:
        capacity: The most tokens that a cache may hold.

    Args:
        plan: The decoder's, see `decoder_graph.lower_decoder`.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        profiles = {profile.name: index for index, profile in enumerate(plan.profiles)}
        self._step = profiles["step"]
        prefill = profiles["prefill"]
        self._layout = _Layout([spec for spec in plan.inputs.values() if _PAST in spec.name])
        self.capacity = plan.profiles[self._step].shapes[self._layout.names[0]][2][2]
        # A longer prompt is taken in parts.
        self._most_at_once = plan.profiles[prefill].shapes[_EMBEDS][2][1]
        self._prefill = plan.execution(prefill)
        self._width = _fixed(plan.inputs[_EMBEDS], 2)
        self._dtype = np.dtype(plan.inputs[_EMBEDS].dtype)
        self._length = Mirror(plan.device, itemsize("int64"), "the length of the cache")
        self._vocabulary = _fixed(plan.outputs[_LOGITS], 2)
        self._logits = Mirror(plan.device, self._vocabulary * itemsize("float32"), "logits")
        # Steps keep theirs: the graphs that were captured of them know its addresses.
        self._for_steps = _NewTokens(plan.device, self, 1)
        self._for_prefill = self._for_steps

    @staticmethod
    def open(bundle: Bundle) -> CachedDecoder:
        """The decoder of a bundle, on this machine's GPU.

        Raises:
            DataError, IncompatibleError, InternalError, NotFoundError, UnavailableError: See
                `TensorRTEngine.open`.
        """
        plan, _ = open_plan(bundle, "decoder")
        return CachedDecoder(plan)

    def cache(self, capacity: int) -> Cache:
        """An empty cache for so many tokens, at most `self.capacity`.

        Raises:
            UnavailableError: The GPU has too little memory.
        """
        return Cache(self, capacity)

    def _room_for(self, num_tokens: int) -> _NewTokens:
        if num_tokens == 1:
            return self._for_steps
        if self._for_prefill.num_tokens < num_tokens:
            self._for_prefill = self._for_steps  # frees the old one before there is a new one
            self._for_prefill = _NewTokens(self._plan.device, self, num_tokens)
        return self._for_prefill


class Cache:
    """Keys and values of up to `capacity` tokens.

    Rewinding costs nothing: a run at length n overwrites whatever came after the first n tokens.

    Attributes:
        capacity: The most tokens.
    """

    def __init__(self, decoder: CachedDecoder, capacity: int) -> None:
        self.capacity = capacity
        self._decoder = decoder
        plan, size = decoder._plan, decoder._layout.num_bytes(capacity)
        self._buffer = plan.device.allocate(size, f"keys and values of {capacity} tokens")
        self._step = plan.execution(decoder._step)
        self._past = decoder._layout.addresses(self._buffer.pointer, capacity)

    def enlarge(self, capacity: int, length: int) -> None:
        """Makes room for so many tokens, more than before; the first `length` stay.

        Raises:
            InternalError: CUDA failed.
            UnavailableError: The GPU has too little memory: it holds both for a moment.
        """
        device, layout = self._decoder._plan.device, self._decoder._layout
        size = layout.num_bytes(capacity)
        buffer = device.allocate(size, f"keys and values of {capacity} tokens")
        device.clear(buffer.pointer, buffer.num_bytes)  # see `run`
        layout.copy(
            device, buffer.pointer, capacity, 0, self._buffer.pointer, self.capacity, length
        )
        device.synchronize()
        self._buffer, self.capacity = buffer, capacity
        self._past = layout.addresses(buffer.pointer, capacity)

    def run(self, embeds: NDArray[np.generic], length: int) -> NDArray[np.float32]:
        """The logits (V,) after `embeds` (n,D), which follow the first `length` tokens.

        Raises:
            InternalError: TensorRT or CUDA failed; or there is no room for so many tokens.
            UnavailableError: The GPU has too little memory.
        """
        if not len(embeds) or length + len(embeds) > self.capacity:
            raise InternalError(
                f"decoder: {len(embeds)} tokens after {length}, expected 1 or more and at most "
                f"{self.capacity} together"
            )
        decoder, most = self._decoder, self._decoder._most_at_once
        if not length:
            # What is masked is multiplied by zero, so it must be numbers: an answer that overflowed
            # would spoil all that come after it.
            decoder._plan.device.clear(self._buffer.pointer, self._buffer.num_bytes)
        for first in range(0, len(embeds), most):
            self._run(embeds[first : first + most], length + first)
        logits = decoder._logits.host.array((decoder._vocabulary,), np.float32)
        return logits.copy()

    def _run(self, embeds: NDArray[np.generic], length: int) -> None:
        decoder, num_tokens = self._decoder, len(embeds)
        device, layout = decoder._plan.device, decoder._layout
        # Nothing is in an empty cache, but TensorRT takes no empty tensor: one masked token.
        seen = self.capacity if length else 1
        execution = self._step if length and num_tokens == 1 else decoder._prefill
        new = decoder._room_for(num_tokens)
        shape = (1, num_tokens, decoder._width)
        new.embeds.host.array(shape, decoder._dtype)[0] = embeds
        new.embeds.upload(embeds.nbytes)
        decoder._length.host.array((1,), np.int64)[0] = length
        decoder._length.upload()
        execution.shape({_EMBEDS: shape, _LENGTH: (1,)} | layout.shapes(seen))
        execution.enqueue(
            {
                _EMBEDS: new.embeds.address,
                _LENGTH: decoder._length.address,
                _LOGITS: decoder._logits.address,
            }
            | self._past
            | new.present(num_tokens)
        )
        to, rows = self._buffer.pointer, new.rows.pointer
        layout.copy(device, to, self.capacity, length, rows, num_tokens, num_tokens)
        decoder._logits.download()
        device.synchronize()


class _NewTokens:
    """Memory for up to so many new tokens: their embeddings, and the rows that the plan makes."""

    def __init__(self, device: Device, decoder: CachedDecoder, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._layout = decoder._layout
        what = f"{num_tokens} tokens of a prompt"
        size = num_tokens * decoder._width * decoder._dtype.itemsize
        self.embeds = Mirror(device, size, what)
        self.rows = device.allocate(self._layout.num_bytes(num_tokens), what)

    def present(self, num_tokens: int) -> dict[str, int]:
        """Output → address, for so many tokens."""
        addresses = self._layout.addresses(self.rows.pointer, num_tokens)
        return {name.replace(_PAST, _PRESENT): address for name, address in addresses.items()}


class _Layout:
    """How keys and values of all layers lie one after the other in one piece of memory.

    Each part, (1,H,n,d) of n tokens, begins where TensorRT wants it to.
    """

    def __init__(self, specs: list[TensorSpec]) -> None:
        self.names = [spec.name for spec in specs]
        self._num_heads, self._head_dim = _fixed(specs[0], 1), _fixed(specs[0], 3)
        self._token = self._head_dim * itemsize(specs[0].dtype)  # bytes of one token in one head

    def shapes(self, num_tokens: int) -> dict[str, Shape]:
        """Input → shape, of so many tokens."""
        shape = (1, self._num_heads, num_tokens, self._head_dim)
        return dict.fromkeys(self.names, shape)

    def num_bytes(self, num_tokens: int) -> int:
        """Of all parts together."""
        return len(self.names) * self._pitch(num_tokens)

    def addresses(self, start: int, num_tokens: int) -> dict[str, int]:
        """Input → address, where the memory starts there."""
        pitch = self._pitch(num_tokens)
        return {name: start + part * pitch for part, name in enumerate(self.names)}

    def copy(
        self,
        device: Device,
        target: int,
        target_tokens: int,
        at: int,
        source: int,
        source_tokens: int,
        num_tokens: int,
    ) -> None:
        """Copies the first tokens of one piece of memory behind the first `at` of another, later.

        Args:
            device: Where both are.
            target: Address of the other.
            target_tokens: For how many tokens it is laid out.
            at: The tokens in it that stay.
            source: Address of the one.
            source_tokens: For how many tokens that is laid out.
            num_tokens: How many are copied.
        """
        num_parts, heads = len(self.names), self._num_heads
        rows_to, rows_from = target_tokens * self._token, source_tokens * self._token
        to, from_ = self._pitch(target_tokens), self._pitch(source_tokens)
        if (to, from_) == (heads * rows_to, heads * rows_from):
            # Nothing lies between the parts, so all their heads are rows of one copy.
            num_parts, heads = 1, num_parts * heads
        target += at * self._token
        for part in range(num_parts):
            places = (target + part * to, rows_to, source + part * from_, rows_from)
            device.copy_rows(*places, num_tokens * self._token, heads)

    def _pitch(self, num_tokens: int) -> int:
        size = self._num_heads * num_tokens * self._token
        return -(-size // ALIGNMENT) * ALIGNMENT


def _fixed(spec: TensorSpec, axis: int) -> int:
    size = spec.shape[axis]
    if not isinstance(size, int):
        raise InternalError(f"decoder: {spec.name} is {spec}, expected a fixed axis {axis}")
    return size
