"""One function per graph: vision, text and pool; each is traced, saved and described.

What is traced is the checkpoint's skeleton, a model without weights; they go from the checkpoint's
mapped files to the graph's data file one at a time, while the graph is saved.
"""

from __future__ import annotations

import ast
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from ppllava_engines.bundle import GraphSpec, TensorSpec

from .checkpoint import Checkpoint
from .initializers import bind, simplify
from .modules.model import PPLLaVA
from .pool_graph import OPSET, pool_graph
from .precision import cast, edge, keep_softmax_fp32
from .quiet import quiet
from .vision_dynamic_int8 import quantize_tower
from .vision_int8 import Channels, quantize_vision

VISION_TOKENS = "vision_tokens"  # the value inside the vision graph that tests look at
NEWLINE = "image_newline.npy"
# Weights above this size are memory-mapped from a file of their own, which graphs may share.
EXTERNAL_BYTES = 1 << 20
_PRODUCER = "ppllava-edge"
_EXAMPLE_FRAMES = 2  # the tracer takes 0 and 1 for constants
_EXAMPLE_TOKENS = 4


class _Vision(nn.Module):
    """pixel_values → keys, hidden and, for tests, the patch tokens between."""

    def __init__(self, model: PPLLaVA, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.vision_tower = cast(model.vision_tower, dtype)
        self.multi_modal_projector = cast(model.multi_modal_projector, dtype)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns keys (T, L, P), hidden (T, L, D) and tokens (T, L, C)."""
        out = edge(self.dtype)
        tokens = self.vision_tower.vision_model(pixel_values.to(self.dtype))
        keys = self.multi_modal_projector.keys(tokens)
        return keys.to(out), self.multi_modal_projector.hidden(tokens).to(out), tokens.to(out)


class _Text(nn.Module):
    """input_ids → text_embed."""

    def __init__(self, model: PPLLaVA, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.multi_modal_projector = cast(model.multi_modal_projector, dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the embedding (1, P)."""
        return self.multi_modal_projector.text_embed(input_ids).to(edge(self.dtype))


def export_vision(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    folder: Path,
    quantization: Mapping[str, Channels] | Literal["int8"] | None = None,
) -> GraphSpec:
    """Returns the spec of the vision graph that it writes below the bundle's `folder`.

    pixel_values ([T], 3, S, S) → keys ([T], L, P), hidden ([T], L, D), for any T from 1.

    Args:
        checkpoint: The model.
        dtype: Type of the graph's floats.
        folder: The bundle.
        quantization: What the linear layers that compute in int8 are fed, see `vision_int8`; or
            "int8", where each run tells, see `vision_dynamic_int8`; None leaves all of them floats.

    Raises:
        DataError: None of the layers that are named can compute in int8.
    """
    side, frames = checkpoint.config.vision.image_size, checkpoint.config.max_frames
    graph = trace(
        _Vision(checkpoint.skeleton(), dtype),
        torch.empty(min(_EXAMPLE_FRAMES, frames), 3, side, side, dtype=edge(dtype), device="meta"),
        {0: Dim("T", max=frames)} if frames > 1 else {},
        ["pixel_values"],
        ["keys", "hidden", VISION_TOKENS],
    )
    bind(graph, checkpoint.tensor, checkpoint.weights.release)
    simplify(graph)
    keep_softmax_fp32(graph)
    if quantization == "int8":
        quantize_tower(graph)
    elif quantization is not None:
        quantize_vision(graph, quantization)
    del graph.graph.outputs[-1]  # the value stays, by its name
    return _save(graph, "vision", folder)


def export_text(checkpoint: Checkpoint, dtype: torch.dtype, folder: Path) -> GraphSpec:
    """Returns the spec of the text graph that it writes below the bundle's `folder`.

    input_ids (1, [n]) → text_embed (1, P). CLIP's attention is causal and the end-of-text token is
    pooled, so it takes a question's own tokens and no padding. SigLIP's is neither: it takes
    exactly (1, text_positions).
    """
    config = checkpoint.config.text
    causal = config.pad_token_id is None
    num_tokens = _EXAMPLE_TOKENS if causal else config.positions
    graph = trace(
        _Text(checkpoint.skeleton(), dtype),
        torch.empty(1, num_tokens, dtype=torch.int64, device="meta"),
        {1: Dim("n", max=config.positions)} if causal else {},
        ["input_ids"],
        ["text_embed"],
    )
    bind(graph, checkpoint.tensor, checkpoint.weights.release)
    simplify(graph)
    keep_softmax_fp32(graph)
    return _save(graph, "text", folder)


def export_pool(checkpoint: Checkpoint, dtype: torch.dtype, folder: Path) -> GraphSpec:
    """Returns the spec of the pool graph that it writes below the bundle's `folder`.

    keys, hidden, text_embed, kernel (3), stride (3) → pooled ([N], D), relevance ([T], h, w).
    """
    projector = checkpoint.model().multi_modal_projector
    graph = ir.from_proto(pool_graph(projector, checkpoint.config.grid, edge(dtype)))
    return _save(graph, "pool", folder)


def export_newline(checkpoint: Checkpoint, dtype: torch.dtype, folder: Path) -> str | None:
    """Returns the name of the file below `folder` with the separator (D,) of an image's rows.

    None when the checkpoint has none. Its type is that of the pool graph's output.
    """
    newline = checkpoint.image_newline()
    if newline is None:
        return None
    # Through the graphs' own type, as every embedding beside it.
    content = io.BytesIO()  # into a file, numpy writes by C's buffers and loses their failures
    np.save(content, newline.to(dtype).to(edge(dtype)).numpy())
    (folder / NEWLINE).write_bytes(content.getvalue())
    return NEWLINE


def trace(
    module: nn.Module,
    example: Tensor,
    dynamic: dict[int, Dim],
    input_names: list[str],
    output_names: list[str],
) -> ir.Model:
    """Returns the graph of a module without weights, whose initializers bear their names.

    Args:
        module: On the device "meta", as `example` is.
        example: What it takes.
        dynamic: Axes of `example` that may have any size.
        input_names: Of the graph.
        output_names: Of the graph.
    """
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=(dynamic,),
            optimize=False,  # it would read the weights, which are not there
            verbose=False,
        )
    assert program is not None  # only the old exporter returns nothing
    return program.model


def _save(model: ir.Model, name: str, folder: Path) -> GraphSpec:
    """Returns the spec of the graph that it writes to `folder`/graphs/`name`.onnx."""
    path = f"graphs/{name}.onnx"
    _tidy(model, name)
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    (folder / "graphs").mkdir(exist_ok=True)
    external = f"{name}.onnx.data" if size > EXTERNAL_BYTES else None
    ir.save(model, folder / path, external_data=external)
    return GraphSpec(
        path,
        tuple(_spec(value) for value in model.graph.inputs),
        tuple(_spec(value) for value in model.graph.outputs),
    )


def _tidy(model: ir.Model, name: str) -> None:
    """Names every node after its module, and drops the tracer's notes on this machine's files."""
    model.producer_name, model.producer_version = _PRODUCER, None
    model.graph.name = name
    used: Counter[str] = Counter()
    for node in model.graph:
        plain = f"{_scope(node) or name}/{node.op_type}"
        node.name = f"{plain}_{used[plain]}" if used[plain] else plain
        used[plain] += 1
    values = (value for node in model.graph for value in node.outputs)
    for noted in (
        model,
        model.graph,
        *model.graph,
        *values,
        *model.graph.inputs,
        *model.graph.initializers.values(),
    ):
        noted.metadata_props.clear()


def _scope(node: ir.Node) -> str:
    """Returns the module that a traced node computes for, "" when it is the graph itself."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    module = str(scopes[-2]) if len(scopes) > 1 else ""
    return "" if module.startswith("_") else module  # the tracer's own, e.g. for a size


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    axes = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, axes)
