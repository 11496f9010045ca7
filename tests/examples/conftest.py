"""Fixtures over the committed checkpoint of examples/tiny_world."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY_WORLD = Path(__file__).resolve().parents[2] / "examples" / "tiny_world"


@pytest.fixture(scope="session")
def tiny_world() -> Path:
    """The folder with checkpoint/, clip/ and sample.mp4."""
    return TINY_WORLD


@pytest.fixture(scope="session")
def tiny_world_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp16 bundle of the committed checkpoint."""
    from ppllava_export import export_bundle

    out = tmp_path_factory.mktemp("tiny_world") / "bundle"
    export_bundle(TINY_WORLD / "checkpoint", out, "fp16")
    return out
