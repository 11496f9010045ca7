"""Rung 7: tools that researchers use on what is made here: TensorRT-Edge-LLM, and polygraphy.

Edge-LLM's exporter runs without a GPU; its builder and runtime do not: NOT RUN.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from ppllava_engines.bundle import Bundle
from ppllava_engines.tensorrt.graphs import write_graph
from tiny_checkpoint import save_tensors, write_checkpoint

Run = Callable[..., "subprocess.CompletedProcess[str]"]
POLYGRAPHY = Path(sys.executable).with_name("polygraphy")
PREFIX = "language_model."
# Edge-LLM has no chat template for plain Llama and Qwen2.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_edge_llm_exports_the_decoder_by_itself(family: str, run_with: Run, tmp_path: Path) -> None:
    # Its attention takes heads of 64 and 128 only.
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
    whole = write_checkpoint(tmp_path, family=family, text_config=sizes)  # type: ignore[arg-type]
    alone = tmp_path / "decoder"
    alone.mkdir()
    config = json.loads((whole / "config.json").read_text())["text_config"]
    (alone / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    (alone / "chat_template.jinja").write_text(TEMPLATE)
    tensors = load_file(whole / "model.safetensors")
    save_tensors(
        alone,
        {
            name.removeprefix(PREFIX): value.astype(np.float16)
            for name, value in tensors.items()
            if name.startswith(PREFIX)
        },
    )
    out = tmp_path / "exported"
    done = run_with("edge-llm", "-m", "tensorrt_edgellm.scripts.export", alone, out)
    assert done.returncode == 0, done.stderr
    graph = onnx.load(out / "llm/model.onnx").graph
    counts = Counter((node.domain, node.op_type) for node in graph.node)
    assert counts["trt_edgellm", "AttentionPlugin"] == config["num_hidden_layers"]
    # It is fed embeddings, so pooled tokens can take their place among the words'.
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    assert inputs["inputs_embeds"].shape.dim[-1].dim_value == config["hidden_size"]
    table = load_file(out / "llm/embedding.safetensors")
    (embedding,) = table.values()
    np.testing.assert_array_equal(
        embedding, tensors[f"{PREFIX}model.embed_tokens.weight"].astype(np.float16)
    )


@pytest.fixture(scope="module")
def lowered(bundle_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a bundle's vision graph as TensorRT takes it."""
    folder = tmp_path_factory.mktemp("lowered")
    write_graph(Bundle.open(bundle_fp16), "vision", folder)
    return folder / "vision.onnx"


def test_polygraphy_inspects_a_lowered_graph(lowered: Path, run_with: Run) -> None:
    done = run_with("rtx", POLYGRAPHY, "inspect", "model", lowered, "--model-type=onnx")
    assert done.returncode == 0, done.stderr
    assert re.search(r"pixel_values \[dtype=float16, shape=\('T', 3, 32, 32\)\]", done.stdout)


def test_polygraphy_runs_a_lowered_graph(lowered: Path, run_with: Run) -> None:
    done = run_with("rtx", POLYGRAPHY, "run", lowered, "--onnxrt",
        "--input-shapes", "pixel_values:[3,3,32,32]", "--validate")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "PASSED" in done.stdout


def test_polygraphy_compiles_a_lowered_graph(lowered: Path, run_with: Run, tmp_path: Path) -> None:
    shapes = [f"--trt-{end}-shapes=pixel_values:[{n},3,32,32]" for end, n in
        (("min", 1), ("opt", 4), ("max", 8))]  # fmt: skip
    done = run_with("rtx", POLYGRAPHY, "convert", lowered, "--convert-to", "trt",
        "-o", tmp_path / "vision.plan", "--compute-capabilities", "8.6", "8.9", *shapes,
        POLYGRAPHY_USE_TENSORRT_RTX="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "vision.plan").stat().st_size > lowered.stat().st_size
