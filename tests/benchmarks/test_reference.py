"""The published order of computation, as a peer to measure against: is it the published one?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.reference import Reference

from ppllava_export.checkpoint import load_checkpoint

NAMES = ("clip", "clip_btadapter", "siglip")


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_gives_what_the_research_code_gave(golden: Path, name: str) -> None:
    reference = Reference.open(golden / name / "checkpoint")
    with np.load(golden / name / "expected.npz") as arrays:
        expected = dict(arrays)
    ids, mask = expected["clip_ids"], expected["clip_mask"]
    question = ids[:, : int(mask.sum())] if mask.size else ids
    config = load_checkpoint(golden / name / "checkpoint").config
    frames = expected["pixel_values"][:, 0]
    tokens = reference.tokens(frames)
    pooled, relevance = reference.align(tokens, question, config.window(len(frames)))
    for got, stage in ((tokens, "vision_tokens"), (pooled, "pooled"), (relevance, "relevance")):
        wanted = expected[stage] if stage == "vision_tokens" else expected[stage][0]
        assert got.shape == wanted.shape
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        assert error <= 2e-5, f"{stage}: {error:.1e}"
