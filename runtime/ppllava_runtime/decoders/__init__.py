"""Language models as the runtime sees them: embeddings in, ids out. No strings, no video."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from ppllava_runtime.decoders.sampling import Sampling


class Decoder(Protocol):
    """A language model on a device."""

    @property
    def max_positions(self) -> int:
        """The most tokens of prompt and answer together."""
        ...

    def embed(self, ids: Sequence[int]) -> NDArray[Any]:
        """(n,D): the embeddings of `ids`."""
        ...

    def generate(
        self, prompt_embeds: NDArray[Any], max_new_tokens: int, sampling: Sampling
    ) -> Generator[int, None, None]:
        """The ids of the answer one by one, each computed when it is asked for.

        Ends before an end token, after `max_new_tokens`, or when all positions are used. Several
        may be alive at once, and one may be dropped half-way: they do not disturb each other.

        Args:
            prompt_embeds: (n,D), n ≥ 1, in the dtype that `embed` gives.
            max_new_tokens: At least 1.
            sampling: How each id is picked.

        Raises:
            UsageError: At once: a prompt that leaves no position for an answer, or
                `max_new_tokens` below 1.
        """
        ...


__all__ = ["Decoder", "Sampling"]
