"""Int8 vision without calibration: what is quantized, and how far it is from float."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ppllava_engines.errors import UsageError
from ppllava_engines.onnxruntime import open_session
from ppllava_engines.parity import Parity
from ppllava_export import export_bundle
from ppllava_export.checkpoint import Checkpoint, load_checkpoint
from ppllava_export.graphs import export_vision
from ppllava_export.mapped import streamed_fp32
from ppllava_export.vision_dynamic_int8 import quantize_tower
from ppllava_export.vision_int8 import count_layers
from tiny_checkpoint import write_checkpoint

Array = NDArray[Any]
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {},
    "bt-adapter": {"btadapter": True},
    "siglip": {"family": "siglip"},
}
PER_BLOCK = 6  # query, key, value, output and the two of the feed-forward
INPUTS = 4  # that they have
# Of blocks but the first; a time block has five layers and temporal_fc's input more than a space
# block lacks. Alignment and projector, which stay float, have FLOATS beside the first block's.
ROUNDED = {
    "clip": (2 * PER_BLOCK, 2 * INPUTS),
    "bt-adapter": (2 * PER_BLOCK + 2 * (5 + PER_BLOCK), 2 * INPUTS + 2 * (3 + INPUTS)),
    "siglip": (3 * PER_BLOCK, 3 * INPUTS),
}
ATTENTIONS = {"clip": 3, "bt-adapter": 3 + 2 * 2, "siglip": 4}
FLOATS = {"clip": PER_BLOCK + 2, "bt-adapter": PER_BLOCK + 2, "siglip": PER_BLOCK + 4}
# Random weights have no outliers; rounding to 8 bits leaves an error of some 1 % a layer.
COSINE = 0.999


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(tower: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(write_checkpoint(tmp_path_factory.mktemp(tower), **TOWERS[tower]))


@pytest.fixture(scope="module")
def graph(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an int8 vision graph."""
    folder = tmp_path_factory.mktemp("int8")
    return folder / export_vision(model, torch.float32, folder, "int8").path


def test_graph_is_standard_and_as_described(graph: Path, tower: str) -> None:
    onnx.checker.check_model(str(graph), full_check=True)
    proto = onnx.load(str(graph))
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 23)]
    counts = Counter(node.op_type for node in proto.graph.node)
    products, inputs = ROUNDED[tower]
    assert counts["MatMulInteger"] == products
    assert counts["DynamicQuantizeLinear"] == inputs
    assert counts["MatMul"] == FLOATS[tower]
    assert counts["Attention"] == ATTENTIONS[tower]
    assert counts["Softmax"] == 0
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "MatMulInteger":
            assert values[node.input[1]].dtype == np.int8
    assert count_layers(graph) == (products, products + FLOATS[tower])


def test_every_product_is_fused(graph: Path, tower: str, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    fused = counts["MatMulIntegerToFloat"] + counts["DynamicQuantizeMatMul"]
    assert fused == ROUNDED[tower][0]
    assert counts["MatMulInteger"] == 0


def test_int8_is_near_torch(graph: Path, model: Checkpoint) -> None:
    side = model.config.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((7, 3, side, side)).astype(np.float32)
    module = model.model()
    with torch.no_grad(), streamed_fp32(module, model.weights.release):
        expected = [out.numpy() for out in module.encode(torch.from_numpy(pixels))]
    for lean in (False, True):  # fused, and as it is written
        session = open_session(graph, 1, lean=lean)
        got = session.run(["keys", "hidden"], {"pixel_values": pixels})
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            assert cosine(a, b) >= COSINE


def cosine(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# One layer by itself, where bounds can be told exactly.


def layer(weight: Array, norm: tuple[Array, Array] | None = None, block: int = 1) -> ir.Model:
    """x (n, K) [through a layer norm] times a weight (K, N) → y, as the tracer leaves it."""
    arrays = {"layer.weight": weight.astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "layer.weight"], ["y"])]
    if norm is not None:
        arrays |= {"gain": norm[0].astype(np.float32), "shift": norm[1].astype(np.float32)}
        nodes[0].input[0] = "normed"
        operands = ["x", "gain", "shift"]
        nodes.insert(0, helper.make_node("LayerNormalization", operands, ["normed"]))
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", weight.shape[0]))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", weight.shape[1]))],
            [numpy_helper.from_array(array, name) for name, array in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    scope = f"vision_tower.encoder.layers.{block}.fc"
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", scope, "linear"])
    return model


def run(model: ir.Model, x: Array, folder: Path) -> Array:
    ir.save(model, folder / "layer.onnx")
    onnx.checker.check_model(str(folder / "layer.onnx"), full_check=True)
    out: Array = open_session(folder / "layer.onnx", 1).run(None, {"x": x})[0]
    return out


def stored(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("width", [4, 33, 512])
def test_one_layer_is_within_its_rounding(rows: int, width: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([rows, width])
    x = rng.standard_normal((rows, width)).astype(np.float32)
    weight = rng.standard_normal((width, 5)).astype(np.float32)
    weight[:, 3] = 0
    model = layer(weight)
    quantize_tower(model)
    got = run(model, x, tmp_path)
    steps = stored(model, "layer.weight.int8.scale")
    # The range holds zero; an input at its end loses up to a step, as zero itself is rounded.
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    bound = step * np.abs(weight).sum(axis=0) + np.abs(x).sum(axis=1)[:, None] * steps / 2
    bound = bound + width * step * steps / 2
    assert (np.abs(got - x @ weight) <= 1.001 * bound + 1e-5 * np.abs(got).max()).all()


def test_a_norm_evens_its_channels_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 16)).astype(np.float32)
    gain, shift = np.ones(16), np.zeros(16)
    gain[3], shift[5] = 300, 200
    weight = rng.standard_normal((16, 8))
    weight[[3, 5]] /= 300  # as trained models have it
    expected = run(layer(weight, (gain, shift)), x, tmp_path)
    model = layer(weight, (gain, shift))
    quantize_tower(model)
    assert {"gain", "shift", "layer.weight"}.isdisjoint(model.graph.initializers)
    assert cosine(run(model, x, tmp_path), expected) > COSINE


def test_a_norm_that_others_read_keeps_its_weights() -> None:
    model = layer(np.ones((16, 4)), (np.arange(1, 17), np.zeros(16)))
    (normed,) = (node.outputs[0] for node in model.graph if node.op_type == "LayerNormalization")
    model.graph.outputs.append(normed)
    quantize_tower(model)
    np.testing.assert_array_equal(stored(model, "gain"), np.arange(1, 17))


def test_the_first_block_stays_float() -> None:
    model = layer(np.ones((4, 2)), block=0)
    quantize_tower(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_bundle_says_what_is_int8(checkpoint: Path, tmp_path: Path) -> None:
    manifest = export_bundle(checkpoint, tmp_path / "bundle", vision="int8")
    assert manifest.precision.vision == "int8"
    title = str(Parity.read(tmp_path / "bundle").table().title)
    rounded = ROUNDED["clip"][0]
    total = rounded + FLOATS["clip"]
    assert f"vision int8 ({rounded} of {total} vision layers are int8), on" in title


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_needs_a_calibration(dtype: Any, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"CPUs and float32, not {dtype}.*--calibrate"):
        export_bundle(checkpoint, tmp_path / "bundle", dtype, vision="int8")


@pytest.mark.parametrize(("dtype", "decoder"), [("fp32", None), ("fp16", "int8"), ("bf16", "int4")])
def test_int8_prompts_need_a_quantized_decoder(
    dtype: Any, decoder: Any, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="prefill graph is for CPUs"):
        export_bundle(checkpoint, tmp_path / "bundle", dtype, decoder=decoder, prefill="int8")
