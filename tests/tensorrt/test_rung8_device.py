"""Rung 8: what only a device can show. Without a GPU and TensorRT it prints NOT RUN, and why."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ppllava_engines import native
from ppllava_engines.bundle import Bundle
from ppllava_engines.devices import find_gpu
from ppllava_engines.tensorrt.builder import is_installed
from ppllava_export import export_bundle
from tiny_checkpoint import write_checkpoint

PRECISIONS = {
    "fp32": {},
    "fp16": {},
    "fp16-int4": {"decoder": "int4"},
    "siglip-fp16": {},
}
# As of the op's sweep on the CPU; plans are built without TF32.
TOLERANCES = {"float16": 2e-3, "float32": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def on_a_device() -> None:
    """Skips whatever is here where it cannot be run."""
    missing = [] if find_gpu() else ["a GPU"]
    missing += [] if is_installed("tensorrt") else ["TensorRT"]
    if missing:
        pytest.skip(f"NOT RUN: {', '.join(missing)} is missing: run this on the device")


@pytest.fixture(scope="module", params=PRECISIONS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny bundle with plans that TensorRT built for this GPU."""
    folder = tmp_path_factory.mktemp("device")
    family = "siglip" if request.param.startswith("siglip") else "clip"
    dtype = "fp32" if request.param == "fp32" else "fp16"
    checkpoint = write_checkpoint(folder, family=family)  # type: ignore[arg-type]
    export_bundle(checkpoint, folder / "bundle", dtype, **PRECISIONS[request.param])  # type: ignore[arg-type]
    command("ppllava_engines.build", folder / "bundle")
    return Bundle.open(folder / "bundle")


def command(module: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_bundle_passes_its_check_on_the_device(built: Bundle) -> None:
    said = command("ppllava_runtime.check", built.path, "--device", "tensorrt")
    assert "decoder" in said


@pytest.mark.parametrize("frames", [1, 2, 7, 64])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((3, 2, 4), (1, 2, 1)),
        ((1, 4, 3), (2, 1, 1)),
    ],
)
def test_the_plugin_pools_as_the_cpu_does(
    built: Bundle, frames: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    if native.find_library(native.PLUGIN) is None:
        pytest.skip("NOT RUN: the plugin library was not compiled")
    on_cpu = built.engine("pool")
    on_gpu = built.engine("pool", device="tensorrt")
    if frames < kernel[0]:
        pytest.skip("no windows: TensorRT has no use for empty tensors")
    if "kernel" not in {tensor.name for tensor in on_gpu.inputs}:
        pytest.skip("the windows of this plan are baked in")
    rng = np.random.default_rng(frames)
    feeds = {
        tensor.name: rng.standard_normal(
            [axis if isinstance(axis, int) else frames for axis in tensor.shape]
        ).astype(tensor.dtype)
        for tensor in on_cpu.inputs
        if tensor.name not in ("kernel", "stride")
    }
    feeds |= {"kernel": np.array(kernel, np.int64), "stride": np.array(stride, np.int64)}
    expected, got = on_cpu.run(feeds), on_gpu.run(feeds)
    for name, value in expected.items():
        there = np.asarray(got[name], np.float64)
        scale = np.abs(value.astype(np.float64)).max()
        assert np.abs(there - value).max() <= TOLERANCES[str(value.dtype)] * scale, name


def test_trtexec_runs_a_plan(built: Bundle) -> None:
    tool = shutil.which("trtexec") or shutil.which("/usr/src/tensorrt/bin/trtexec")
    if tool is None:
        pytest.skip("NOT RUN: trtexec is not here")
    (plan,) = built.path.glob("plans/*/text.plan")
    done = subprocess.run([tool, f"--loadEngine={plan}"], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
