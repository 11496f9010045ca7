"""The TensorRT backend on doubles of CUDA and TensorRT: its logic, and nothing about a GPU."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_double import CudaDouble, Error, Stray
from ppllava_engines.bundle import Bundle
from ppllava_engines.engine import Engine
from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from ppllava_engines.tensorrt.device import Device, DeviceArray
from ppllava_engines.tensorrt.engine import TensorRTEngine
from ppllava_engines.tensorrt.execution import Plan
from ppllava_engines.tensorrt.plans import Record
from tensorrt_double import MEMORY, Doubles, install, write_plans

# Of the largest magnitude: the lowered graphs add up in another order.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def planned(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with the double's plans; its pooling is baked in, as without a plugin."""
    folder = tmp_path_factory.mktemp("planned")
    shutil.copytree(bundle, folder / "bundle")
    opened = Bundle.open(folder / "bundle")
    write_plans(opened, folder / "graphs", frames=6)
    return opened


@pytest.fixture(params=[False, True], ids=["discrete", "integrated"])
def doubles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Doubles:
    return install(monkeypatch, CudaDouble(MEMORY, integrated=request.param))


def pixels(bundle: Bundle, num_frames: int, seed: int = 0) -> NDArray[Any]:
    (spec,) = bundle.manifest.graphs["vision"].inputs
    random = np.random.default_rng(seed)
    shape = [num_frames, *(axis for axis in spec.shape if isinstance(axis, int))]
    return random.standard_normal(shape).astype(spec.dtype)


def window(bundle: Bundle) -> dict[str, NDArray[np.int64]]:
    model = bundle.manifest.model
    return {"kernel": np.array(model.kernel), "stride": np.array(model.stride)}


def question(length: int = 5) -> NDArray[np.int64]:
    return np.arange(1, length + 1)[None]


def agree(got: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=CLOSE * np.abs(array).max())


def remember(engine: Engine, values: NDArray[Any], step: int = 2) -> dict[str, Any]:
    """keys and hidden of all frames on the device, `step` of them at a time."""
    kept = {name: engine.empty(name, len(values)) for name in ("keys", "hidden")}
    for first in range(0, len(values), step):
        part = slice(first, first + step)
        rest = engine.run({"pixel_values": values[part]}, {n: a[part] for n, a in kept.items()})
        assert rest == {}
    return kept


@pytest.mark.usefixtures("doubles")
def test_what_is_kept_on_the_device_is_pooled_there(planned: Bundle) -> None:
    values = pixels(planned, 5)
    found = {}
    for device in ("cpu", "tensorrt"):
        vision, text, pool = (
            planned.engine(name, device=device) for name in ("vision", "text", "pool")
        )
        kept = remember(vision, values)
        assert isinstance(kept["hidden"], DeviceArray) == (device == "tensorrt")
        asked = text.run({"input_ids": question()})
        found[device] = pool.run(kept | asked | window(planned))
        found[device] |= {name: np.asarray(array) for name, array in kept.items()}
    agree(found["tensorrt"], found["cpu"])


def test_a_shape_that_stays_becomes_one_graph(planned: Bundle, doubles: Doubles) -> None:
    engine, cpu = planned.engine("vision", device="tensorrt"), planned.engine("vision")
    launches = doubles.cuda.calls
    for seed in range(4):
        feeds = {"pixel_values": pixels(planned, 3, seed)}
        agree(engine.run(feeds), cpu.run(feeds))
    # The first run prepares what a capture may not.
    assert (launches["cudaStreamBeginCapture"], launches["cudaGraphLaunch"]) == (1, 3)
    for _ in range(2):
        feeds = {"pixel_values": pixels(planned, 2)}
        agree(engine.run(feeds), cpu.run(feeds))
    assert (launches["cudaStreamBeginCapture"], launches["cudaGraphLaunch"]) == (2, 4)
    # What was captured first is gone: its context has other shapes now.
    assert launches["cudaGraphExecDestroy"] == 1


def test_what_cannot_be_captured_runs_as_it_is(planned: Bundle, doubles: Doubles) -> None:
    engine, cpu = planned.engine("vision", device="tensorrt"), planned.engine("vision")
    doubles.faults["capture"] = "a loop decides on the CPU"
    for seed in range(4):
        feeds = {"pixel_values": pixels(planned, 3, seed)}
        agree(engine.run(feeds), cpu.run(feeds))
    assert doubles.cuda.calls["cudaGraphLaunch"] == 0
    assert doubles.cuda.calls["cudaStreamBeginCapture"] == 1  # tried once


def test_memory_is_allocated_once_and_freed_at_once(planned: Bundle, doubles: Doubles) -> None:
    engine = planned.engine("vision", device="tensorrt")
    engine.run({"pixel_values": pixels(planned, 1)})
    allocations, used = doubles.cuda.num_allocations, doubles.cuda.used
    for num_frames in (4, 2, 4, 3):
        engine.run({"pixel_values": pixels(planned, num_frames)})
    assert (doubles.cuda.num_allocations, doubles.cuda.used) == (allocations, used)
    kept = remember(engine, pixels(planned, 4))
    with_kept = doubles.cuda.used
    del engine
    gc.collect()
    assert 0 < doubles.cuda.used < with_kept  # what was kept outlives its engine
    assert np.isfinite(kept["hidden"]).all()
    kept.clear()
    gc.collect()
    assert doubles.cuda.used == 0


def test_a_result_is_the_callers_own(planned: Bundle, doubles: Doubles) -> None:
    assert doubles.cuda.used == 0
    engine = planned.engine("vision", device="tensorrt")
    first = engine.run({"pixel_values": pixels(planned, 2)})["keys"]
    before = first.copy()
    engine.run({"pixel_values": pixels(planned, 2, seed=1)})
    np.testing.assert_array_equal(first, before)


def test_rows_are_read_where_they_begin(planned: Bundle, doubles: Doubles) -> None:
    """TensorRT takes no address in the middle of an array that is not aligned."""
    device = Device()
    values = pixels(planned, 3)
    # One element before them, so that they begin at no multiple of 256 bytes.
    flat = np.concatenate([np.zeros(1, values.dtype), values.ravel()])
    buffer = device.allocate(flat.nbytes, "a test")
    device.copy(buffer.pointer, flat.ctypes.data, flat.nbytes)
    device.synchronize()
    array = buffer.array(values.shape, values.dtype, offset=flat.itemsize)
    engine = planned.engine("vision", device="tensorrt")
    agree(engine.run({"pixel_values": array}), engine.run({"pixel_values": values}))
    whole = np.asarray(array[1:])
    np.testing.assert_array_equal(whole, values[1:])
    assert len(array[1:2]) == 1
    with pytest.raises(InternalError, match=r"a buffer of .* bytes has no room for"):
        buffer.array(values.shape, values.dtype, offset=1024)
    assert doubles.cuda.used > 0


class TestShapes:
    def test_outside_every_profile(self, planned: Bundle, doubles: Doubles) -> None:
        assert doubles.cuda.used == 0
        engine = planned.engine("vision", device="tensorrt")
        with pytest.raises(DataError) as caught:
            engine.run({"pixel_values": pixels(planned, 5)})
        side = planned.manifest.model.image_size
        shape = f"3,{side},{side}"
        assert str(caught.value) == (
            f"vision: pixel_values is 5,{shape}, but the plan takes pixel_values from 1,{shape} to "
            f"4,{shape}: give fewer frames at a time, or run ppllava-build with more --frames"
        )

    @pytest.mark.usefixtures("doubles")
    def test_not_the_graphs(self, planned: Bundle) -> None:
        engine = planned.engine("text", device="tensorrt")
        with pytest.raises(DataError, match=r"text: input input_ids is int32 .*, expected int64"):
            engine.run({"input_ids": question().astype(np.int32)})
        with pytest.raises(DataError, match="text: text_embed is to be kept in a ndarray of 1,"):
            width = planned.manifest.model.key_width
            engine.run({"input_ids": question()}, {"text_embed": np.empty((1, width))})

    def test_a_window_that_is_not_the_plans(self, planned: Bundle, doubles: Doubles) -> None:
        pool, vision = (planned.engine(name, device="tensorrt") for name in ("pool", "vision"))
        kept = remember(vision, pixels(planned, 4))
        asked = planned.engine("text").run({"input_ids": question()})
        other = window(planned) | {"kernel": np.array([1, 1, 1])}
        doubles.faults["execute"] = "this is for the CPU"
        found = pool.run(kept | asked | other)
        on_cpu = {name: np.asarray(array) for name, array in kept.items()}
        agree(found, planned.engine("pool").run(on_cpu | asked | other))
        with pytest.raises(InternalError, match="pool: TensorRT failed: this is for the CPU"):
            pool.run(kept | asked | window(planned))


def test_windows_are_inputs_where_a_plugin_pools(
    bundle: Path, tmp_path: Path, doubles: Doubles
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    write_plans(opened, tmp_path / "graphs", pool_node="inputs", frames=6)
    vision, pool = (opened.engine(name, device="tensorrt") for name in ("vision", "pool"))
    kept = remember(vision, pixels(opened, 4))
    feeds = kept | opened.engine("text").run({"input_ids": question()})
    on_cpu = {name: np.asarray(array) for name, array in feeds.items()}
    cpu = opened.engine("pool")
    for kernel, stride in (((2, 2, 2), (2, 2, 2)), ((1, 1, 1), (1, 1, 1)), ((2, 2, 2), (1, 1, 1))):
        asked = {"kernel": np.array(kernel), "stride": np.array(stride)}
        for _ in range(2):
            agree(pool.run(feeds | asked), cpu.run(on_cpu | asked))
    assert doubles.cuda.calls["cudaStreamBeginCapture"] >= 3  # a value is part of a graph


class TestFailures:
    def open(self, bundle: Bundle) -> TensorRTEngine:
        return TensorRTEngine.open(bundle, "vision")

    def test_no_driver(self, planned: Bundle, doubles: Doubles) -> None:
        doubles.cuda.fails["cudaGetDeviceCount"] = Error.cudaErrorInsufficientDriver
        with pytest.raises(UnavailableError) as caught:
            self.open(planned)
        assert str(caught.value) == (
            "device tensorrt: no GPU here (CUDA cudaGetDeviceCount: cudaErrorInsufficientDriver, "
            "as the double was told): run on a machine with an NVIDIA GPU and its driver, or use "
            "--device cpu"
        )

    def test_no_packages(
        self, planned: Bundle, doubles: Doubles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert doubles.cuda.used == 0
        monkeypatch.delitem(sys.modules, "tensorrt")
        with pytest.raises(UnavailableError, match=r"TensorRT's Python package .*pip install"):
            self.open(planned)
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(UnavailableError, match=r"CUDA is called .*: pip install cuda-bindings"):
            self.open(planned)

    def test_no_plans(self, bundle: Path, doubles: Doubles) -> None:
        assert doubles.cuda.used == 0
        with pytest.raises(NotFoundError, match="no plans are built: run ppllava-build"):
            self.open(Bundle.open(bundle))

    def test_another_tensorrt(
        self, planned: Bundle, doubles: Doubles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert doubles.cuda.used == 0
        monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.16.1.11")
        with pytest.raises(IncompatibleError, match=r"for tensorrt 10\.3\.0, not 10\.16"):
            self.open(planned)

    def test_too_little_memory(self, planned: Bundle, doubles: Doubles) -> None:
        engine = self.open(planned)
        room = doubles.cuda.used + 2000
        doubles.cuda.total = room
        with pytest.raises(UnavailableError) as caught:
            engine.empty("hidden", 100_000)
        assert str(caught.value).startswith("GPU Double: ")
        assert "MB for hidden of 100000 frames are not free, 0 of " in str(caught.value)
        assert "(cudaErrorMemoryAllocation): end other programs, or run" in str(caught.value)

    def test_tensorrt_refuses(self, planned: Bundle, doubles: Doubles) -> None:
        for fault, kind, sentence in (
            ("Runtime", UnavailableError, r"vision: TensorRT cannot start: no such thing"),
            ("deserialize", IncompatibleError, r"vision: TensorRT refuses .*: no such thing: run"),
            ("context", InternalError, r"vision: TensorRT makes no context: no such thing"),
            ("infer", InternalError, r"vision: TensorRT infers no shapes from .*: no such thing"),
        ):
            doubles.faults[fault] = "no such\nthing"
            with pytest.raises(kind, match=sentence):
                self.open(planned)
            doubles.faults.clear()

    @pytest.mark.parametrize("fault", ["deserialize", "context"])
    def test_tensorrt_has_too_little_memory(
        self, planned: Bundle, doubles: Doubles, fault: str
    ) -> None:
        doubles.faults[fault] = "[defaultAllocator.cpp] Requested amount of GPU memory: OutOfMemory"
        with pytest.raises(UnavailableError, match=r"^vision: the GPU's memory is used up: .* end"):
            self.open(planned)

    def test_running_fails(self, planned: Bundle, doubles: Doubles) -> None:
        engine = self.open(planned)
        feeds = {"pixel_values": pixels(planned, 2)}
        doubles.faults["execute"] = "out of registers"
        with pytest.raises(InternalError, match=r"^vision: TensorRT failed: out of registers$"):
            engine.run(feeds)
        doubles.faults.clear()
        assert np.isfinite(engine.run(feeds)["keys"]).all()
        doubles.cuda.work_fails = Error.cudaErrorIllegalAddress
        with pytest.raises(InternalError, match="CUDA cudaStreamSynchronize: cudaErrorIllegalAdd"):
            engine.run(feeds)

    def test_a_plan_of_other_tensors(self, planned: Bundle, doubles: Doubles) -> None:
        assert doubles.cuda.used == 0
        (folder,) = (planned.path / "plans").iterdir()
        plan = folder / "vision.plan"
        whole = plan.read_bytes()
        plan.write_bytes(whole.replace(b"keys", b"keyz"))
        try:  # never deserialised: its hash is another
            with pytest.raises(DataError, match=r"vision\.plan is damaged, its sha256 is"):
                self.open(planned)
        finally:
            plan.write_bytes(whole)


def test_the_double_tells_what_a_gpu_would_not_survive() -> None:
    cuda = CudaDouble()
    _, pointer = cuda.cudaMalloc(8)
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    kind = cuda.cudaMemcpyKind.cudaMemcpyDefault
    cuda.cudaMemcpyAsync(pointer, pointer, 9, kind, stream)
    with pytest.raises(Stray, match="9 bytes at 0 of a buffer of 8"):
        cuda.cudaStreamSynchronize(stream)
    cuda.cudaFree(pointer)
    cuda.cudaMemcpyAsync(pointer, pointer, 8, kind, stream)
    with pytest.raises(Stray, match="an address that was freed"):
        cuda.cudaStreamSynchronize(stream)
    cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode(1))
    assert cuda.cudaMalloc(8)[0] == Error.cudaErrorStreamCaptureUnsupported
    assert cuda.cudaStreamEndCapture(stream)[0] == Error.cudaErrorStreamCaptureInvalidated


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda plan: plan["tensors"][0].__setitem__(2, "float16"),
            r"vision: the plan has pixel_values as \('input', 'float16', .*, expected \('input', "
            r"'float32', .*: run ppllava-build again",
        ),
        (
            lambda plan: plan["tensors"].pop(),
            r"vision: the plan has \w+ as None, expected \('output'",
        ),
        (
            lambda plan: plan["profiles"].append(plan["profiles"][0]),
            r"vision: the plan has 2 profiles, expected 1: run ppllava-build again",
        ),
        (
            lambda plan: plan["profiles"][0]["values"].update(pixel_values=[[1], [1], [1]]),
            r"vision: the plan reads \['pixel_values'\] on the CPU, expected \[\]: run",
        ),
    ],
)
def test_a_plan_that_is_not_what_was_recorded_is_told(
    planned: Bundle, doubles: Doubles, change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    assert doubles.cuda.used == 0
    (folder,) = (planned.path / "plans").iterdir()
    plan = json.loads((folder / "vision.plan").read_bytes())
    change(plan)
    path = tmp_path / "vision.plan"
    path.write_text(json.dumps(plan))
    record = Record.from_json((folder / "plans.json").read_text(), "plans.json").graphs["vision"]
    with pytest.raises(DataError, match=said):
        Plan(sys.modules["tensorrt"], Device(), path, "vision", record)
