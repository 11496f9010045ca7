"""What the tests of the runtime share, where they have nothing of their own by these names."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppllava_runtime import Assistant, MemoryStore
from tiny_videos import numbered_frames, write_video

VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "videos"


@pytest.fixture(scope="session")
def real() -> Path:
    """A folder of real clips."""
    if not VIDEOS.is_dir():
        pytest.skip(f"no real clips: {VIDEOS} is not here")
    return VIDEOS


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 24 numbered frames."""
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return write_video(path, numbered_frames(24), options={"g": "10"})


@pytest.fixture
def assistant(bundle: Path) -> Assistant:
    """One that remembers what it watched."""
    return Assistant.open(bundle, store=MemoryStore(10**8))
