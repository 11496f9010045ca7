"""The account of a process's memory adds up, on a tiny bundle."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peak_memory
from ppllava_runtime.assistant import Assistant
from tiny_videos import numbered_frames, write_video

LARGE = 300  # MB, several times what the imports of a runtime take


def test_weights_and_video_are_what_the_peak_is_set_against(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clip = write_video(tmp_path / "clip.mp4", numbered_frames(9))
    np.ones(LARGE * 10**6 // 8)  # the peak of this process must not be told for the other's
    asked = [str(bundle), str(clip), "--frames", "4"]
    monkeypatch.setattr(sys, "argv", ["peak_memory", *asked])
    peak_memory.main()
    said = capfd.readouterr().out
    stages = re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \|$", said, re.M)
    assert [stage for stage, *_ in stages] == [
        "imports",
        "graphs loaded",
        "video seen",
        "first id",
    ]
    peaks = [int(peak) for *_, peak in stages]
    assert peaks == sorted(peaks)
    assert peaks[0] < LARGE
    parts = [float(size) for size in re.findall(r"^weights in \S+: ([\d.]+)$", said, re.M)]
    found = re.search(r"^weights ([\d.]+) \+ video ([\d.]+) = ([\d.]+)$", said, re.M)
    assert found
    weights, video, least = map(float, found.groups())
    assert re.search(r"^mapped, not counted: decoder/embedding.npy: [\d.]+$", said, re.M)
    assert "embedding" not in "".join(re.findall(r"^weights in (\S+)", said, re.M))
    rounding = 0.05
    assert weights == pytest.approx(sum(parts), abs=rounding * (len(parts) + 1))
    assert least == pytest.approx(weights + video, abs=3 * rounding)
    kept = Assistant.open(bundle).watch(clip, 4).memory.nbytes / 1e6
    assert video == pytest.approx(kept, abs=rounding)
    assert f"peak {peaks[-1]} of " in said
