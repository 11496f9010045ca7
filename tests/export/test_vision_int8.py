"""Int8 vision: what is quantized, how far it is from float, and who takes it."""

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
from safetensors.numpy import load_file

from ppllava_engines.errors import DataError, InternalError, NotFoundError
from ppllava_engines.onnxruntime import open_session
from ppllava_engines.parity import Parity
from ppllava_export import export_bundle
from ppllava_export.calibration import calibrate, read_frames
from ppllava_export.checkpoint import Checkpoint, load_checkpoint
from ppllava_export.graphs import export_vision
from ppllava_export.mapped import streamed_fp32
from ppllava_export.vision_int8 import Channels, count_layers, quantize_vision
from tiny_checkpoint import save_tensors, write_checkpoint
from tiny_videos import numbered_frames, write_video

Array = NDArray[Any]
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {},
    "bt-adapter": {"btadapter": True},
    "siglip": {"family": "siglip"},
}
PER_BLOCK = 6  # query, key, value, output and the two of the feed-forward
# Blocks that are used, and what follows them: clip_visual_projection or the head's three products,
# and linear_1. A time block has five, temporal_fc included.
NUM_LINEARS = {
    "clip": 3 * PER_BLOCK + 2,
    "bt-adapter": 3 * PER_BLOCK + 2 * (5 + PER_BLOCK) + 2,
    "siglip": 4 * PER_BLOCK + 4,
}
# Random weights have no outliers; rounding to 127 levels leaves an error of some 1 % a layer.
COSINE = 0.999


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", numbered_frames(12))


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(tower: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(write_checkpoint(tmp_path_factory.mktemp(tower), **TOWERS[tower]))


@pytest.fixture(scope="module")
def seen(model: Checkpoint, video: Path) -> dict[str, Channels]:
    return calibrate(model, [video])


@pytest.fixture(scope="module", params=["float32", "float16"])
def graph(
    request: pytest.FixtureRequest,
    model: Checkpoint,
    seen: dict[str, Channels],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The file of an int8 vision graph."""
    folder = tmp_path_factory.mktemp("int8")
    return folder / export_vision(model, getattr(torch, request.param), folder, seen).path


def test_calibration_sees_every_linear_layer_of_the_vision_graph(
    tower: str, seen: dict[str, Channels]
) -> None:
    assert len(seen) == NUM_LINEARS[tower]
    assert not [name for name in seen if "text" in name or "linear_2" in name]
    for channels in seen.values():
        assert (channels.peaks**2 >= channels.powers).all()
        assert channels.peaks.max() > 0


def test_calibration_is_of_all_clips(model: Checkpoint, video: Path, tmp_path: Path) -> None:
    frames = numbered_frames(12)[:, ::-1]
    other = write_video(tmp_path / "other.mp4", np.ascontiguousarray(frames))
    both = calibrate(model, [video, other])
    alone = [calibrate(model, [path]) for path in (video, other)]
    for name, channels in both.items():
        parts = [one[name] for one in alone]
        expected = np.max([part.peaks for part in parts], axis=0)
        np.testing.assert_array_equal(channels.peaks, expected)
        powers = np.mean([part.powers for part in parts], axis=0)
        np.testing.assert_allclose(channels.powers, powers, rtol=1e-5)


def test_calibration_needs_videos_that_can_be_read(model: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere\.mp4"):
        calibrate(model, [tmp_path / "nowhere.mp4"])
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"no\.mp4"):
        calibrate(model, [tmp_path / "no.mp4"])


def test_graph_is_standard_symmetric_and_as_described(graph: Path, tower: str) -> None:
    onnx.checker.check_model(str(graph), full_check=True)
    proto = onnx.load(str(graph))
    assert {opset.domain for opset in proto.opset_import} == {""}
    counts = Counter(node.op_type for node in proto.graph.node)
    assert counts["QuantizeLinear"] == NUM_LINEARS[tower]
    assert counts["DequantizeLinear"] == 2 * NUM_LINEARS[tower]
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = (values[name] for name in node.input[1:])
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
        weight = values.get(node.input[0])
        assert scale.shape == zero.shape == (() if weight is None else weight.shape[1:])
        if weight is not None:
            assert weight.dtype == np.int8
            pairs = np.abs(weight.astype(int)).reshape(len(weight) // 2, 2, -1).sum(axis=1)
            assert pairs.max(axis=0).min() >= 126  # no channel wastes levels
            assert pairs.max() <= 128
            assert weight.min() >= -127
    floats = [name for name, value in values.items() if value.ndim == 2 and value.dtype != np.int8]
    assert not [name for name in floats if "proj" in name or "fc" in name or "linear" in name]


def test_every_product_runs_on_integers(
    model: Checkpoint, seen: dict[str, Channels], tower: str, tmp_path: Path
) -> None:
    spec = export_vision(model, torch.float32, tmp_path, seen)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(tmp_path / spec.path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    counts = Counter(node.op_type for node in nodes)
    assert counts["MatMulIntegerToFloat"] == NUM_LINEARS[tower]
    assert counts["DequantizeLinear"] == 0
    assert counts["MatMul"] == 0


def test_int8_is_near_torch(graph: Path, model: Checkpoint, video: Path) -> None:
    pixels = read_frames(video, model.config)[1:]
    module = model.model()
    with torch.no_grad(), streamed_fp32(module, model.weights.release):
        expected = [out.numpy() for out in module.encode(torch.from_numpy(pixels))]
    assert len(pixels) == 7  # and traced with 2
    for lean in (False, True):  # integers, and the same rounding in floats
        session = open_session(graph, 1, lean=lean)
        dtype = {"tensor(float)": "float32", "tensor(float16)": "float16"}
        (taken,) = session.get_inputs()
        got = session.run(["keys", "hidden"], {"pixel_values": pixels.astype(dtype[taken.type])})
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            assert cosine(a, b) >= COSINE


def cosine(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# One layer by itself, where bounds can be told exactly.


def linear(
    weight: Array, norm: tuple[Array, Array] | None = None, dtype: str = "float32"
) -> ir.Model:
    """x (n, K) [through a layer norm] times a weight (K, N) → y, as the tracer leaves it."""
    element = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
    arrays = {"layer.weight": weight.astype(dtype)}
    nodes = [helper.make_node("MatMul", ["x", "layer.weight"], ["y"])]
    if norm is not None:
        arrays |= {"gain": norm[0].astype(dtype), "shift": norm[1].astype(dtype)}
        nodes[0].input[0] = "normed"
        operands = ["x", "gain", "shift"]
        nodes.insert(0, helper.make_node("LayerNormalization", operands, ["normed"]))
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", element, ("n", weight.shape[0]))],
            [helper.make_tensor_value_info("y", element, ("n", weight.shape[1]))],
            [numpy_helper.from_array(array, name) for name, array in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layer', 'linear']"
    return model


def channels(x: Array) -> Channels:
    return Channels(np.abs(x).max(axis=0), (x**2).mean(axis=0))


def run(model: ir.Model, x: Array, folder: Path) -> Array:
    ir.save(model, folder / "layer.onnx")
    onnx.checker.check_model(str(folder / "layer.onnx"), full_check=True)
    out: Array = open_session(folder / "layer.onnx", 1).run(None, {"x": x})[0]
    return out


def initializers(model: ir.Model) -> dict[str, Array]:
    out = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        out[name] = value.const_value.numpy()
    return out


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("width", [4, 33, 512])
def test_one_layer_is_within_its_rounding(rows: int, width: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([rows, width])
    sizes = 10 ** rng.uniform(-1, 1, width).astype(np.float32)
    x = rng.standard_normal((rows, width)).astype(np.float32) * sizes
    weight = rng.standard_normal((width, 5)).astype(np.float32)
    model = linear(weight)
    quantize_vision(model, {"layer": channels(x)})
    got = run(model, x, tmp_path)
    values = initializers(model)
    factors = 1 / values["x.shrink"]
    assert (np.log2(factors) % 1 == 0).all()
    (step,) = (v for name, v in values.items() if name.endswith("input.scale"))
    steps = values["layer.weight.int8.scale"]
    even, heavy = np.abs(x / factors), np.abs(weight * factors[:, None])
    # half a step of one times the other, and of both at once; the rest is fp32's own
    bound = step / 2 * heavy.sum(axis=0) + even.sum(axis=1)[:, None] * steps / 2
    bound = bound + width * step * steps / 4
    assert (np.abs(got - x @ weight) <= 1.001 * bound + 1e-5 * np.abs(got).max()).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_extremes_do_not_saturate(sign: int, tmp_path: Path) -> None:
    """255 · 127 twice is too much for 16 bits, in which some CPUs add pairs of products."""
    x = np.full((3, 512), 2.0, np.float32)
    x[1] *= -1
    x[2, ::2] *= -1
    weight = np.full((512, 8), sign * 64 / 127, np.float32)
    weight[1::2] *= 63 / 64
    weight[:, 4:] *= np.tile([1, 1, -1, -1], 128)[:, None]
    model = linear(weight)
    quantize_vision(model, {"layer": channels(x)})
    assert set(np.abs(initializers(model)["layer.weight.int8"].ravel())) == {63, 64}
    got = run(model, x, tmp_path)
    # Every value is a whole number of steps, so nothing is lost but fp32's last bits.
    np.testing.assert_allclose(got, x @ weight, atol=1e-5 * 512)


def test_what_was_never_seen_is_cut_off_not_wrapped(tmp_path: Path) -> None:
    x = np.ones((1, 4), np.float32)
    weight = np.tile(np.array([[1], [0]], np.float32), (2, 2))
    model = linear(weight)
    quantize_vision(model, {"layer": channels(x)})
    np.testing.assert_allclose(run(model, 1000 * x, tmp_path), 2, rtol=1e-5)


def test_a_norm_takes_the_division_of_its_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 16)).astype(np.float32)
    gain, shift = 10 ** rng.uniform(-1, 1, 16), rng.standard_normal(16)
    weight = rng.standard_normal((16, 8)).astype(np.float32)
    expected = run(linear(weight, (gain, shift)), x, tmp_path)
    normed = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True) * gain + shift
    model = linear(weight, (gain, shift))
    quantize_vision(model, {"layer": channels(normed.astype(np.float32))})
    assert [node.op_type for node in model.graph].count("Mul") == 0
    assert "gain" not in model.graph.initializers
    assert cosine(run(model, x, tmp_path), expected) > COSINE


def test_a_norm_that_others_read_keeps_its_weights() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 16)).astype(np.float32)
    gain = 10 ** rng.uniform(-1, 1, 16)
    model = linear(rng.standard_normal((16, 4)).astype(np.float32), (gain, np.zeros(16)))
    (normed,) = (node.outputs[0] for node in model.graph if node.op_type == "LayerNormalization")
    model.graph.outputs.append(normed)
    quantize_vision(model, {"layer": channels((x * gain).astype(np.float32))})
    assert [node.op_type for node in model.graph].count("Mul") == 1
    np.testing.assert_array_equal(initializers(model)["gain"], gain.astype(np.float32))


def test_one_large_channel_does_not_silence_the_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((256, 64)).astype(np.float32)
    x[:, 7] *= 300
    weight = rng.standard_normal((64, 16)).astype(np.float32)
    weight[7] /= 300  # as trained models have it
    model = linear(weight)
    quantize_vision(model, {"layer": channels(x)})
    assert "layer.weight.int8" in model.graph.initializers
    assert cosine(run(model, x, tmp_path), x @ weight) > COSINE


def test_what_would_be_lost_stays_float(tmp_path: Path) -> None:
    x = np.full((1000, 4), 1e-3, np.float32)
    x[0] = 1  # one step of 1/127 for values of a thousandth
    weight = np.ones((4, 2), np.float32)
    model = linear(weight)
    with pytest.raises(DataError, match=r"none of 1 layers can be rounded.*within 30 dB"):
        quantize_vision(model, {"layer": channels(x)})
    assert [node.op_type for node in model.graph] == ["MatMul"]
    np.testing.assert_allclose(run(model, x, tmp_path), x @ weight, rtol=1e-6)


def test_how_many_layers_are_int8_is_counted(
    model: Checkpoint, seen: dict[str, Channels], tower: str, tmp_path: Path
) -> None:
    noisy = Channels(np.ones(32, np.float32), np.full(32, 1e-6, np.float32))
    block = "vision_tower.vision_model.encoder.layers.0."
    layers = [f"{block}self_attn.{name}_proj" for name in "qkv"]  # which share their input
    spec = export_vision(model, torch.float32, tmp_path, {**seen, **dict.fromkeys(layers, noisy)})
    total = NUM_LINEARS[tower]
    assert count_layers(tmp_path / spec.path) == (total - 3, total)
    spec = export_vision(model, torch.float32, tmp_path)
    assert count_layers(tmp_path / spec.path) == (0, total)


def test_norms_with_equal_weights_are_evened_apart(video: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if "norm" in name:
            tensors[name] = np.full_like(value, name.endswith("weight"))
    save_tensors(folder, tensors)
    checkpoint = load_checkpoint(folder)
    spec = export_vision(checkpoint, torch.float32, tmp_path, calibrate(checkpoint, [video]))
    assert count_layers(tmp_path / spec.path) == (NUM_LINEARS["clip"],) * 2


def test_zeros_are_no_scale(tmp_path: Path) -> None:
    x = np.ones((2, 4), np.float32)
    x[:, 1] = 0
    weight = np.ones((4, 3), np.float32)
    weight[:, 2] = weight[::2] = 0
    model = linear(weight)
    quantize_vision(model, {"layer": channels(x)})
    np.testing.assert_allclose(run(model, x, tmp_path), [[1, 1, 0]] * 2, rtol=1e-5)
    nothing = linear(weight)
    with pytest.raises(DataError, match="none of 1 layers"):
        quantize_vision(nothing, {"layer": channels(0 * x)})
    assert [node.op_type for node in nothing.graph] == ["MatMul"]


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0])
def test_small_weights_keep_their_levels_in_fp16(size: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((32, 64)).astype(np.float16)
    weight = (size * rng.standard_normal((64, 8))).astype(np.float16)
    model = linear(weight, dtype="float16")
    quantize_vision(model, {"layer": channels(x.astype(np.float32))})
    values = initializers(model)
    steps = values["layer.weight.int8.scale"]
    assert steps.dtype == np.float16
    even = weight.astype(np.float64) / values["x.shrink"].astype(np.float64)[:, None]
    stored = values["layer.weight.int8"] * steps.astype(np.float64)
    assert (np.abs(stored - even) <= 0.5001 * steps.astype(np.float64)).all()
    assert (run(model, x, tmp_path) != 0).any()


def test_the_parity_table_says_how_much_is_int8(
    checkpoint: Path, video: Path, tmp_path: Path
) -> None:
    export_bundle(checkpoint, tmp_path / "bundle", vision="int8", calibration=[video])
    total = NUM_LINEARS["clip"]
    title = Parity.read(tmp_path / "bundle").table().title
    assert f"vision int8-static ({total} of {total} vision layers are int8), on" in str(title)


def test_unknown_layers_are_named() -> None:
    model = linear(np.ones((4, 2), np.float32))
    with pytest.raises(InternalError, match=r"b\.fc1, b\.fc2"):
        x = np.ones((1, 4), np.float32)
        quantize_vision(model, {"b.fc2": channels(x), "layer": channels(x), "b.fc1": channels(x)})
