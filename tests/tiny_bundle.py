"""The smallest bundle there is: graphs of one or two nodes that still keep the contract."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ppllava_engines.bundle import (
    MANIFEST,
    DecoderSpec,
    GraphSpec,
    Manifest,
    ModelSpec,
    Pooling,
    Precision,
    TensorSpec,
    hash_files,
)

_ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
}

WIDTH = 3


def scale_spec(dtype: str = "float32") -> GraphSpec:
    """y (n,3) = x (n,3) · w (n,3)."""
    x, w, y = (TensorSpec(name, dtype, ("n", WIDTH)) for name in "xwy")
    return GraphSpec("graphs/scale.onnx", (x, w), (y,))


def write_graph(path: Path, spec: GraphSpec, op: str = "Mul") -> Path:
    """The file `path`: one node `op` from the spec's inputs to its output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, _ELEMENTS[t.dtype], t.shape) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    node = helper.make_node(op, [t.name for t in spec.inputs], [t.name for t in spec.outputs])
    graph = helper.make_graph([node], "tiny", inputs, outputs)
    opset = helper.make_opsetid("", 23)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def tiny_manifest(folder: Path, **changes: Any) -> Manifest:
    """The manifest of the files in `folder`, with `changes` to its fields."""
    manifest = Manifest(
        model=ModelSpec(
            name="tiny",
            image_size=8,
            grid=(2, 2),
            vision_width=4,
            key_width=2,
            decoder_width=WIDTH,
            max_frames=16,
            frames_coupled=False,
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.25, 0.25, 0.25),
            kernel=(2, 1, 1),
            stride=(2, 1, 1),
            image_kernel=(1, 2, 2),
            image_stride=(1, 2, 2),
            pooling=Pooling((4, 2, 2), stride=(2, 1, 1)),
            temperature=0.01,
            image_grid_pinpoints=((8, 16), (16, 8)),
            text_positions=16,
            text_bos_token_id=0,
            text_eos_token_id=1,
            text_pad_token_id=None,
            image_token_index=3,
            chat_template="USER: <image>\n{question} ASSISTANT: ",
            next_turn_template="</s>USER: {question} ASSISTANT: ",
            default_frames=8,
        ),
        graphs={"scale": scale_spec()},
        decoder=DecoderSpec(
            path="decoder/model.onnx",
            embedding="decoder/embedding.npy",
            vocab_size=5,
            width=WIDTH,
            num_layers=1,
            num_kv_heads=1,
            head_dim=2,
            max_positions=32,
            dtype="float32",
            eos_token_ids=(2,),
        ),
        precision=Precision(),
        tokenizers={"decoder": "tokenizers/decoder.json"},
        image_newline=None,
        samples="samples.npz",
        files=hash_files(folder),
        exporter={"ppllava-edge": "0"},
        sources={"checkpoint": "0" * 64},
    )
    return dataclasses.replace(manifest, **changes)


def write_bundle(folder: Path) -> Path:
    """A whole bundle in `folder`, which may be there."""
    write_graph(folder / "graphs/scale.onnx", scale_spec())
    write_graph(folder / "decoder/model.onnx", scale_spec())
    np.save(folder / "decoder/embedding.npy", np.zeros((5, WIDTH), np.float32))
    np.savez(folder / "samples.npz", kernel=np.array([2, 1, 1]))
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers/decoder.json").write_text("{}")
    (folder / MANIFEST).write_text(tiny_manifest(folder).to_json())
    return folder
