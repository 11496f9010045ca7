"""The finished vision and pool graphs → those that serve other memories of a video.

A memory holds of each token what a question will need, and each way of holding it has its graphs:

    pool_fp16     keys and hidden as float16, in an fp32 bundle
    pool_int8     hidden as int8 with a scale for each token
    vision_tokens pixel_values → the tower's tokens, and norms: the length of each token's key
                  before that is made one
    weigh_tokens  tokens, norms and a question → relevance and weights
    pool_tokens   tokens and weights of a few frames → pooled

None is traced and none has weights of its own: nodes are cut from the finished graphs, whatever was
quantized in them, and weights that lie in data files are read from the same places of those.

Of the CLIP family a key is W·LN(x) / norm, so that a question meets LN(x) as Wᵀt and no key is ever
made. A SigLIP key comes out of a head with an activation inside and is not linear in LN(x): there
the head runs anew for each question, one frame at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import torch
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from ppllava_engines.bundle import GraphSpec, TensorSpec
from ppllava_engines.errors import InternalError

from .modules.alignment import Projector
from .pool_graph import FUNCTION, RELEVANCE_NODES, TEXT_NODES, PoolText, memory_pool_graph

_TOKENS = "vision_tokens"  # the value inside the vision graph


def export_memory_graphs(
    projector: Projector, grid: tuple[int, int], dtype: torch.dtype, folder: Path
) -> dict[str, GraphSpec]:
    """Returns the specs, by name, of the graphs that it writes below the bundle's `folder`.

    None for a bfloat16 bundle, which no CPU runs: these memories are a CPU's.

    Args:
        projector: Its sizes, logit scale and temperature; no weights.
        grid: (h, w) patches per frame.
        dtype: Type of the finished graphs.
        folder: The bundle, with graphs/vision.onnx and graphs/pool.onnx.

    Raises:
        InternalError: The vision graph is not made as it is expected to be.
    """
    if dtype == torch.bfloat16:
        return {}
    text = PoolText.of(projector, grid, dtype)
    vision, pool = (_Finished(folder / f"graphs/{name}.onnx") for name in ("vision", "pool"))
    half = torch.float16
    models = {
        "pool_fp16": memory_pool_graph(text, half, half),
        "pool_int8": memory_pool_graph(text, half, torch.int8),
        "vision_tokens": _vision_tokens(text, vision),
        "weigh_tokens": _weigh_tokens(text, vision),
        "pool_tokens": _pool_tokens(text, vision),
    }
    if dtype == half:
        del models["pool_fp16"]  # it is "pool"
    for name, model in models.items():
        _complete(name, model, vision, pool)
    return {name: _save(model, folder) for name, model in models.items()}


class _Finished:
    """A graph that was saved; its tensors in a data file stay references to that.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path, load_external_data=False)
        self._makers = {name: node for node in self.model.graph.node for name in node.output}

    def maker(self, name: str) -> NodeProto:
        """Returns the node that makes a value.

        Raises:
            InternalError: There is none.
        """
        if name not in self._makers:
            raise InternalError(f"memory graphs: no node of the vision graph makes {name!r}")
        return self._makers[name]

    def before_casts(self, name: str) -> str:
        """Returns the value that `name` is but for its type."""
        while (node := self._makers.get(name)) is not None and node.op_type == "Cast":
            name = node.input[0]
        return name

    def follows_from_weights(self, name: str) -> bool:
        """Whether a value is the same in every run."""
        fed = {value.name for value in self.model.graph.input}
        return not any(fed.intersection(node.input) for node in self.between((), name))

    def between(self, begin: Sequence[str], end: str) -> list[NodeProto]:
        """Returns the nodes that make the value `end`, in order, of inputs, weights and `begin`."""
        needed, nodes = {end}, []
        for node in reversed(self.model.graph.node):
            if needed.intersection(node.output) and not set(begin).intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        return nodes[::-1]


def _vision_tokens(text: PoolText, vision: _Finished) -> ModelProto:
    """Returns pixel_values → tokens, norms: the vision graph as far as those."""
    _, norm = _quotient(vision)
    axis = numpy_helper.from_array(np.array([-1]), "norms_axis")
    nodes = [*vision.between((), norm), helper.make_node("Squeeze", [norm, axis.name], ["norms"])]
    (pixels,) = vision.model.graph.input
    first = pixels.type.tensor_type.shape.dim[0]
    rows = [first.dim_param or first.dim_value, text.num_tokens]
    graph = helper.make_graph(
        nodes,
        "vision_tokens",
        [pixels],
        [
            helper.make_tensor_value_info("tokens", text.number, [*rows, text.vision_width]),
            helper.make_tensor_value_info("norms", TensorProto.FLOAT, rows),
        ],
        [axis],
    )
    for node in graph.node:
        _rename(node, {_TOKENS: "tokens"})
    return helper.make_model(
        graph, ir_version=vision.model.ir_version, opset_imports=vision.model.opset_import
    )


def _weigh_tokens(text: PoolText, vision: _Finished) -> ModelProto:
    """Returns tokens, norms, text_embed → relevance, weights.

    Frames pass one after the other, so that no array but the tokens has more than a frame's.
    """
    aligned, _ = _quotient(vision)
    rows = vision.before_casts(aligned)
    product = vision.maker(rows)
    weight = product.input[1] if product.op_type == "MatMul" else ""
    direction, head = "text_column", ""
    if weight and vision.follows_from_weights(weight):
        # A product with a question's direction in place of one with each of P columns.
        rows, direction = product.input[0], "direction"
        head = f"""
            weight_fp32 = Cast <to = {TensorProto.FLOAT}> (weight)
            direction = MatMul (weight_fp32, text_column)
        """
    model = text.graph(
        "weigh_tokens",
        [text.tokens(), f"float[T,{text.num_tokens}] norms", text.text_embed],
        [text.over_grid("relevance"), text.over_grid("weights")],
        f"""
            {TEXT_NODES}
            {head}
            cosines = Scan <num_scan_inputs = 2, body = one_frame (
                float16[{text.num_tokens},{text.vision_width}] frame_tokens,
                float[{text.num_tokens}] frame_norms
            ) => (float[{text.num_tokens}] frame_cosines) {{
                first = Constant <value_ints = [0]> ()
                all = Constant <value_ints = [-1]> ()
                typed_tokens = Cast <to = {text.number}> (frame_tokens)
                {_TOKENS} = Unsqueeze (typed_tokens, first)
                rows_fp32 = Cast <to = {TensorProto.FLOAT}> (rows)
                dots = MatMul (rows_fp32, {direction})
                frame_dots = Reshape (dots, all)
                frame_cosines = Div (frame_dots, frame_norms)
            }}> (tokens, norms)
            {RELEVANCE_NODES}
        """,
    )
    graph = model.graph
    scan = next(node for node in graph.node if node.op_type == "Scan")
    body = next(attribute.g for attribute in scan.attribute if attribute.name == "body")
    for node in _nodes(graph):  # the text's names have no dots
        _rename(node, {"rows": rows, "weight": weight})
    at = next(i for i, node in enumerate(body.node) if "rows_fp32" in node.output)
    _insert(body, at, vision.between((_TOKENS,), rows))
    if head:
        _insert(graph, 0, vision.between((), weight))
    return model


def _pool_tokens(text: PoolText, vision: _Finished) -> ModelProto:
    """Returns tokens, weights, kernel, stride → pooled, without the weights of linear_2."""
    model = text.graph(
        "pool_tokens",
        [
            text.tokens("t"),
            text.over_grid("weights", "t"),
            "int64[3] kernel",
            "int64[3] stride",
        ],
        [text.pooled],
        f"{_TOKENS} = Cast <to = {text.number}> (tokens) {text.pool_nodes(text.dtype)}",
    )
    _insert(model.graph, 1, vision.between((_TOKENS,), "hidden"))
    model.functions.append(onnx.parser.parse_function(FUNCTION))
    return model


def _quotient(vision: _Finished) -> tuple[str, str]:
    """Returns the values (T, L, P) and (T, L, 1) of which keys are the quotient."""
    divide = vision.maker(vision.before_casts("keys"))
    if divide.op_type != "Div":
        raise InternalError(
            f"memory graphs: keys of the vision graph come from {divide.op_type}, expected a Div "
            "by their norm"
        )
    aligned, norm = divide.input
    spread = vision.maker(norm)
    return aligned, spread.input[0] if spread.op_type == "Expand" else norm


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    for values in (node.input, node.output):
        values[:] = [names.get(value, value) for value in values]


def _insert(graph: GraphProto, at: int, nodes: Sequence[NodeProto]) -> None:
    rest = list(graph.node)[at:]
    del graph.node[at:]
    graph.node.extend([*nodes, *rest])


def _complete(name: str, model: ModelProto, *sources: _Finished) -> ModelProto:
    """Returns the graph with the weights that its nodes name, from where they are now."""
    graph = model.graph
    graph.name = name
    missing = set(_names(graph))
    own = [tensor for tensor in graph.initializer if tensor.name in missing]
    del graph.initializer[:]
    for tensors in (own, *(source.model.graph.initializer for source in sources)):
        found = [tensor for tensor in tensors if tensor.name in missing]
        graph.initializer.extend(found)
        missing -= {tensor.name for tensor in found}
    for source in sources:
        known = {known.domain for known in model.opset_import}
        model.opset_import.extend(
            opset for opset in source.model.opset_import if opset.domain not in known
        )
    model.producer_name = sources[0].model.producer_name
    _name_nodes(graph)
    return model


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yields the nodes of a graph and of those inside."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _names(graph: GraphProto) -> Iterator[str]:
    """Yields what the nodes of a graph and of those inside read."""
    return (name for node in _nodes(graph) for name in node.input)


def _name_nodes(graph: GraphProto) -> None:
    """Names the nodes that have none."""
    used = Counter[str]()
    for node in _nodes(graph):
        if not node.name:
            plain = f"{graph.name}/{node.op_type}"
            node.name = f"{plain}_{used[plain]}" if used[plain] else plain
            used[plain] += 1


def _save(model: ModelProto, folder: Path) -> GraphSpec:
    """Returns the spec of the graph that it writes to `folder`/graphs."""
    path = f"graphs/{model.graph.name}.onnx"
    (folder / path).write_bytes(model.SerializeToString(deterministic=True))
    return GraphSpec(
        path,
        tuple(map(_spec, model.graph.input)),
        tuple(map(_spec, model.graph.output)),
    )


def _spec(value: ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    axes = (axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return TensorSpec(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, (*axes,))
