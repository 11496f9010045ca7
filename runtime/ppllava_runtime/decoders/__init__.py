"""Language models as the runtime sees them: embeddings in, ids out. No strings, no video."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from ppllava_runtime.decoders.sampling import Constraint, Sampling

FinishReason = Literal["stop", "length"]


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
        self,
        parts: Sequence[NDArray[Any]],
        max_new_tokens: int,
        sampling: Sampling,
        constraint: Constraint | None = None,
        owner: str = "",
    ) -> Generator[int, None, FinishReason]:
        """The ids of the answer one by one, each computed when it is asked for.

        Ends before an end token or when `constraint` is finished ("stop"), after `max_new_tokens`
        or when all positions are used ("length"). Several may be alive at once, in one thread or in
        several, and one may be dropped half-way: they do not disturb each other.

        The parts of a prompt are run one after another, and those that the last prompt began with
        as well, if it had the same owner, are not run again. The answer is the same, to the last
        bit, as if they were. Only the ids of an earlier answer may come in one part with what
        follows them: they are not run again either, though a decoder that has forgotten them rounds
        them differently.

        Args:
            parts: Of the prompt: (n,D) each, in the dtype that `embed` gives; not all empty.
            max_new_tokens: At least 1.
            sampling: How each id is picked.
            constraint: What ids may come; used up by this answer.
            owner: Whose it is: how soon the first id comes tells nobody what others asked.

        Raises:
            UsageError: At once: a prompt of nothing or that leaves no position for an answer, or
                `max_new_tokens` below 1.
        """
        ...


__all__ = ["Constraint", "Decoder", "FinishReason", "Sampling"]
