"""The graph for prompts: the same model in int8 products, beside the one for steps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ppllava_engines.bundle import MANIFEST, Bundle, DecoderSpec, hash_files
from ppllava_engines.manifest import ROWS_BEFORE_PREFILL
from ppllava_engines.onnxruntime import open_session
from ppllava_engines.parity import PARITY, PREFILL_STAGE
from ppllava_export import export_bundle
from ppllava_export.decoder import export_decoder
from ppllava_export.decoder_quantization import Quantization
from ppllava_export.decoder_weights import Matrix
from ppllava_export.quiet import quiet
from ppllava_runtime.check import check_bundle
from ppllava_runtime.decoders import Sampling
from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder, _Cache

Array = NDArray[Any]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
# Inputs of a linear, and weights, are normal numbers, whose largest is 4.5 times their deviation
# and lies at 127 steps; rounding errs by a step / sqrt(12) in each; and the errors of the nine
# linears that follow one another add up like random ones.
INT8_ERROR = 4.5 / 127 * (2 * 9 / 12) ** 0.5


def decoder(kind: str = "llama") -> LlamaForCausalLM | Qwen2ForCausalLM:
    torch.manual_seed(0)
    model: LlamaForCausalLM | Qwen2ForCausalLM
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5)
    model.requires_grad_(False).train(False)
    return model


def export(folder: Path, quantization: Quantization = "int8", kind: str = "llama") -> DecoderSpec:
    with quiet():
        return export_decoder(
            decoder(kind),
            (2,),
            torch.float32,
            folder,
            quantization=quantization,
            prefill=True,
            release=lambda: None,
        )


def opened(folder: Path, spec: DecoderSpec, *, lean: bool = False) -> OnnxRuntimeDecoder:
    assert spec.prefill is not None
    step, prefill = (open_session(folder / path, lean=lean) for path in (spec.path, spec.prefill))
    return OnnxRuntimeDecoder(step, prefill, np.load(folder / spec.embedding), spec)


def some_embeds(count: int = 40) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 64), dtype=np.float32)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(("quantization", "kind"), [("int8", "llama"), ("int4", "qwen2")])
def test_says_what_torch_says(
    quantization: Quantization, kind: str, lean: bool, tmp_path: Path
) -> None:
    spec = export(tmp_path, quantization, kind)
    assert spec.prefill is not None
    embeds, session = some_embeds(), open_session(tmp_path / spec.prefill, lean=lean)
    expected = decoder(kind)(inputs_embeds=torch.from_numpy(embeds[None])).logits[0, -1].numpy()
    logits = _Cache(session, None, spec, 64).run(embeds, 0)
    assert np.linalg.norm(logits - expected) <= INT8_ERROR * np.linalg.norm(expected)


def test_takes_and_gives_what_the_other_graph_does(tmp_path: Path) -> None:
    spec = export(tmp_path)
    assert spec.prefill is not None
    step, prefill = (ir.load(tmp_path / path).graph for path in (spec.path, spec.prefill))
    for one, other in ((step.inputs, prefill.inputs), (step.outputs, prefill.outputs)):
        kinds = [[(v.name, v.dtype, str(v.shape)) for v in values] for values in (one, other)]
        assert kinds[0] == kinds[1]


def test_nothing_is_stored_twice(tmp_path: Path) -> None:
    """Only the weights that it has of its own are written for it: not norms, rotation or head."""
    spec = export(tmp_path)
    assert spec.prefill is not None
    width, inner, keys = 64, 96, 2 * 16
    shapes = [(width, width + 2 * keys), (width, width), (width, inner), (width, inner)]
    shapes += [(inner, width)]
    own = sum(rows * columns + 4 * columns for rows, columns in shapes) * SIZES["num_hidden_layers"]
    tensors = ir.load(tmp_path / spec.prefill).graph.initializers.values()
    stored: dict[str, int] = {}
    for tensor in (value.const_value for value in tensors):
        assert isinstance(tensor, ir.ExternalTensor)
        stored[str(tensor.location)] = stored.get(str(tensor.location), 0) + tensor.nbytes
    assert stored["prefill.onnx.data"] == own
    assert stored.keys() == {"prefill.onnx.data", "model.onnx.data"}


@pytest.mark.parametrize("slice_", [64 * 6, 1 << 19])
def test_columns_are_rounded_and_never_overflow(
    slice_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppllava_export.decoder_weights._SLICE", slice_)
    parts = [torch.randn(10, 64), torch.randn(6, 64) * 3]
    integers, steps = (t.numpy() for t in Matrix(parts, lambda: None).columns("w"))
    whole = torch.cat(parts).T.numpy()
    assert integers.dtype == np.int8
    assert (np.abs(integers * steps - whole) <= 0.5001 * steps).all()
    # Products with 255 of two neighbours are added in 16 bits.
    pairs = np.abs(integers.astype(np.int32)).reshape(32, 2, -1).sum(axis=1)
    assert pairs.max() * 255 <= 2**15 - 1


def test_prompts_go_through_it_but_for_their_first_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = export(tmp_path)
    decoder = opened(tmp_path, spec)
    runs: list[tuple[str, int, int]] = []
    run = _Cache._run

    def noted(cache: _Cache, kind: str, embeds: Array, length: int) -> None:
        runs.append((kind, length, len(embeds)))
        run(cache, kind, embeds, length)

    monkeypatch.setattr(_Cache, "_run", noted)
    few, many = some_embeds(3), some_embeds(20)
    list(decoder.generate([few, many, few], 2, Sampling()))
    first = ROWS_BEFORE_PREFILL
    at = [0, 3, first, 23, 26]
    counts = [3, first - 3, 23 - first, 3, 1]
    kinds = ["step", "step", "prefill", "step", "step"]
    assert runs == list(zip(kinds, at, counts, strict=True))
    runs.clear()
    alone = OnnxRuntimeDecoder(decoder._step, None, decoder._table, spec)
    list(alone.generate([many], 1, Sampling()))
    assert runs == [("step", 0, 20)]


def test_one_cache_serves_both(tmp_path: Path) -> None:
    """What the one graph wrote, the other reads: the answer is nearly that of the steps' alone."""
    spec = export(tmp_path)
    both = opened(tmp_path, spec)
    embeds = some_embeds()
    logits = []
    for prefill in (both._prefill, None):
        cache = _Cache(both._step, prefill, spec, 64)
        cache.run(embeds[:-1], 0)
        logits.append(cache.run(embeds[-1:], len(embeds) - 1))
    assert 0 < np.linalg.norm(logits[0] - logits[1]) <= INT8_ERROR * np.linalg.norm(logits[1])


@pytest.fixture(scope="module")
def prefilling(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prefilling") / "bundle"
    export_bundle(checkpoint, out, decoder="int8", prefill="int8")
    return out


def test_its_logits_are_compared_with_torch_at_export(prefilling: Path) -> None:
    stages = json.loads((prefilling / PARITY).read_text(encoding="utf-8"))["stages"]
    step, prefill = (
        next(stage for stage in stages if stage["name"] == name)
        for name in ("logits", PREFILL_STAGE)
    )
    assert prefill["shape"] == step["shape"]
    assert 0.9 < prefill["min_cosine"] <= prefill["cosine"]
    # It was this graph that ran: its roundings are others.
    assert prefill["max_error"] != step["max_error"]


def test_the_check_finds_it_sound(prefilling: Path) -> None:
    report = check_bundle(prefilling)
    assert report.verdict == "sound"
    step, prefill = (
        next(stage for stage in report.stages if stage.name == name)
        for name in ("logits", PREFILL_STAGE)
    )
    assert (prefill.tolerance, prefill.passed) == (None, True)
    assert prefill.max_error != step.max_error


def test_the_check_finds_weights_that_are_not_its_own(prefilling: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(prefilling, tmp_path / "copy"))
    path = copy / "decoder/prefill.onnx.data"  # the steps' graph has nothing in it
    tensors = ir.load(copy / "decoder/prefill.onnx").graph.initializers.values()
    content = bytearray(path.read_bytes())
    for tensor in (value.const_value for value in tensors):
        assert isinstance(tensor, ir.ExternalTensor)
        if tensor.location == path.name and tensor.dtype == ir.DataType.INT8:
            assert tensor.offset is not None
            weights = tensor.numpy()[::-1].tobytes()
            content[tensor.offset : tensor.offset + len(weights)] = weights
    path.write_bytes(content)
    manifest = Bundle.open(prefilling).manifest
    changed = dataclasses.replace(manifest, files=hash_files(copy))
    (copy / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
    report = check_bundle(copy)
    bad = [found.name for found in report.findings if found.status == "bad"]
    assert bad == [f"replay {PREFILL_STAGE}"]
    assert PREFILL_STAGE in report.verdict
