"""What the tests of the runtime share."""

from __future__ import annotations

from pathlib import Path

import pytest

VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "videos"


@pytest.fixture(scope="session")
def real() -> Path:
    """A folder of real clips."""
    if not VIDEOS.is_dir():
        pytest.skip(f"no real clips: {VIDEOS} is not here")
    return VIDEOS
