"""The processes that ppllava-build starts: how they end, and on a board.

The builders here are not TensorRT, which builds on a GPU only: NOT RUN.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ppllava_engines.bundle import Bundle
from ppllava_engines.devices import find_gpu
from ppllava_engines.errors import (
    InternalError,
    NotFoundError,
    PPLLaVAError,
    UnavailableError,
)
from ppllava_engines.tensorrt import compiler
from ppllava_engines.tensorrt.builder import Request, build_plan, is_installed
from ppllava_engines.tensorrt.plans import FOLDER, Machine, Options, Plans
from ppllava_engines.tensorrt.profiles import Profile
from tiny_driver import ORIN_NANO, compile_driver

Build = Callable[..., "subprocess.CompletedProcess[str]"]
AHEAD = ["--library", "rtx", "--compute-capability"]

ADA = Machine(gpu="RTX 4090", compute_capability=(8, 9), library="tensorrt_rtx",
    version="1.7.1.116", integrated=False, memory_bytes=24 * 10**9)  # fmt: skip
REQUEST = Request(
    library="tensorrt_rtx",
    graph="pool",
    onnx="x",
    out="x",
    profiles=(Profile("frames", {"x": ((1, 4), (2, 4), (8, 4))}, {}),),
    options=Options(compute_capabilities=((8, 6),)),
    workspace_bytes=None,
    tactic_bytes=None,
    timing_cache=None,
    plugin=None,
)


def environment(modules: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(modules), *filter(None, sys.path)])}


def fails(request: Request, kind: type[PPLLaVAError], *texts: str) -> None:
    with pytest.raises(kind) as caught:
        build_plan(request)
    assert type(caught.value) is kind
    for text in texts:
        assert text in str(caught.value)


STUB = """
import os, signal, sys
__version__ = "1.7.1.116"
def Builder(logger):
{action}
class ILogger:
    def __init__(self): pass
"""


def stub(folder: Path, action: str) -> Path:
    """A folder with a tensorrt_rtx whose builder does just that."""
    folder.mkdir()
    (folder / "tensorrt_rtx.py").write_text(STUB.format(action=f"    {action}"))
    return folder


@pytest.mark.parametrize(
    ("action", "kind", "text"),
    [
        ("os.abort()", InternalError, "plan pool: tensorrt_rtx ended by signal 6: please report"),
        (
            "print('boom', file=sys.stderr); os._exit(3)",
            InternalError,
            "ended by exit code 3: boom",
        ),
        ("os.kill(os.getpid(), 9)", UnavailableError, "plan pool: the memory was used up: close"),
        ("raise TypeError('factory')", UnavailableError, "tensorrt_rtx has no GPU to build on"),
        ("print('noise'); raise TypeError", UnavailableError, "has no GPU to build on"),
    ],
)
def test_a_builder_that_ends_its_process_is_told_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    kind: type[PPLLaVAError],
    text: str,
) -> None:
    monkeypatch.syspath_prepend(str(stub(tmp_path / "stub", action)))
    fails(replace(REQUEST, onnx="x", out=str(tmp_path / "x.plan")), kind, text)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lets children take SIGINT: tests that run in the background would pass on to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_killed_leaves_nothing_half(
    bundle_fp16: Path,
    tmp_path: Path,
    ppllava_build: Build,
    number: signal.Signals,
) -> None:
    out = shutil.copytree(bundle_fp16, tmp_path / "bundle")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "ppllava_engines.build", str(out), *AHEAD, "8.9"]
    modules = stub(tmp_path / "stub", f"open({str(fifo)!r}).read()")
    process = subprocess.Popen([*command, "--graphs", "text"], env=environment(modules),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    with fifo.open("wb") as stream:  # which opens when the builder's process has begun
        process.send_signal(number)
        codes = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
        assert process.wait(60) == codes[number]
        poll = select.poll()
        poll.register(stream, select.POLLERR)
        assert poll.poll(60_000), "the builder's process goes on"
    with pytest.raises(NotFoundError):
        Plans.find(Bundle.open(out, verify="full"), ADA)
    if number != signal.SIGKILL:
        assert not (out / FOLDER).exists()
    done = ppllava_build(out, *AHEAD, "8.9", "--graphs", "text")
    assert done.returncode == 0, done.stderr
    (folder,) = (out / FOLDER).iterdir()
    assert folder.name.startswith("any-sm89-rtx")


# TensorRT-RTX under TensorRT's name, and a driver that reports an Orin: what is tested is what this
# project does around the builder on a board. TensorRT itself: NOT RUN.
DISGUISE = """
from tensorrt_rtx import *
from tensorrt_rtx import Builder, ILogger
__version__ = "10.3.0"
"""


@pytest.fixture
def board(rtx: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that believes to be on an Orin Nano with TensorRT 10.3."""
    folder = tmp_path / "board"
    folder.mkdir()
    (folder / "tensorrt.py").write_text(DISGUISE)
    compile_driver(folder / "libcuda.so.1")
    paths = [str(folder), str(rtx), *filter(None, sys.path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": str(folder)}


def test_a_board_builds_within_its_recipe(
    bundle_fp16: Path, tmp_path: Path, board: dict[str, str]
) -> None:
    out = shutil.copytree(bundle_fp16, tmp_path / "bundle")
    command = [sys.executable, "-m", "ppllava_engines.build", str(out), "--graphs", "vision"]
    done = subprocess.run(command, env=board, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    machine = Machine(
        gpu="Orin",
        compute_capability=(8, 7),
        library="tensorrt",
        version="10.3.0",
        integrated=True,
        memory_bytes=ORIN_NANO.memory_bytes,
    )
    plans = Plans.find(Bundle.open(out), machine)
    assert plans.path.name == "orin-8gb-sm87-tensorrt10.3.0"
    (frames,) = plans.plan("vision").profiles
    assert [shape[0] for shape in frames.shapes["pixel_values"]] == [1, 4, 4]
    wrong = subprocess.run([*command, "--device", "agx-orin-64gb"], env=board, capture_output=True,
        text=True, check=False)  # fmt: skip
    assert wrong.returncode == 78
    assert "expected Orin (sm87, 64 GB), this is Orin (sm87, 8.0 GB)" in wrong.stderr


AFTER_EXPORT = """
import sys
from pathlib import Path
from ppllava_engines import native
from ppllava_export.cli import _build_plans
native.PLUGIN = "none"  # TensorRT-RTX does not take it
_build_plans(Path(sys.argv[1]))
assert "tensorrt" not in sys.modules or sys.argv[2] == "board"
"""


def test_an_export_builds_plans_only_where_tensorrt_and_a_gpu_are(
    bundle_fp16: Path, tmp_path: Path, board: dict[str, str]
) -> None:
    out = shutil.copytree(bundle_fp16, tmp_path / "bundle")
    command = [sys.executable, "-c", AFTER_EXPORT, str(out)]

    def export(where: str, env: dict[str, str]) -> str:
        done = subprocess.run(
            [*command, where], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout == ""
        return done.stderr

    no_gpu = board | {"LD_LIBRARY_PATH": ""}
    if find_gpu() is None:
        assert export("elsewhere", no_gpu) == ""
        assert not (out / FOLDER).exists()
    if not is_installed("tensorrt"):
        no_library = os.environ | {"LD_LIBRARY_PATH": board["LD_LIBRARY_PATH"]}
        assert export("elsewhere", no_library) == ""
        assert not (out / FOLDER).exists()
    said = export("board", board)
    assert said.startswith("TensorRT and a GPU are here: building plans, as ppllava-build does\n")
    assert said.endswith(f"plans: {out / FOLDER}/orin-8gb-sm87-tensorrt10.3.0\n")
    (tmp_path / "board/tensorrt.py").write_text(STUB.format(action="    os.abort()"))
    said = export("board", board)
    assert "warning: no plans were built, the bundle is whole: plan vision: tensorrt ended" in said


# What the compiler calls of TensorRT; the second only where it is there.
CALLED = [
    "AMPERE_PLUS",
    "BuilderFlag",
    "ERROR",
    "HardwareCompatibilityLevel",
    "ILogger",
    "INTERNAL_ERROR",
    "IProgressMonitor",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "STRONGLY_TYPED",
    "TACTIC_DRAM",
    "TF32",
    "VERSION_COMPATIBLE",
    "WORKSPACE",
    "add_optimization_profile",
    "build_serialized_network",
    "clear_flag",
    "create_builder_config",
    "create_network",
    "create_optimization_profile",
    "create_timing_cache",
    "desc",
    "get_error",
    "get_input",
    "get_plugin_registry",
    "get_timing_cache",
    "hardware_compatibility_level",
    "ignore_mismatch",
    "is_shape_tensor",
    "load_library",
    "log",
    "node",
    "node_name",
    "node_operator",
    "num_errors",
    "num_inputs",
    "parse_from_file",
    "phase_finish",
    "phase_start",
    "progress_monitor",
    "serialize",
    "set_flag",
    "set_memory_pool_limit",
    "set_shape",
    "set_shape_input",
    "set_timing_cache",
    "step_complete",
]
LATER = ("IStreamWriter", "SAME_COMPUTE_CAPABILITY", "build_serialized_network_to_stream")


@pytest.mark.parametrize(("version", "later"), [("10.3", False), ("10.16", True), ("11.4", True)])
def test_what_is_called_is_in_the_real_bindings(version: str, later: bool) -> None:
    folder = Path(sys.prefix) / "tensorrt" / f"bindings-{version}"
    if not folder.is_dir():
        pytest.skip(f"NOT RUN: bindings-{version} is not here: make tensorrt-tools")
    module = (folder / "tensorrt_bindings/tensorrt.so").read_bytes()
    source = Path(compiler.__file__).read_text()
    for name in (*CALLED, *LATER):
        assert name in source, f"{name} is not called any more"
    assert [name for name in CALLED if f"{name}\0".encode() not in module] == []
    assert [f"{name}\0".encode() in module for name in LATER] == [later] * len(LATER)
