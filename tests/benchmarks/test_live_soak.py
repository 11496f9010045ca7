"""The soak of live video, for some seconds instead of minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.live_soak import main, soak

from tiny_videos import numbered_frames, write_video


def test_answers_and_recovers_and_does_not_grow(bundle: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", numbered_frames(40), fps=25)
    report = soak(bundle, video, 8.0, num_questions=8, num_drops=4, fps=25, kind="rtsp")
    assert report.num_answers == 8
    assert report.num_recovered == report.num_drops == 4
    assert report.num_kept > 10  # of some 200, most of which a busy machine may drop or not send
    assert report.num_frames >= report.num_kept + report.num_dropped
    # Too short for the real limit: what the allocator keeps at the start is in it.
    assert report.growth < 32e6


def test_says_what_was_found(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(tmp_path / "clip.mp4", numbered_frames(40), fps=25)
    told = ("--minutes", "0.05", "--questions", "2", "--drops", "1000", "--fps", "25")
    assert main([str(bundle), str(video), *told]) == 1
    out = capsys.readouterr().out
    assert "of 1000 drops recovered" in out
    assert "2 of 2 questions answered" in out
    assert "MB an hour" in out
    assert out.endswith("verdict: NOT GOOD\n")
