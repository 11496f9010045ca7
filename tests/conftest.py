"""Fixtures for all tests: a tiny checkpoint, its bundles, and the golden files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"

# The same examples every time, and none that fails because the machine is busy.
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("tests")

# Imports are in the fixtures: a test of one package needs no other.


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the CLIP family with tiny random weights; not to be changed."""
    from tiny_checkpoint import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of `checkpoint`; not to be changed."""
    from ppllava_export import export_bundle

    out = tmp_path_factory.mktemp("fp32") / "bundle"
    export_bundle(checkpoint, out, "fp32")
    return out


@pytest.fixture(scope="session")
def bundle_fp16(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp16 bundle of `checkpoint`; not to be changed."""
    from ppllava_export import export_bundle

    out = tmp_path_factory.mktemp("fp16") / "bundle"
    export_bundle(checkpoint, out, "fp16")
    return out


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden checkpoints and of what the reference code returned for them."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden files: {GOLDEN} is not here")
    return GOLDEN
