"""The decoder's graph against torch: both families, every precision, and how it is written."""

from __future__ import annotations

import weakref
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
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ppllava_engines.bundle import DecoderSpec
from ppllava_engines.errors import IncompatibleError
from ppllava_engines.onnxruntime import open_session
from ppllava_export.decoder import export_decoder
from ppllava_export.decoder_quantization import Bits, Quantization, block_size, pack_int4, quantize
from ppllava_export.decoder_weights import Matrix
from ppllava_export.precision import widen
from ppllava_export.quiet import quiet

Array = NDArray[Any]
Decoder = LlamaForCausalLM | Qwen2ForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,  # as many outputs as a linear inside: only the head is the head
    "max_position_embeddings": 128,
}
# Two roundings of 2^-11 meet in a product, and some 30 products follow one another.
FP16_ERROR = 30 * 2 * 2.0**-11
BF16_ERROR = 30 * 2 * 2.0**-8


def decoder(kind: str = "llama", head_dim: int = 16, **options: Any) -> Decoder:
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": head_dim} | options
    model: Decoder
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float("norm" in name), 0.2)
        else:
            torch.nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5)
    model.requires_grad_(False).train(False)
    return model


def export(
    model: Decoder,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
) -> DecoderSpec:
    with quiet():
        return export_decoder(
            model, (2, 7), dtype, folder, quantization=quantization, release=lambda: None
        )


def run(session: ort.InferenceSession, spec: DecoderSpec, *parts: Array) -> NDArray[np.float32]:
    """The logits (1, V) after all of `parts`, (1, n, D) each, one after the other."""
    names = [output.name for output in session.get_outputs()]
    empty = np.zeros((1, spec.num_kv_heads, 0, spec.head_dim), spec.dtype)
    past = {name: empty for name in names if name != "logits"}
    total = 0
    for part in parts:
        total += part.shape[1]
        feeds = {name.replace("present", "past_key_values"): past[name] for name in past}
        feeds |= {"inputs_embeds": part.astype(spec.dtype)}
        feeds |= {"attention_mask": np.ones((1, total), np.int64)}
        past = dict(zip(names, session.run(names, feeds), strict=True))
        logits = past.pop("logits")
    return logits[:, 0].astype(np.float32)


def torch_logits(model: Decoder, embeds: Array) -> NDArray[np.float32]:
    wide = model.to(torch.float32)  # type: ignore[arg-type]
    logits = wide(inputs_embeds=torch.from_numpy(embeds)).logits
    values: NDArray[np.float32] = logits[:, -1].numpy()
    return values


def some_embeds(count: int = 9) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((1, count, 64), dtype=np.float32)


def error(got: Array, expected: Array) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def optimised(path: Path) -> Counter[str]:
    """Operators that are left after ONNX Runtime has optimised a graph."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("head_dim", [16, 24])  # 24: rotation outside of fused attention
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_floats_are_torchs_and_steps_are_the_prefill(
    kind: str, head_dim: int, tmp_path: Path
) -> None:
    model, embeds = decoder(kind, head_dim), some_embeds()
    expected = torch_logits(model, embeds)
    for dtype, limit in ((torch.float32, 2e-5), (torch.float16, FP16_ERROR)):
        spec = export(model, tmp_path, dtype)
        session = open_session(tmp_path / spec.path)
        whole = run(session, spec, embeds)
        assert error(whole, expected) <= limit
        steps = run(session, spec, embeds[:, :4], *np.split(embeds[:, 4:], 5, axis=1))
        assert error(steps, whole) <= limit
        table = np.load(tmp_path / spec.embedding, mmap_mode="r")
        rows = model.get_parameter("model.embed_tokens.weight").to(dtype).numpy()
        np.testing.assert_array_equal(table, rows)
    assert (spec.num_kv_heads, spec.head_dim, spec.num_layers) == (2, head_dim, 2)
    assert (spec.vocab_size, spec.width, spec.max_positions) == (96, 64, 128)
    assert spec.eos_token_ids == (2, 7)


def test_biases_of_qwen2_count(tmp_path: Path) -> None:
    model = decoder("qwen2")
    spec = export(model, tmp_path)
    got = run(open_session(tmp_path / spec.path), spec, some_embeds())
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.zero_()
        layer.self_attn.v_proj.bias.zero_()
    assert error(got, torch_logits(model, some_embeds())) > 1e-2


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_stretched_rotations(rope: dict[str, Any], tmp_path: Path) -> None:
    model = decoder(rope_parameters=rope | {"rope_theta": 10000.0})
    embeds = some_embeds(60)
    spec = export(model, tmp_path)
    got = run(open_session(tmp_path / spec.path), spec, embeds)
    assert error(got, torch_logits(model, embeds)) <= 2e-5


def test_refusals(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(IncompatibleError, match="rope_type is 'dynamic'"):
        export(decoder(rope_parameters=dynamic), tmp_path)
    windowed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(IncompatibleError, match="use_sliding_window"):
        export(decoder("qwen2", **windowed), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize(("kind", "head_dim"), [("llama", 16), ("qwen2", 24)])
def test_quantized_graph_is_the_model_with_quantized_weights(
    kind: str,
    head_dim: int,
    quantization: Quantization,
    bits: Bits,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    model, embeds = decoder(kind, head_dim), some_embeds()
    exact = torch_logits(model, embeds)
    spec = export(model, tmp_path, dtype, quantization)
    path = tmp_path / spec.path
    lean, fast = (run(open_session(path, lean=on), spec, embeds) for on in (True, False))
    num_linears = 0
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            num_linears += 1
            part.weight.data = dequantized(part.weight, 8 if name == "lm_head" else bits, dtype)
    # As it is written, the graph computes with exactly these weights.
    limit = 2e-5 if dtype == torch.float32 else FP16_ERROR
    assert error(lean, torch_logits(model, embeds)) <= limit
    # ONNX Runtime rounds the activations to int8 as well: half a step of 1/127 per product, whose
    # errors add up like random ones over the products that follow one another.
    assert error(fast, lean) <= 0.5 / 127 * 30**0.5 + limit
    cosine = np.vdot(fast, exact) / np.linalg.norm(fast) / np.linalg.norm(exact)
    assert cosine >= (0.999 if bits == 8 else 0.98)
    left = optimised(path)
    assert (left["MatMul"], left["DequantizeLinear"]) == (0, 0)
    packed = 2 * 2 if head_dim == 16 else 0  # q, k and v are one product in either layer
    assert left["MatMulNBits"] == num_linears - packed


def dequantized(weight: torch.Tensor, bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    """What the quantized weights (N, K) stand for."""
    block = block_size(weight.shape[1], bits)
    assert block is not None
    blocks = np.ascontiguousarray(weight.numpy().T).reshape(-1, block, weight.shape[0])
    scale_dtype = np.dtype(str(dtype).removeprefix("torch."))
    integers, scales = quantize(blocks, bits, scale_dtype)
    values = integers * scales[:, None].astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.reshape(weight.shape[::-1]).T))


def test_inputs_that_no_block_divides_stay_float(tmp_path: Path) -> None:
    model = decoder(intermediate_size=90)  # of down_proj
    spec = export(model, tmp_path, quantization="int4")
    left = optimised(tmp_path / spec.path)
    assert (left["MatMul"], left["MatMulNBits"]) == (2, 2 * 4 + 1)
    got = run(open_session(tmp_path / spec.path), spec, some_embeds())
    assert np.isfinite(got).all()


def test_bfloat16_is_float_at_its_edges_but_for_the_cache(tmp_path: Path) -> None:
    model, embeds = decoder().bfloat16(), some_embeds()
    spec = export(model, tmp_path, torch.bfloat16)
    assert spec.dtype == "float32"
    graph = ir.load(tmp_path / spec.path).graph
    types = {value.name: value.dtype for value in (*graph.inputs, *graph.outputs)}
    assert types["inputs_embeds"] == types["logits"] == ir.DataType.FLOAT
    assert types["past_key_values.0.key"] == ir.DataType.BFLOAT16
    assert types["present.1.value"] == ir.DataType.BFLOAT16
    weights = {value.dtype for value in graph.initializers.values()}
    assert weights == {ir.DataType.BFLOAT16}
    with pytest.raises(IncompatibleError):
        open_session(tmp_path / spec.path)
    wide = tmp_path / "decoder" / "wide.onnx"
    widen(tmp_path / spec.path, wide)
    # Only the rotation's table is rounded to bfloat16 in one and not in the other.
    assert error(run(open_session(wide), spec, embeds), torch_logits(model, embeds)) <= BF16_ERROR


@pytest.mark.parametrize(("quantization", "num_tensors"), [(None, 11), ("int8", 11), ("int4", 11)])
def test_weights_are_made_one_at_a_time(
    quantization: Quantization | None,
    num_tensors: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No matrix that was made for the graph is alive when the next one is made."""
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    evaluate = ir.LazyTensor._evaluate

    def noted(tensor: ir.LazyTensor) -> Any:
        if tensor.nbytes <= 1024:  # norms, biases and scales
            return evaluate(tensor)
        alive.append(sum(other() is not None for other in made))
        value: Any = evaluate(tensor)
        made.append(weakref.ref(value.raw))
        return value

    monkeypatch.setattr(ir.LazyTensor, "_evaluate", noted)
    export(decoder(), tmp_path, quantization=quantization)
    assert alive == [0] * num_tensors


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("parts", [1, 3])
def test_slices_make_the_whole_matrix(
    bits: Bits, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppllava_export.decoder_weights._SLICE", 64 * 6)  # six rows at a time
    released: list[None] = []
    weights = [torch.randn(2 * (5 + i), 64).bfloat16() for i in range(parts)]
    matrix = Matrix(weights, lambda: released.append(None))
    whole = torch.cat(weights)
    floats = matrix.floats("w", ir.DataType.FLOAT).numpy()
    np.testing.assert_array_equal(floats, whole.float().T.numpy())
    assert len(released) == sum(-(-len(weight) // 6) for weight in weights)
    values, scales, *_ = (t.numpy() for t in matrix.quantized("w", bits, ir.DataType.FLOAT))
    block = 64 // len(scales)
    made = values.astype(np.float32) * np.repeat(scales, block, axis=0)
    expected = dequantized(whole.float(), bits, torch.float32).T.numpy()
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rounding(dtype: type) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((4, 32, 50), dtype=np.float32)
    blocks[0, :, 0] = 0
    blocks[1, :, 0] = 1e-7  # below fp16's normal numbers
    choices: tuple[Bits, ...] = (8, 4)
    for bits in choices:
        integers, scales = quantize(blocks, bits, np.dtype(dtype))
        assert (scales > 0).all()
        assert scales.dtype == dtype
        values = integers * scales[:, None].astype(np.float32)
        assert not values[0, :, 0].any()
        step = scales[:, None].astype(np.float32)
        inside = np.abs(blocks) <= (127 if bits == 8 else 7) * step
        assert (np.abs(values - blocks)[inside] <= (0.5001 * step + 0 * blocks)[inside]).all()
    # The least squares are less than those of the largest magnitude at 7, by far.
    plain = np.abs(blocks).max(axis=1, keepdims=True) / 7 + np.float32(1e-30)
    naive = np.rint(blocks / plain) * plain
    assert np.square(values - blocks).sum() <= 0.85 * np.square(naive - blocks).sum()


@pytest.mark.parametrize(
    ("channels", "int8", "int4"),
    [(4096, 128, 32), (576, 64, 32), (11008, 128, 32), (48, 16, 16), (40, None, None)],
)
def test_block_sizes(channels: int, int8: int | None, int4: int | None) -> None:
    assert (block_size(channels, 8), block_size(channels, 4)) == (int8, int4)


def test_int4_is_packed_as_onnx_packs_it() -> None:
    integers = np.random.default_rng(0).integers(-8, 8, (3, 10)).astype(np.int8)
    packed = ir.PackedTensor(pack_int4(integers).ravel(), ir.DataType.INT4, shape=(3, 10))
    np.testing.assert_array_equal(packed.numpy().astype(np.int8), integers)
