"""The export as a whole: what a bundle holds, and what is left of one that failed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file

import ppllava_export.graphs
from ppllava_engines.bundle import Bundle, Precision
from ppllava_engines.engine import open_engine
from ppllava_engines.errors import IncompatibleError, InternalError, NotFoundError, UsageError
from ppllava_engines.memory_parity import MEMORY_STAGES
from ppllava_engines.onnxruntime import open_session
from ppllava_engines.parity import STAGES as PARITY_STAGES
from ppllava_engines.parity import Parity, Stage
from ppllava_engines.samples import Samples
from ppllava_export import STAGES, export, export_bundle
from ppllava_export.checkpoint import Checkpoint, load_checkpoint
from ppllava_export.graphs import export_text, export_vision
from tiny_checkpoint import Family, edit_json, write_checkpoint


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bundle_holds_the_contract(request: pytest.FixtureRequest, precision: str) -> None:
    path = request.getfixturevalue("bundle" if precision == "fp32" else "bundle_fp16")
    opened = Bundle.open(path, verify="full")
    manifest = opened.manifest
    dtype = {"fp32": "float32", "fp16": "float16"}[precision]
    assert str(manifest.precision) == precision
    described = {
        name: [
            [f"{tensor.name} {tensor}" for tensor in tensors]
            for tensors in (graph.inputs, graph.outputs)
        ]
        for name, graph in manifest.graphs.items()
        if name in ("vision", "text", "pool")  # for the others see test_memory_graphs.py
    }
    assert described == {
        "vision": [
            [f"pixel_values {dtype} (T,3,32,32)"],
            [f"keys {dtype} (T,16,16)", f"hidden {dtype} (T,16,64)"],
        ],
        "text": [["input_ids int64 (1,n)"], [f"text_embed {dtype} (1,16)"]],
        "pool": [
            [
                f"keys {dtype} (T,16,16)",
                f"hidden {dtype} (T,16,64)",
                f"text_embed {dtype} (1,16)",
                "kernel int64 (3)",
                "stride int64 (3)",
            ],
            [f"pooled {dtype} (N,64)", "relevance float32 (T,4,4)"],
        ],
    }
    decoder = manifest.decoder
    assert (decoder.vocab_size, decoder.width, decoder.num_layers) == (384, 64, 2)
    assert (decoder.num_kv_heads, decoder.head_dim, decoder.max_positions) == (2, 16, 512)
    assert (decoder.dtype, decoder.eos_token_ids) == (dtype, (2,))
    table = np.load(opened.file(decoder.embedding), mmap_mode="r")
    assert (table.shape, table.dtype) == ((384, 64), np.dtype(dtype))
    model = manifest.model
    assert (model.default_frames, model.max_frames, model.text_positions) == (32, 64, 248)
    assert (model.text_bos_token_id, model.text_eos_token_id) == (512, 513)
    assert set(manifest.tokenizers) == {"decoder", "text"}
    parity = Parity.read(path)
    memories = MEMORY_STAGES if precision == "fp32" else MEMORY_STAGES[1:]
    assert tuple(stage.name for stage in parity.stages) == PARITY_STAGES + memories
    assert all(stage.passed for stage in parity.stages)
    assert Samples.read(opened.file(manifest.samples)).keys.dtype == dtype
    assert manifest.image_newline is not None
    newline = np.load(opened.file(manifest.image_newline))
    stored = load_file(request.getfixturevalue("checkpoint") / "model.safetensors")
    np.testing.assert_array_equal(newline, stored["image_newline"].astype(dtype))
    assert manifest.sources.keys() == {"checkpoint"}
    assert len(manifest.sources["checkpoint"]) == 64
    assert {"ppllava-edge", "torch", "onnxruntime"} <= manifest.exporter.keys()


def test_graphs_run_for_any_number_of_frames(bundle_fp16: Path) -> None:
    opened = Bundle.open(bundle_fp16)
    engines = {name: opened.engine(name) for name in ("vision", "text", "pool")}
    text = engines["text"].run({"input_ids": np.array([[512, 7, 513]])})
    window = {"kernel": np.array([1, 2, 3]), "stride": np.array([1, 1, 1])}
    for frames in (1, 5):
        pixels = np.zeros((frames, 3, 32, 32), np.float16)
        video = engines["vision"].run({"pixel_values": pixels})
        pooled = engines["pool"].run(video | text | window)
        assert pooled["pooled"].shape == (frames * 3 * 2, 64)
        assert pooled["relevance"].shape == (frames, 4, 4)
        assert pooled["relevance"].dtype == np.float32


def test_pooling_is_one_node_and_fp32_where_it_matters(bundle_fp16: Path) -> None:
    pool = onnx.load(str(bundle_fp16 / "graphs/pool.onnx"))
    assert [n.op_type for n in pool.graph.node if n.domain == "ppllava"] == ["StridedWeightedPool"]
    assert [function.name for function in pool.functions] == ["StridedWeightedPool"]
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(pool).graph.value_info
    }
    fp32 = onnx.TensorProto.FLOAT
    assert all(types[name] == fp32 for name in ("cosines", "logits", "weights_row", "weights"))
    for graph in ("vision", "text"):
        model = onnx.shape_inference.infer_shapes(
            onnx.load(str(bundle_fp16 / f"graphs/{graph}.onnx"))
        )
        types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
        for node in model.graph.node:
            if node.op_type in ("LayerNormalization", "ReduceL2"):
                assert types[node.output[0]] == fp32
            if node.op_type == "Attention":
                assert types[node.output[0]] == onnx.TensorProto.FLOAT16
                attributes = {a.name: a.i for a in node.attribute}
                assert attributes["softmax_precision"] == fp32


def test_graphs_are_named_and_tell_nothing_of_this_machine(bundle: Path) -> None:
    for path in (*bundle.glob("graphs/*.onnx"), bundle / "decoder/model.onnx"):
        content = path.read_bytes()
        for word in (str(Path.home()), str(Path.cwd()), sys.prefix, "stack_trace", "/tmp"):
            assert word.encode() not in content, (path, word)
        nodes = onnx.load(str(path), load_external_data=False).graph.node
        names = [node.name for node in nodes]
        assert len(set(names)) == len(names)
        assert all(names)
    vision = onnx.load(str(bundle / "graphs/vision.onnx")).graph
    names = [node.name for node in vision.node]
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1/MatMul" in names
    assert not [name for name in names if "layers.3" in name]  # features are of the layer before


def test_decoder_steps_equal_its_prefill(bundle: Path) -> None:
    decoder = Bundle.open(bundle).manifest.decoder
    session = open_session(bundle / decoder.path)
    embeds = np.random.default_rng(0).standard_normal((1, 9, decoder.width), dtype=np.float32)
    names = [output.name for output in session.get_outputs()]
    empty = np.zeros((1, decoder.num_kv_heads, 0, decoder.head_dim), np.float32)

    def run(part: np.ndarray, total: int, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {name.replace("present", "past_key_values"): past[name] for name in past}
        feeds |= {"inputs_embeds": part, "attention_mask": np.ones((1, total), np.int64)}
        return dict(zip(names, session.run(names, feeds), strict=True))

    start = {name: empty for name in names if name != "logits"}
    whole = run(embeds, 9, start)["logits"]
    outputs = run(embeds[:, :4], 4, start)
    for at in range(4, 9):
        outputs.pop("logits")
        outputs = run(embeds[:, at : at + 1], at + 1, outputs)
    np.testing.assert_allclose(outputs["logits"], whole, atol=2e-6 * np.abs(whole).max())


def test_a_variant_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision weights, heads that fused rotation cannot take, weights beside graphs."""
    monkeypatch.setattr(ppllava_export.graphs, "EXTERNAL_BYTES", 1000)
    checkpoint = write_checkpoint(
        tmp_path, dtype="float16", extend_clip=False, text_config={"head_dim": 24}
    )
    edit_json(checkpoint / "preprocessor_config.json", num_frames=6)
    stages: list[str] = []
    out = tmp_path / "bundle"
    manifest = export_bundle(checkpoint, out, on_stage=stages.append)  # and its own parity
    assert stages == list(STAGES)
    assert (manifest.model.default_frames, manifest.model.text_positions) == (6, 77)
    files = sorted(path.name for path in (out / "graphs").iterdir())
    data = [
        f"{name}.onnx.data" for name in ("pool", "text", "vision")
    ]  # those of others are theirs
    assert files == sorted([*(f"{name}.onnx" for name in manifest.graphs), *data])
    graph = onnx.load(str(out / "decoder/model.onnx"), load_external_data=False).graph
    assert "RotaryEmbedding" in [node.op_type for node in graph.node]
    assert "position_ids" not in [value.name for value in graph.input]


def test_float64_weights_are_exported(tmp_path: Path) -> None:
    """With every table that is read by another module than its own; torch computes in fp32."""
    checkpoint = write_checkpoint(tmp_path, dtype="float64", btadapter=True, extend_clip=False)
    manifest = export_bundle(checkpoint, tmp_path / "bundle")  # and its own parity
    assert {tensor.dtype for tensor in manifest.graphs["vision"].outputs} == {"float32"}


def test_bfloat16_is_inside_and_float32_at_the_edges(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    manifest = export_bundle(checkpoint, out, "bf16")
    for name, graph in manifest.graphs.items():
        floats = {t.dtype for t in (*graph.inputs, *graph.outputs)} - {"int64"}
        assert floats == {"float32"}
        types = {i.data_type for i in onnx.load(str(out / graph.path)).graph.initializer}
        assert (onnx.TensorProto.BFLOAT16 in types) == (name != "pool")
    with pytest.raises(IncompatibleError, match="--dtype fp32 or fp16"):
        Bundle.open(out).engine("vision")
    parity = Parity.read(out)
    assert parity.backend.endswith("widened to fp32")
    # Rounding shows, so what was measured are the rounded weights.
    errors = {stage.name: stage.max_error for stage in parity.stages}
    assert all(2.0**-12 < errors[name] < 2.0**-5 for name in ("keys", "hidden", "logits"))
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == ["decoder", "graphs", "tokenizers"]  # the widened copy is gone


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("clip", {"btadapter": True, "max_T": 5}), ("siglip", {"max_T": 5})],
)
def test_one_graph_takes_every_number_of_frames(
    tmp_path: Path, family: Family, overrides: dict[str, Any]
) -> None:
    loaded = load_checkpoint(write_checkpoint(tmp_path, family=family, **overrides))
    model, config = loaded.model(), loaded.config
    spec = export_vision(loaded, torch.float32, tmp_path)
    engine = open_engine(tmp_path / spec.path, spec)
    side = config.vision.image_size
    for frames in range(1, config.max_frames + 1):
        pixels = np.random.default_rng(frames).standard_normal((frames, 3, side, side))
        got = engine.run({"pixel_values": pixels.astype(np.float32)})
        with torch.no_grad():
            expected = model.encode(torch.from_numpy(pixels).float())
        for name, tensor in zip(("keys", "hidden"), expected, strict=True):
            error = np.abs(got[name] - tensor.numpy()).max() / float(tensor.abs().max())
            assert error < 2e-5, (frames, name)


@pytest.mark.parametrize(("family", "axis"), [("clip", "n"), ("siglip", 196)])
def test_text_graphs_take_what_their_towers_take(
    tmp_path: Path, family: Family, axis: int | str
) -> None:
    loaded = load_checkpoint(write_checkpoint(tmp_path, family=family))
    spec = export_text(loaded, torch.float32, tmp_path)
    assert spec.inputs[0].shape == (1, axis)
    graph = onnx.load(str(tmp_path / spec.path)).graph
    # The two tables of positions were joined while they were written.
    assert sum("position_embedding" in tensor.name for tensor in graph.initializer) == 1


class Counting(Checkpoint):
    """Counts how often a tensor is asked for."""

    counts: ClassVar[Counter[str]] = Counter()

    def tensor(self, name: str) -> torch.Tensor:
        self.counts[name] += 1
        return super().tensor(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_weights_are_read_once_while_the_graph_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(ppllava_export.graphs, "EXTERNAL_BYTES", 1000)
    loaded = Counting(**vars(load_checkpoint(checkpoint)))
    asked: list[int] = []

    def save(*args: Any, **kwargs: Any) -> None:
        asked.append(Counting.counts.total())
        ir.save(*args, **kwargs)

    Counting.counts.clear()
    monkeypatch.setattr(ppllava_export.graphs, "ir", SimpleNamespace(**vars(ir) | {"save": save}))
    export_vision(loaded, dtype, tmp_path)
    large = [name for name in Counting.counts if loaded.tensor(name).numel() > 1024]
    assert len(large) >= 8
    # For their shape before, for their values then; `loaded.tensor` above was the third time.
    assert {Counting.counts[name] for name in large} == {3}
    assert asked[0] < Counting.counts.total()


def test_nothing_is_made_of_graphs_that_are_far_from_torch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far(*_: object, **__: object) -> Parity:
        stage = Stage.of("hidden", np.array([1.0, 2.0]), np.array([1.0, 2.001]), tolerance=2e-5)
        return Parity("fp32", "here", (stage,))

    monkeypatch.setattr(export, "measure", far)
    monkeypatch.setattr(export, "make_samples", lambda *_: SimpleNamespace(write=lambda _: None))
    for part in ("vision", "text", "memory_graphs"):  # what takes time
        monkeypatch.setattr(export, f"export_{part}", lambda *_: {})
    with pytest.raises(InternalError, match=r"fp32 graphs .* hidden: max error 5.0e-04"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_stops(checkpoint: Path, tmp_path: Path) -> None:
    def stop(stage: str) -> None:
        if stage == "vision graph":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, tmp_path / "bundle", on_stage=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_previous_bundle_is_replaced_only_when_asked(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(bundle, out)
    before = snapshot(out)
    with pytest.raises(UsageError, match="overwrite"):
        export_bundle(tmp_path, out)
    with pytest.raises(NotFoundError):
        export_bundle(tmp_path / "nowhere", out, overwrite=True)
    assert snapshot(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_a_killed_export_leaves_the_previous_bundle(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "bundle"
    shutil.copytree(bundle, out)
    before = snapshot(out)
    script = (
        "import sys, time, ppllava_export as e\n"
        "def stage(name):\n"
        "    if name == 'text graph': print('now', flush=True); time.sleep(600)\n"
        "e.export_bundle(sys.argv[1], sys.argv[2], overwrite=True, on_stage=stage)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(checkpoint), str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert snapshot(out) == before
    assert len(list(out.parent.iterdir())) == 2  # what it had made so far
    with pytest.raises(NotFoundError):
        export_bundle(tmp_path / "nowhere", out, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert snapshot(out) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "ppllava_export.cli", *map(str, args)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_usage_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from ppllava_export.cli import main\nmain(['--help'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "--fp16" in done.stdout
    assert time.monotonic() - begin < 10
    assert command(tmp_path).returncode == 2


@pytest.mark.slow
def test_command_prints_the_parity_table_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    done = command(checkpoint, tmp_path / "bundle", "--fp16")
    assert (done.returncode, done.stderr) == (0, "")
    assert "parity with torch, fp16" in done.stdout
    for stage in PARITY_STAGES:
        assert stage in done.stdout
    assert Bundle.open(tmp_path / "bundle").manifest.precision == Precision("fp16")


@pytest.mark.slow
def test_command_tells_a_failure_in_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / checkpoint.name
    (copy / "tokenizer.json").unlink()
    done = command(copy, tmp_path / "bundle")
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "--skip-tokenizer" in done.stderr
    assert not (tmp_path / "bundle").exists()
