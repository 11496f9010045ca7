"""ppllava-build, as far as it goes without a GPU: TensorRT-RTX compiles ahead of time.

TensorRT itself builds on a GPU only: NOT RUN. TensorRT-RTX is loaded in processes of their own.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnx.helper
import pytest
from onnx import TensorProto

from ppllava_engines import build
from ppllava_engines.bundle import Bundle
from ppllava_engines.devices import find_gpu
from ppllava_engines.errors import (
    IncompatibleError,
    InternalError,
    PPLLaVAError,
    StorageError,
    run_command,
)
from ppllava_engines.tensorrt.builder import Request, build_plan, is_installed
from ppllava_engines.tensorrt.plans import FOLDER, RECORD, Library, Machine, Options, Plans
from ppllava_engines.tensorrt.profiles import Profile
from ppllava_engines.tensorrt.tasks import Task

Build = Callable[..., "subprocess.CompletedProcess[str]"]
AHEAD = ["--library", "rtx", "--compute-capability"]


@pytest.fixture(scope="session")
def built(
    bundle_fp16: Path, tmp_path_factory: pytest.TempPathFactory, ppllava_build: Build
) -> Path:
    """A bundle with plans of all graphs for sm86 and sm89, with what was said in `said`."""
    out = shutil.copytree(bundle_fp16, tmp_path_factory.mktemp("built") / "bundle")
    done = ppllava_build(out, *AHEAD, "8.6", "8.9", "--frames", "8")
    assert (done.returncode, done.stderr) == (0, "")
    (out.parent / "said").write_text(done.stdout)
    return out


@pytest.fixture
def built_copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "bundle")


@pytest.fixture(scope="session")
def here(built: Path) -> Machine:
    """A machine on which those plans run."""
    (path,) = (built / FOLDER).glob("*-rtx*")
    version = path.name.rpartition("rtx")[2]
    return Machine(
        gpu="NVIDIA GeForce RTX 4090",
        compute_capability=(8, 9),
        library="tensorrt_rtx",
        version=version,
        integrated=False,
        memory_bytes=24 * 10**9,
    )


def test_every_graph_is_built_ahead_of_time(built: Path, here: Machine) -> None:
    bundle = Bundle.open(built, verify="full")
    plans = Plans.find(bundle, here)
    assert plans.path.name == f"any-sm86-sm89-rtx{here.version}"
    assert list(plans.record.graphs) == ["vision", "text", "pool", "decoder"]
    for name, plan in plans.record.graphs.items():
        assert plans.file(name).stat().st_size == plan.file.size > 10_000
        assert plan.seconds > 0
        assert plan.peak_bytes > plan.file.size
        assert plan.plugin is None  # TensorRT-RTX pools by plain operators
    model = bundle.manifest.model
    pool = plans.plan("pool")
    assert (pool.kernel, pool.stride) == (model.kernel, model.stride)
    assert [profile.name for profile in plans.plan("decoder").profiles] == ["prefill", "step"]
    (frames,) = plans.plan("vision").profiles
    assert [shape[0] for shape in frames.shapes["pixel_values"]] == [1, 4, 4]
    files = {f"{name}.plan" for name in plans.record.graphs}
    assert {path.name for path in plans.path.iterdir()} == files | {RECORD}


def test_what_was_built_is_told(built: Path) -> None:
    said = (built.parent / "said").read_text()
    for text in ("sm86, sm89", "T 1…4…4", "n 1…16…248", "c 1…512…512", "prefill", f"{FOLDER}/any-"):
        assert text in said


def test_plans_for_other_capabilities_are_refused(built: Path, here: Machine) -> None:
    with pytest.raises(IncompatibleError, match=r"is for sm86, sm89, not sm120: run ppllava-build"):
        Plans.find(Bundle.open(built), replace(here, compute_capability=(12, 0)))
    with pytest.raises(IncompatibleError, match=r"is for tensorrt_rtx .*, not 9.9: run"):
        Plans.find(Bundle.open(built), replace(here, version="9.9"))


def test_one_graph_is_built_again_and_the_others_stay(
    built_copy: Path, here: Machine, ppllava_build: Build
) -> None:
    before = Plans.find(Bundle.open(built_copy), here).record.graphs
    window = ["--kernel", "1,2,2", "--stride", "1,2,2"]
    done = ppllava_build(built_copy, *AHEAD, "8.6", "8.9", "--graphs", "pool", *window)
    assert (done.returncode, done.stderr) == (0, "")
    plans = Plans.find(Bundle.open(built_copy), here)
    assert plans.plan("pool").kernel == plans.plan("pool").stride == (1, 2, 2)
    for name in ("vision", "text", "decoder"):
        assert plans.plan(name) == before[name]
        plans.file(name)


def test_a_capability_that_is_not_known_leaves_the_plans_of_before(
    built_copy: Path, here: Machine, ppllava_build: Build
) -> None:
    done = ppllava_build(built_copy, *AHEAD, "9.0", "--graphs", "text")
    assert done.returncode == 78
    assert done.stderr.startswith("error: plan: tensorrt_rtx ")
    assert "does not compile for sm90, expected one of sm75, sm80, sm86, sm89" in done.stderr
    assert len(list((built_copy / FOLDER).iterdir())) == 1
    Plans.find(Bundle.open(built_copy), here).file("text")


def test_what_cannot_be_built_ends_with_its_exit_code(
    bundle_fp16: Path, tmp_path: Path, ppllava_build: Build
) -> None:
    cases = [
        ([tmp_path / "none", *AHEAD, "8.6"], 66, "no such folder"),
        ([bundle_fp16, "--compute-capability", "8.6"], 2, "is for --library rtx"),
        ([bundle_fp16, *AHEAD, "8.6", "--timing-cache", "x"], 2, "is for --library tensorrt"),
        ([bundle_fp16, *AHEAD, "8.6", "--hardware", "ampere+"], 2, "name each --compute-capabilit"),
        ([bundle_fp16, *AHEAD, "8.6", "--frames", "1000", "--graphs", "vision"], 2, "1000 frames"),
        ([bundle_fp16, "--library", "rtx", "--device", "tx2"], 2, "no device 'tx2'"),
    ]
    if find_gpu() is None:
        cases.append(([bundle_fp16, "--library", "rtx"], 2, "name --compute-capability, as 8.6"))
    for arguments, code, message in cases:
        done = ppllava_build(*arguments)
        assert (done.returncode, done.stdout) == (code, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (bundle_fp16 / FOLDER).exists()


def test_without_tensorrt_it_says_what_to_install(
    bundle_fp16: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Library] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
    for library, module in names.items():
        if not is_installed(module):
            assert run_command(build.main, [str(bundle_fp16), "--library", library]) == 69
            said = capsys.readouterr().err
            assert said.startswith(f"error: {module} is not installed: pip install tensorrt")


def test_a_bad_option_is_a_wrong_use() -> None:
    for option in (["--kernel", "1,2"], ["--frames", "0"], ["--compute-capability", "86"]):
        assert run_command(build.main, ["bundle", *option]) == 2


REQUEST = Request(
    library="tensorrt_rtx",
    graph="pool",
    onnx="",
    out="",
    profiles=(Profile("frames", {"x": ((1, 4), (2, 4), (8, 4))}, {}),),
    options=Options(compute_capabilities=((8, 6),)),
    workspace_bytes=None,
    tactic_bytes=None,
    timing_cache=None,
    plugin=None,
)


def request_of(folder: Path, op: str, domain: str = "") -> Request:
    """A request to build a graph of one node, named `here`."""
    x, y = (onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", 4]) for name in "xy")
    node = onnx.helper.make_node(op, ["x"], ["y"], name="here", domain=domain)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nowhere", 1)]
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "x.onnx")
    return replace(REQUEST, onnx=str(folder / "x.onnx"), out=str(folder / "x.plan"))


def fails(request: Request, kind: type[PPLLaVAError], *texts: str) -> None:
    with pytest.raises(kind) as caught:
        build_plan(request)
    assert type(caught.value) is kind
    for text in texts:
        assert text in str(caught.value)


def test_a_plan_is_built_and_its_stages_are_told(
    rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(rtx))
    stages: list[str] = []
    built = build_plan(request_of(tmp_path, "Relu"), stages.append)
    assert stages[0] == "reading"
    assert (tmp_path / "x.plan").stat().st_size > 1000
    assert built.peak_bytes > 10**7


def test_what_tensorrt_refuses_is_told_in_one_sentence(
    rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(rtx))
    request = request_of(tmp_path, "Missing", "nowhere")
    fails(request, IncompatibleError, "plan pool: tensorrt_rtx ", "node here (Missing)", "ONNX Run")
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    fails(request, IncompatibleError, "does not take the graph")
    request = request_of(tmp_path, "Relu")
    other = Profile("frames", {"z": ((1, 4),) * 3}, {})
    fails(replace(request, profiles=(other,)), InternalError, "is of inputs z, the graph has x")
    wider = Profile("frames", {"x": ((1, 5),) * 3}, {})
    fails(replace(request, profiles=(wider,)), IncompatibleError, "plan pool: ")
    if Path("/dev/full").exists():
        fails(replace(request, out="/dev/full"), StorageError, "No space left on device")


@pytest.mark.parametrize(
    ("library", "version", "plugin", "kernel", "node"),
    [
        ("tensorrt_rtx", "1.7.1.116", True, None, "body"),
        ("tensorrt", "10.3.0", False, None, "body"),
        ("tensorrt", "10.3.0", True, None, "attributes"),
        ("tensorrt", "10.16.1.11", True, None, "inputs"),
        ("tensorrt", "10.16.1.11", True, (1, 2, 2), "attributes"),
        ("tensorrt", "11.4.0.106", True, None, "inputs"),
    ],
)
def test_the_pool_node_follows_from_the_parser(
    library: str, version: str, plugin: bool, kernel: tuple[int, int, int] | None, node: str
) -> None:
    machine = Machine(
        gpu="g", compute_capability=(8, 7), library="tensorrt" if library == "tensorrt"
        else "tensorrt_rtx", version=version, integrated=True, memory_bytes=0)  # fmt: skip
    path = Path("plugin.so") if plugin else None
    assert Task(machine=machine, options=Options(), plugin=path, kernel=kernel).pool_node == node
