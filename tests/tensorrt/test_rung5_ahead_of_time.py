"""Rung 5: graphs of full width, compiled ahead of time by TensorRT-RTX for SM 86 and 89.

One layer each, and the text tower whole. Whole models take `make verify-tensorrt`: its table is in
docs/tensorrt.md. What is compiled here was run by no one: there is no GPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ppllava_engines.bundle import Bundle
from ppllava_engines.errors import IncompatibleError, PPLLaVAError
from ppllava_engines.tensorrt.builder import Request, build_plan
from ppllava_engines.tensorrt.graphs import write_graph
from ppllava_engines.tensorrt.plans import FOLDER, RECORD, Options, Record
from ppllava_engines.tensorrt.profiles import Profile, graph_profiles

CODES = ((8, 6), (8, 9))
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "graphs"),
    [("clip", {"vision", "text", "pool", "decoder"}), ("clip-int8", {"vision", "decoder"})],
)
def test_full_width_is_compiled_for_two_architectures(
    name: str, graphs: set[str], tool: Callable[[str], Path], tmp_path: Path
) -> None:
    tool("rtx")
    command = [sys.executable, "-m", "benchmarks.tensorrt_builds", str(tmp_path), name]
    done = subprocess.run(
        [*command, "--layers", "1", "--keep"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(tmp_path / name).manifest
    (path,) = (tmp_path / name / FOLDER).glob(f"*/{RECORD}")
    record = Record.from_json(path.read_text(), RECORD)
    assert record.options.compute_capabilities == CODES
    assert record.graphs.keys() == graphs
    for graph, plan in record.graphs.items():
        assert f"| {name} | {graph} |" in done.stdout
        source = manifest.decoder.path if graph == "decoder" else manifest.graphs[graph].path
        weights = sum(f.size for file, f in manifest.files.items() if file.startswith(source))
        # All weights are in the plan, and once; but some of int8, such as the head's, are widened.
        most = 1.1 if name == "clip" or graph != "decoder" else 2.1
        assert 0.9 * weights <= plan.file.size <= most * weights + 8e6, graph


# Whatever is wrong with a graph or a profile is told by us, in one sentence.


def model(
    nodes: list[onnx.NodeProto], kind: int = TensorProto.FLOAT16, domain: str | None = None
) -> onnx.ModelProto:
    """x (n,4) → y (n,4), with an fp32 weight (4,4) at hand."""
    ends = [helper.make_tensor_value_info(name, kind, ("n", 4)) for name in "xy"]
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", 20)]
    opsets += [helper.make_opsetid(domain, 1)] if domain else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


GOOD = model([helper.make_node("Relu", ["x"], ["y"], name="here")])
MIXED = model([helper.make_node("MatMul", ["x", "w"], ["y"], name="here")])
UNKNOWN = model(
    [helper.make_node("GroupQueryAttention", ["x"], ["y"], name="here", domain="com.microsoft")],
    domain="com.microsoft",
)
TO_FOUR = Profile("p", {"x": ((1, 4), (2, 4), (4, 4))}, {})


def request(onnx_file: Path, *profiles: Profile, graph: str = "small") -> Request:
    return Request(
        library="tensorrt_rtx",
        graph=graph,
        onnx=str(onnx_file),
        out=str(onnx_file.with_suffix(".plan")),
        profiles=profiles,
        options=Options(compute_capabilities=CODES),
        workspace_bytes=None,
        tactic_bytes=None,
        timing_cache=None,
        plugin=None,
    )


@pytest.fixture
def rtx(tool: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tool("rtx")))


def refused(build: Request, *texts: str, kind: type[PPLLaVAError] = IncompatibleError) -> None:
    with pytest.raises(kind) as caught:
        build_plan(build)
    message = str(caught.value)
    assert message.startswith(f"plan {build.graph}: ")
    assert "\n" not in message
    for text in texts:
        assert text in message


@pytest.mark.usefixtures("rtx")
def test_a_good_graph_is_not_refused(tmp_path: Path) -> None:
    onnx.save(GOOD, tmp_path / "small.onnx")
    assert build_plan(request(tmp_path / "small.onnx", TO_FOUR)).seconds > 0
    assert (tmp_path / "small.plan").stat().st_size > 0


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("proto", "profiles", "texts"),
    [
        (MIXED, [TO_FOUR], ("here", "type")),
        (UNKNOWN, [TO_FOUR], ("here (GroupQueryAttention)",)),
        (GOOD, [], ("profile",)),
        (GOOD, [Profile("p", {"x": ((1, 4), (8, 4), (4, 4))}, {})], ("profile p",)),
        (GOOD, [Profile("p", {"x": ((1, 5), (2, 5), (4, 5))}, {})], ("profile",)),
    ],
    ids=["dtypes", "operator", "no-profile", "empty-range", "not-the-graph's-shape"],
)
def test_what_tensorrt_refuses_is_told(
    proto: onnx.ModelProto, profiles: list[Profile], texts: tuple[str, ...], tmp_path: Path
) -> None:
    onnx.save(proto, tmp_path / "small.onnx")
    refused(request(tmp_path / "small.onnx", *profiles), *texts)


@pytest.mark.usefixtures("rtx")
def test_a_truncated_graph_is_told(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    path.write_bytes(GOOD.SerializeToString()[:-20])
    refused(request(path, TO_FOUR), "the graph")


@pytest.mark.usefixtures("rtx")
def test_weights_that_are_cut_off_are_told(tmp_path: Path) -> None:
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"], name="here")], TensorProto.FLOAT)
    path = tmp_path / "small.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="small.data", size_threshold=0)
    (tmp_path / "small.data").write_bytes(bytes(8))
    refused(request(path, TO_FOUR), "tensorrt_rtx")


@pytest.mark.usefixtures("rtx")
def test_a_plugin_s_node_without_the_plugin_is_told(bundle_fp16: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_fp16)
    spec = write_graph(bundle, "pool", tmp_path, pool_node="attributes")
    profiles = graph_profiles(bundle.manifest, "pool", spec)
    build = replace(request(tmp_path / "pool.onnx", *profiles), graph="pool")
    refused(build, "StridedWeightedPool")
