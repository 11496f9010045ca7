"""What speed may cost, on as many clips as a test can ask about, and how it is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.gates import INT8, OPENVINO, SETTINGS, Gate, Setting, measure
from benchmarks.reference import rank_correlation

CLIPS = 20
# Each of the others is a part of these.
TESTED = (
    Setting(memory="hidden-int8"),
    Setting(INT8),
    Setting(INT8, memory="tokens"),
)


@pytest.mark.slow
def test_fast_bundles_and_small_memories_answer_as_float32(tmp_path: Path) -> None:
    """Of 20 answers 99 % are all of them."""
    for gate in measure(TESTED, CLIPS, tmp_path):
        assert gate.clips == len(gate.correlations) == CLIPS
        assert gate.passes, str(gate)


def test_ranks_are_compared_and_not_values() -> None:
    values = np.random.default_rng(0).standard_normal((2, 3, 4))
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1)
    assert rank_correlation(values, -(values**3)) == pytest.approx(-1)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3: covariance 3/2 of variances 3/2 and 2.
    tied, plain = np.array([4.0, 4.0, 9.0]), np.array([0.0, 1.0, 2.0])
    assert rank_correlation(tied, plain) == pytest.approx(1.5 / np.sqrt(1.5 * 2))


@pytest.mark.parametrize(
    ("equal", "correlations", "passes"),
    [(99, [1.0, 0.98], True), (98, [1.0, 1.0], False), (100, [1.0, 0.979], False)],
)
def test_a_gate_passes_at_99_percent_of_both(
    equal: int, correlations: list[float], passes: bool
) -> None:
    assert Gate(Setting(), 100, equal, correlations).passes is passes


def test_a_setting_is_named_by_what_its_bundle_and_memory_are() -> None:
    setting = Setting({"decoder": "int8", "prefill": "int8"}, memory="tokens")
    assert str(setting) == "fp32, decoder int8, prefill int8, memory tokens, cpu"
    everything = (*SETTINGS, *OPENVINO)
    assert len({str(setting) for setting in everything}) == len(everything)
