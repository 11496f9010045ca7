"""Checkpoints of both families that a test may break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tiny_checkpoint import write_checkpoint


@pytest.fixture
def clip(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the CLIP family's checkpoint that a test may break."""
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return tmp_path / "copy" / checkpoint.name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("siglip"), family="siglip")


@pytest.fixture
def siglip(written: Path, tmp_path: Path) -> Path:
    """A copy of the SigLIP family's checkpoint that a test may break."""
    shutil.copytree(written.parent, tmp_path / "siglip")
    return tmp_path / "siglip" / written.name
