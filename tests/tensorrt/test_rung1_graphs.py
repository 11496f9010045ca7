"""Rung 1: the graphs that TensorRT is given, against the bundle's own on ONNX Runtime.

They are also parsed and compiled ahead of time by TensorRT-RTX, for a GPU that is not here.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from lowered_graphs import TOLERANCE, Run, check, compiles, error, lower
from ppllava_engines.bundle import Bundle
from ppllava_engines.errors import (
    IncompatibleError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ppllava_engines.manifest import Axes
from ppllava_engines.onnxruntime import OnnxRuntimeEngine, open_session
from ppllava_engines.tensorrt.attention import lower_attention
from ppllava_engines.tensorrt.graphs import PoolNode, write_graph
from ppllava_export.calibration import calibrate
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.graphs import export_pool, export_text, export_vision
from ppllava_export.precision import DTYPES
from ppllava_export.quiet import quiet
from tiny_bundle import tiny_manifest, write_bundle
from tiny_checkpoint import write_checkpoint
from tiny_videos import numbered_frames, write_video

CLIP: dict[str, Any] = {}
BT_ADAPTER: dict[str, Any] = {"btadapter": True}
SIGLIP: dict[str, Any] = {"family": "siglip"}
# Fields of a checkpoint's config, and a precision, which int8 of the vision follows.
TOWERS = {
    "clip-fp32": (CLIP, "fp32"),
    "clip-fp16": (CLIP, "fp16"),
    "clip-bf16": (CLIP, "bf16"),
    "clip-int8": (CLIP, "fp32 int8"),
    "bt-adapter-fp32": (BT_ADAPTER, "fp32"),
    "bt-adapter-fp16": (BT_ADAPTER, "fp16"),
    "bt-adapter-int8": (BT_ADAPTER, "fp16 int8"),
    "siglip-fp32": (SIGLIP, "fp32"),
    "siglip-fp16": (SIGLIP, "fp16"),
    "siglip-int8": (SIGLIP, "fp16 int8"),
}
# What lies between two of int8's 127 levels goes to either, in each of some 20 layers.
INT8_TOLERANCE = 20 / 127 / 2


@pytest.fixture(scope="module", params=TOWERS)
def towers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, str]:
    """A bundle of vision and, where it is one of its own, text, and its precision."""
    config, kind = TOWERS[request.param]
    folder = write_bundle(tmp_path_factory.mktemp("towers"))
    model = load_checkpoint(write_checkpoint(folder / "source", **config))
    dtype, seen = DTYPES[kind.split()[0]], None
    with quiet(), torch.no_grad():
        if "int8" in kind:
            video = write_video(folder / "clip.mp4", numbered_frames(8))
            seen = calibrate(model, [video])
        graphs = {"vision": export_vision(model, dtype, folder, seen)}
        if "int8" not in kind and config is not BT_ADAPTER:  # its text tower is CLIP's
            graphs["text"] = export_text(model, dtype, folder)
    return Bundle(folder, tiny_manifest(folder, graphs=graphs)), kind


def test_towers_make_what_they_made(towers: tuple[Bundle, str], tmp_path: Path) -> None:
    bundle, kind = towers
    rng = np.random.default_rng(0)
    for name, original in bundle.manifest.graphs.items():
        path, spec = lower(bundle, name, tmp_path / name)
        assert (spec.inputs, spec.outputs) == (original.inputs, original.outputs)
        model = check(path, spec, tmp_path / f"{name}-copy")
        if "int8" in kind:
            ops = [node.op_type for node in model.graph.node]
            assert ops.count("DequantizeLinear") == 2 * ops.count("QuantizeLinear") > 0
        if kind == "bf16":
            continue  # ONNX Runtime's CPU computes nothing in it
        (given,) = spec.inputs
        engines = [OnnxRuntimeEngine(path, spec), bundle.engine(name)]
        for size in (1, 2, 5):
            shape = [axis if isinstance(axis, int) else size for axis in given.shape]
            fed = rng.standard_normal(shape).astype(given.dtype)
            if name == "text":
                fed = rng.integers(2, 40, shape)
                if "n" in given.shape:
                    fed[0, -1] = 513  # the end of text, where CLIP's embedding is taken
            got, expected = (engine.run({given.name: fed}) for engine in engines)
            for key in expected:
                limit = INT8_TOLERANCE if "int8" in kind else TOLERANCE[kind]
                assert error(got[key], expected[key]) <= limit


def attention(dtype: int, width: int, *extra: str, **options: Any) -> onnx.ModelProto:
    """A graph of one Attention of queries (2,3,5,d), keys and values (2,3,n,d)."""
    given = [
        onnx.helper.make_tensor_value_info(name, dtype, [2, 3, "m" if name == "q" else "n", width])
        for name in "qkv"
    ]
    given += [onnx.helper.make_tensor_value_info(name, dtype, ["m", "n"]) for name in extra]
    out = [onnx.helper.make_tensor_value_info("y", dtype, [2, 3, "m", width])]
    node = onnx.helper.make_node("Attention", ["q", "k", "v", *extra], ["y"], "layer", **options)
    graph = onnx.helper.make_graph([node], "attention", given, out)
    opset = onnx.helper.make_opsetid("", 23)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("width", [16, 24, 72])
@pytest.mark.parametrize("options", [{}, {"is_causal": 1}, {"scale": 0.3, "softmax_precision": 1}])
def test_attention_is_spelt_out(
    dtype: type[np.floating[Any]], width: int, options: dict[str, Any], tmp_path: Path
) -> None:
    proto = attention(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), width, **options)
    onnx.save(proto, tmp_path / "original.onnx")
    model = ir.from_proto(proto)
    lower_attention(model.graph)
    model.graph.opset_imports[""] = 20
    ir.save(model, tmp_path / "lowered.onnx")
    onnx.checker.check_model(str(tmp_path / "lowered.onnx"), full_check=True)
    rng = np.random.default_rng(4)
    for rows, columns in ((1, 1), (5, 5), (9, 9) if "is_causal" in options else (3, 9)):
        sizes = {"q": rows, "k": columns, "v": columns}
        feeds = {n: rng.standard_normal((2, 3, size, width)) for n, size in sizes.items()}
        scale = options.get("scale", width**-0.5)
        scores = feeds["q"] @ feeds["k"].swapaxes(2, 3) * scale
        if "is_causal" in options:
            scores = np.where(np.tri(rows, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        exact = shares / shares.sum(axis=-1, keepdims=True) @ feeds["v"]
        fed = {name: value.astype(dtype) for name, value in feeds.items()}
        (got,) = open_session(tmp_path / "lowered.onnx").run(None, fed)
        # Of inputs, scaled queries, scores and shares, and of the sum.
        assert error(got, exact.astype(dtype)) <= 5 * 2 * np.finfo(dtype).eps


@pytest.mark.parametrize(
    ("extra", "options"), [(("mask",), {}), ((), {"softcap": 5.0}), ((), {"unknown": 1})]
)
def test_attention_that_has_no_lowering(extra: tuple[str, ...], options: dict[str, Any]) -> None:
    model = ir.from_proto(attention(onnx.TensorProto.FLOAT, 16, *extra, **options))
    with pytest.raises(IncompatibleError, match=r"layer: an Attention of . inputs"):
        lower_attention(model.graph)
    assert [node.op_type for node in model.graph] == ["Attention"]


POOLS: list[tuple[Axes | None, Axes | None]] = [
    (None, None),
    ((1, 1, 1), (1, 1, 1)),
    ((3, 2, 3), (1, 3, 1)),
    ((2, 4, 4), (3, 1, 1)),
]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def pool(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, str]:
    folder = write_bundle(tmp_path_factory.mktemp("pool"))
    with quiet():
        made = export_pool(load_checkpoint(checkpoint), DTYPES[request.param], folder)
    model = dataclasses.replace(
        tiny_manifest(folder).model, grid=(4, 4), kernel=(2, 2, 2), stride=(2, 2, 2)
    )
    return Bundle(folder, tiny_manifest(folder, graphs={"pool": made}, model=model)), request.param


@pytest.mark.parametrize(("kernel", "stride"), POOLS)
def test_pool_of_baked_windows(
    pool: tuple[Bundle, str], kernel: Axes | None, stride: Axes | None, tmp_path: Path
) -> None:
    bundle, kind = pool
    path, spec = lower(bundle, "pool", tmp_path / "pool", kernel=kernel, stride=stride)
    check(path, spec, tmp_path / "copy")
    assert [entry.name for entry in spec.inputs] == ["keys", "hidden", "text_embed"]
    rng = np.random.default_rng(1)
    windows = {"kernel": np.array(kernel or (2, 2, 2)), "stride": np.array(stride or (2, 2, 2))}
    lowered, original = OnnxRuntimeEngine(path, spec), bundle.engine("pool")
    for frames in (1, 2, 3, 8):  # one frame is less than some kernels have: no window
        shapes = [(frames, 16, 16), (frames, 16, 64), (1, 16)]
        feeds = {
            entry.name: (rng.standard_normal(shape) / 4).astype(entry.dtype)
            for entry, shape in zip(spec.inputs, shapes, strict=True)
        }
        got, expected = lowered.run(feeds), original.run(feeds | windows)
        assert got["pooled"].shape == expected["pooled"].shape
        assert error(got["relevance"], expected["relevance"]) <= TOLERANCE["fp32"]
        if len(expected["pooled"]):
            assert error(got["pooled"], expected["pooled"]) <= TOLERANCE[kind]


@pytest.mark.parametrize("pool_node", ["attributes", "inputs"])
def test_pool_for_a_plugin(pool: tuple[Bundle, str], pool_node: PoolNode, tmp_path: Path) -> None:
    baked = {"kernel": (2, 3, 1), "stride": (2, 1, 3)} if pool_node == "attributes" else {}
    path, spec = lower(pool[0], "pool", tmp_path / "pool", pool_node=pool_node, **baked)
    model = check(path, spec, tmp_path / "copy")
    (node,) = (node for node in model.graph.node if node.domain)
    said = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    assert (node.domain, node.op_type) == ("ppllava", "StridedWeightedPool")
    assert said.pop("temperature") == pytest.approx(0.01)
    common = {"plugin_version": b"1", "plugin_namespace": b"ppllava"}
    if pool_node == "attributes":
        assert said == common | {"kernel": [2, 3, 1], "stride": [2, 1, 3]}
        assert len(node.input) == 2
    else:
        assert said == common | {"tensorrt_plugin_shape_input_indices": [4, 5]}
        assert node.input[2:] == ["kernel", "stride", "kernel", "stride"]
        assert [entry.shape for entry in spec.inputs[3:]] == [(3,), (3,)]


def test_refusals(
    pool: tuple[Bundle, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = pool
    with pytest.raises(NotFoundError, match="no graph 'audio', there are decoder, pool"):
        write_graph(bundle, "audio", tmp_path)
    with pytest.raises(UsageError, match=r"decoder: kernel and stride are not baked in"):
        write_graph(bundle, "decoder", tmp_path, kernel=(1, 1, 1))
    with pytest.raises(UsageError, match=r"pool: kernel and stride are not baked in"):
        write_graph(bundle, "pool", tmp_path, pool_node="inputs", stride=(1, 1, 1))
    for kernel, stride in (((17, 1, 1), (1, 1, 1)), ((1, 0, 1), (1, 1, 1)), (None, (1, 1, 0))):
        with pytest.raises(UsageError, match=r"pool: kernel .* have no window in \(16, 4, 4\)"):
            write_graph(bundle, "pool", tmp_path, kernel=kernel, stride=stride)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(UnavailableError, match=r"pip install 'ppllava-edge\[tensorrt\]'"):
        write_graph(bundle, "pool", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_towers_compile(towers: tuple[Bundle, str], run_with: Run, tmp_path: Path) -> None:
    for name in towers[0].manifest.graphs:
        path, spec = lower(towers[0], name, tmp_path)
        compiles(run_with, path, spec, {"T": (1, 4, 16), "n": (1, 16, 64)})


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "stride"), POOLS)
def test_pool_compiles(
    pool: tuple[Bundle, str],
    kernel: Axes | None,
    stride: Axes | None,
    run_with: Run,
    tmp_path: Path,
) -> None:
    path, spec = lower(pool[0], "pool", tmp_path, kernel=kernel, stride=stride)
    compiles(run_with, path, spec, {"T": (1, 4, 16)})
