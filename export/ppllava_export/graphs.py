"""One function per graph: vision, text and pool; each is saved and described."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim

from ppllava_engines.bundle import GraphSpec, TensorSpec

from .modules.model import PPLLaVA
from .pool_graph import OPSET, pool_graph
from .precision import cast, keep_softmax_fp32

VISION_TOKENS = "vision_tokens"  # the value inside the vision graph that parity looks at
# Weights above this size are memory-mapped from a file of their own.
EXTERNAL_BYTES = 32 << 20
_PRODUCER = "ppllava-edge"
_NO_LIMIT = 1 << 40


class _Vision(nn.Module):
    """pixel_values → keys, hidden and, for parity, the patch tokens between."""

    def __init__(self, model: PPLLaVA, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.vision_tower = cast(model.vision_tower, dtype)
        self.multi_modal_projector = cast(model.multi_modal_projector, dtype)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns keys (T, L, P), hidden (T, L, D) and tokens (T, L, C)."""
        tokens = self.vision_tower.vision_model(pixel_values)
        keys = self.multi_modal_projector.keys(tokens)
        return keys.to(self.dtype), self.multi_modal_projector.hidden(tokens), tokens


class _Text(nn.Module):
    """input_ids → text_embed."""

    def __init__(self, model: PPLLaVA, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.multi_modal_projector = cast(model.multi_modal_projector, dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the embedding (1, P)."""
        return self.multi_modal_projector.text_embed(input_ids).to(self.dtype)


def export_vision(model: PPLLaVA, dtype: torch.dtype, folder: Path) -> GraphSpec:
    """Returns the spec of the vision graph that it writes below the bundle's `folder`.

    pixel_values ([T], 3, S, S) → keys ([T], L, P), hidden ([T], L, D).
    """
    side = model.config.vision.image_size
    graph = _trace(
        _Vision(model, dtype),
        torch.zeros(2, 3, side, side, dtype=dtype),
        {0: Dim("T", max=model.config.max_frames)},
        ["pixel_values"],
        ["keys", "hidden", VISION_TOKENS],
    )
    del graph.graph.outputs[-1]  # the value stays, by its name
    return _save(graph, "vision", folder)


def export_text(model: PPLLaVA, dtype: torch.dtype, folder: Path) -> GraphSpec:
    """Returns the spec of the text graph that it writes below the bundle's `folder`.

    input_ids (1, [n]) → text_embed (1, P). Attention is causal and the end-of-text token is
    pooled, so it takes a question's own tokens and no padding.
    """
    graph = _trace(
        _Text(model, dtype),
        torch.full((1, 4), model.config.text.bos_token_id),
        {1: Dim("n", max=model.config.text.positions)},
        ["input_ids"],
        ["text_embed"],
    )
    return _save(graph, "text", folder)


def export_pool(model: PPLLaVA, dtype: torch.dtype, folder: Path) -> GraphSpec:
    """Returns the spec of the pool graph that it writes below the bundle's `folder`.

    keys, hidden, text_embed, kernel (3), stride (3) → pooled ([N], D), relevance ([T], h, w).
    """
    proto = pool_graph(model.multi_modal_projector, model.config.grid, dtype)
    return _save(ir.from_proto(proto), "pool", folder)


def _trace(
    module: nn.Module,
    example: Tensor,
    dynamic: dict[int, Dim],
    input_names: list[str],
    output_names: list[str],
) -> ir.Model:
    program = torch.onnx.export(
        module.eval(),
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=input_names,
        output_names=output_names,
        dynamic_shapes=(dynamic,),
        verbose=False,
    )
    assert program is not None  # only the old exporter returns nothing
    # Once more without the tracer's limit on sizes, which leaves the two halves of an extended
    # position table to be joined at run time.
    optimizer.fold_constants(program.model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT)
    passes.RemoveUnusedNodesPass()(program.model)
    keep_softmax_fp32(program.model)
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
