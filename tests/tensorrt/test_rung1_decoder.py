"""Rung 1: the decoder that TensorRT is given, against the bundle's own on ONNX Runtime."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from lowered_graphs import TOLERANCE, Array, Run, Sizes, check, compiles, error, lower
from ppllava_engines.bundle import Bundle, GraphSpec
from ppllava_engines.errors import IncompatibleError, UsageError
from ppllava_engines.onnxruntime import open_session
from ppllava_engines.tensorrt.graphs import write_graph
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.decoder import export_decoder
from ppllava_export.precision import DTYPES
from ppllava_export.quiet import quiet
from tiny_bundle import tiny_manifest, write_bundle
from tiny_checkpoint import write_checkpoint

# Kind of decoder, precision, quantization, fields of its config. Heads of 24 are rotated outside of
# the exporter's fused attention; four of four heads share nothing.
DECODERS: dict[str, tuple[str, str, Any, dict[str, int]]] = {
    "llama-fp32": ("clip", "fp32", None, {}),
    "llama-fp16": ("clip", "fp16", None, {}),
    "llama-bf16": ("clip", "bf16", None, {}),
    "llama-fp32-int8": ("clip", "fp32", "int8", {}),
    "llama-fp16-int8": ("clip", "fp16", "int8", {"hidden_size": 256, "intermediate_size": 384}),
    "llama-fp16-int4": ("clip", "fp16", "int4", {"num_key_value_heads": 4}),
    "llama-fp16-24": ("clip", "fp16", None, {"head_dim": 24}),
    "qwen2-fp32": ("siglip", "fp32", None, {"num_key_value_heads": 4}),
    "qwen2-fp32-24": ("siglip", "fp32", None, {"head_dim": 24}),
    "qwen2-fp16-int8": ("siglip", "fp16", "int8", {}),
    "qwen2-fp32-int4": ("siglip", "fp32", "int4", {}),
    "qwen2-bf16-24": ("siglip", "bf16", None, {"head_dim": 24}),
}


@pytest.fixture(scope="module", params=DECODERS)
def decoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, str]:
    """A bundle of a decoder, and its precision; int8 and int4 in blocks are named as well."""
    family, precision, quantization, config = DECODERS[request.param]
    folder = write_bundle(tmp_path_factory.mktemp("decoder"))
    path = write_checkpoint(folder / "source", family=family, text_config=config)  # type: ignore[arg-type]
    with quiet(), torch.no_grad():
        spec = export_decoder(
            load_checkpoint(path).model().language_model,
            (2,),
            DTYPES[precision],
            folder,
            quantization=quantization,
            release=lambda: None,
        )
    kind = precision + (f" {quantization}" if quantization else "")
    return Bundle(folder, tiny_manifest(folder, graphs={}, decoder=spec)), kind


def test_decoder_is_valid_and_its_data_is_not_copied(
    decoder: tuple[Bundle, str], tmp_path: Path
) -> None:
    bundle, kind = decoder
    path, spec = lower(bundle, "decoder", tmp_path / "decoder")
    model = check(path, spec, tmp_path / "copy", opset=21 if "int" in kind else 20)
    assert ("DequantizeLinear" in {node.op_type for node in model.graph.node}) == ("int" in kind)
    data, link = bundle.path / "decoder" / "model.onnx.data", path.with_name("model.onnx.data")
    assert link.stat().st_ino == data.stat().st_ino
    shutil.rmtree(path.parent)
    assert data.stat().st_nlink == 1


class _Lowered:
    """The lowered decoder with buffers outside of it, as a backend keeps them."""

    def __init__(self, path: Path, spec: GraphSpec, capacity: int, *, lean: bool = False) -> None:
        self._session = open_session(path, lean=lean)
        self._past = {}
        rng = np.random.default_rng(9)
        for entry in spec.inputs[2:]:
            shape = [capacity if axis == "c" else axis for axis in entry.shape]
            # What is behind the tokens is whatever an older answer left.
            self._past[entry.name] = rng.normal(0, 50, shape).astype(entry.dtype)  # type: ignore[arg-type]

    def run(self, embeds: Array, length: int) -> list[Array]:
        past = self._past if length else {name: b[:, :, :1] for name, b in self._past.items()}
        feeds = past | {"inputs_embeds": embeds, "length": np.array([length])}
        logits, *rows = self._session.run(None, feeds)
        for buffer, new in zip(self._past.values(), rows, strict=True):
            buffer[:, :, length : length + embeds.shape[1]] = new
        return [logits, *rows]


class _Original:
    """The bundle's decoder, whose cache grows with the tokens."""

    def __init__(self, bundle: Bundle, names: list[str], *, lean: bool) -> None:
        spec = bundle.manifest.decoder
        self._session = open_session(bundle.path / spec.path, lean=lean)
        empty = np.zeros((1, spec.num_kv_heads, 0, spec.head_dim), spec.dtype)
        self._past = {name.replace("present", "past_key_values"): empty for name in names[1:]}
        self._names = names

    def run(self, embeds: Array, length: int) -> list[Array]:
        total = length + embeds.shape[1]
        feeds = {name: value[:, :, :length] for name, value in self._past.items()}
        feeds |= {"inputs_embeds": embeds, "attention_mask": np.ones((1, total), np.int64)}
        logits, *present = self._session.run(self._names, feeds)
        self._past = dict(zip(self._past, present, strict=True))
        return [logits.astype(np.float32), *(value[:, :, length:] for value in present)]


def test_decoder_prefills_steps_and_rewinds(decoder: tuple[Bundle, str], tmp_path: Path) -> None:
    bundle, kind = decoder
    path, spec = lower(bundle, "decoder", tmp_path / "decoder")
    if kind == "bf16":
        assert {entry.dtype for entry in spec.inputs[2:]} == {"bfloat16"}
        pytest.skip("NOT RUN: ONNX Runtime's CPU computes nothing in bfloat16")
    # Otherwise ONNX Runtime rounds what is multiplied by quantized weights to int8 as well.
    lean = "int" in kind
    lowered = _Lowered(path, spec, capacity=40, lean=lean)
    original = _Original(bundle, [entry.name for entry in spec.outputs], lean=lean)
    rng = np.random.default_rng(2)
    # A prompt, steps, a chunk, back to an earlier token, a chunk, a step, a new prompt.
    for start, count in ((0, 7), (7, 1), (8, 1), (9, 4), (3, 5), (8, 1), (0, 1), (1, 1), (0, 12)):
        shape = (1, count, bundle.manifest.decoder.width)
        embeds = rng.standard_normal(shape).astype(spec.inputs[0].dtype)
        got, expected = lowered.run(embeds, start), original.run(embeds, start)
        for mine, theirs in zip(got, expected, strict=True):
            assert error(mine, theirs) <= TOLERANCE[kind.split()[0]]


def test_what_is_behind_the_tokens_does_not_count(tmp_path: Path, plain: Bundle) -> None:
    path, spec = lower(plain, "decoder", tmp_path / "decoder")
    small, large = (_Lowered(path, spec, capacity) for capacity in (9, 200))
    embeds = np.random.default_rng(3).standard_normal((1, 9, 64), dtype=np.float32)
    for start, end in ((0, 7), (7, 8), (8, 9)):
        logits, other = (runner.run(embeds[:, start:end], start)[0] for runner in (small, large))
        np.testing.assert_allclose(logits, other, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def plain(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of an fp32 decoder."""
    folder = write_bundle(tmp_path_factory.mktemp("plain"))
    model = load_checkpoint(checkpoint).model().language_model
    with quiet(), torch.no_grad():
        spec = export_decoder(
            model, (2,), torch.float32, folder, quantization=None, release=lambda: None
        )
    return Bundle(folder, tiny_manifest(folder, graphs={}, decoder=spec))


def test_gigabytes_of_weights_are_not_read(plain: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(plain.path, folder)
    model = onnx.load(folder / "decoder/model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name == "lm_head.MatMul.weight":
            tensor.dims[1] = 1 << 24
            size = tensor.dims[0] * tensor.dims[1] * 4
            for entry in tensor.external_data:
                entry.value = {"offset": "0", "length": str(size)}.get(entry.key, entry.value)
    onnx.save(model, folder / "decoder/model.onnx")
    with (folder / "decoder/model.onnx.data").open("ab") as data:
        data.truncate(size)  # 4 GiB, none of which is on the disk
    tracemalloc.start()
    write_graph(Bundle(folder, plain.manifest), "decoder", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    assert (tmp_path / "out/decoder.onnx").stat().st_size < 1 << 20


def test_where_no_hard_link_can_be_made_it_is_symbolic(
    plain: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, _target: Path) -> None:
        raise OSError(18, "Invalid cross-device link", str(self))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    path, _ = lower(plain, "decoder", tmp_path)
    link = path.with_name("model.onnx.data")
    assert link.is_symlink()
    assert link.resolve() == (plain.path / "decoder/model.onnx.data").resolve()


@pytest.mark.parametrize(
    ("op_type", "name", "value"),
    [
        ("GroupQueryAttention", "softcap", 30.0),
        ("GroupQueryAttention", "local_window_size", 128),
        ("SimplifiedLayerNormalization", "axis", 1),
    ],
)
def test_options_that_have_no_lowering(
    plain: Bundle, op_type: str, name: str, value: float, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(plain.path, folder)
    model = onnx.load(folder / "decoder/model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == op_type)
    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    onnx.save(model, folder / "decoder/model.onnx")
    with pytest.raises(IncompatibleError, match=rf"decoder: /model.* has {name} = {value!r}"):
        write_graph(Bundle(folder, plain.manifest), "decoder", tmp_path / "out")


@pytest.mark.slow
def test_decoder_compiles(decoder: tuple[Bundle, str], run_with: Run, tmp_path: Path) -> None:
    path, spec = lower(decoder[0], "decoder", tmp_path)
    prefill: dict[str, Sizes] = {"n": (1, 64, 128), "c": (1, 1, 256)}
    step: dict[str, Sizes] = {"n": (1, 1, 1), "c": (1, 256, 256)}
    compiles(run_with, path, spec, prefill, step)


def test_the_bundle_is_not_written_over(plain: Bundle) -> None:
    before = plain.file("decoder/model.onnx").read_bytes()
    with pytest.raises(UsageError, match="the bundle's own, give another folder"):
        write_graph(plain, "decoder", plain.path / "decoder")
    assert plain.file("decoder/model.onnx").read_bytes() == before
