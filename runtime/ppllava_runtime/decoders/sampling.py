"""Picking the next id from logits, among those that may come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import UsageError


class Constraint(Protocol):
    """What ids of one answer may come, given those that came; there is always one."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, and nothing can follow."""
        ...

    def allowed(self) -> NDArray[np.bool_]:
        """(V,): the ids that may come next; one that ends an answer may where that is complete."""
        ...

    def accept(self, token: int) -> None:
        """Takes the id that came, one of those allowed."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How ids are picked; by default always the most likely one.

    Attributes:
        temperature: 0 picks the most likely id; 1 samples as the model says; more is wilder.
        top_p: Sample among the most likely ids that together reach this probability, in (0,1].
        top_k: Sample among this many ids; 0 is all.
        seed: The same seed gives the same answer; None gives another each time.

    Raises:
        UsageError: A value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}, expected 0 or more")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}, expected 0 or more")

    def pick(self, logits: NDArray[Any], random: np.random.Generator) -> int:
        """The next id, given its logits (V,) and a source of chance."""
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits.astype(np.float64), kind="stable")
        order = order[: self.top_k or None]
        scaled = logits[order].astype(np.float64)
        with np.errstate(over="ignore"):  # what a tiny temperature makes infinite weighs nothing
            weights = np.exp((scaled - scaled[0]) / self.temperature)
        reached = np.cumsum(weights / weights.sum())
        # The id that crosses top_p is the last one taken, so there always is one.
        reached = reached[: int(np.searchsorted(reached, self.top_p)) + 1]
        return int(order[np.searchsorted(reached, random.random() * reached[-1], side="right")])
