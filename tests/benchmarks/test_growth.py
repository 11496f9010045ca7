"""The exponents of what grows, and the conversations and videos that they are measured on."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.growth import Curve, frames, plot, tokens, turns, videos
from benchmarks.models import ROOT

from ppllava_runtime import Assistant

CLIP = ROOT / "examples" / "tiny_world" / "sample.mp4"
AMOUNTS = (2, 4, 8, 16)


def curve_of(*values: float) -> Curve:
    curve = Curve("work")
    for amount, value in zip(AMOUNTS, values, strict=True):
        curve.add(amount, value)
    return curve


def test_the_exponent_is_the_power_of_the_amount() -> None:
    square = curve_of(*(3 * amount**2 for amount in AMOUNTS))
    assert square.exponent == pytest.approx(2)
    assert square.last_step == pytest.approx(2)
    assert str(square).endswith("| 2.00 | 2.00 | NO |")
    # A fixed cost hides a slope, but least at the end.
    offset = curve_of(*(100 + 3 * amount for amount in AMOUNTS))
    assert 0 < offset.exponent < offset.last_step < 1
    assert str(offset).endswith("yes |")
    # Over all points this one would pass.
    late = curve_of(*(60 + amount**2 for amount in AMOUNTS))
    assert late.exponent < 1 < late.last_step
    assert str(late).endswith("NO |")


def test_every_kind_of_work_is_measured_on_a_real_bundle(bundle: Path, tmp_path: Path) -> None:
    assistant, clip = Assistant.open(bundle), CLIP
    panels = {"frames": frames(assistant, clip, (2, 4), 0)}
    _, kept, _ = panels["frames"]
    assert kept.exponent == pytest.approx(1, abs=1e-3)
    panels["tokens"] = tokens(assistant.watch(clip, 4), (4, 16), 0)
    panels["turn"] = turns(assistant.watch(clip, 4), 3, 8)
    panels["videos"] = videos(bundle, clip, (1, 2), 0)
    for curves in panels.values():
        for curve in curves:
            assert len(curve.amounts) == len(curve.values) == 2
            assert min(curve.values) > 0
    plot(panels, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
