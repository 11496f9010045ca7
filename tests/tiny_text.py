"""Sentences to train a tiny tokenizer on."""

from __future__ import annotations

import random
from collections.abc import Iterator

WORDS = ["USER", "the", "red", "green", "square", "circle", "moves", "left", "what", "is", "seen"]


def sentences() -> Iterator[str]:
    chance = random.Random(0)
    yield "0123456789:?!.,"
    for _ in range(300):
        yield " ".join(chance.choice(WORDS) for _ in range(8))
