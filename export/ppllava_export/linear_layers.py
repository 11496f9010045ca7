"""The linear layers of a traced graph, and the evening of what they are fed.

Some channels of a vision transformer are a hundred times larger than the rest, and with one step
for all the rest would be rounded away. So each channel is first divided by a power of two and its
row of the weight multiplied by it, which changes nothing but the last bits of what is rounded. A
layer norm before the layer takes the division in its own weights.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]

# How much of a channel's size goes from the input to the weight, 0 to 1.
_SHIFT = 0.65
# Channels below this share of the largest are treated as if they had it.
_SMALLEST = 1e-3


def linear_layers(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """Yields (module name, MatMul) of every product with a weight."""
    for node in graph:
        if node.op_type == "MatMul" and node.domain == "":
            weight = node.inputs[1]
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
            if weight is not None and weight.const_value is not None and len(scopes) > 1:
                yield str(scopes[-2]), node


def even_factors(peaks: Array, largest: Array) -> Array:
    """Returns the power of two (K,) float32 by which each channel is divided.

    Args:
        peaks: (K,), largest magnitude of the input.
        largest: (K,), largest magnitude in each row of the weights.
    """
    a, b = (
        np.maximum(sizes, _SMALLEST * sizes.max()) if sizes.max() > 0 else np.ones_like(sizes)
        for sizes in (peaks, largest)
    )
    factors: Array = np.exp2(np.rint(_SHIFT * np.log2(a) - (1 - _SHIFT) * np.log2(b)))
    return factors.astype(np.float32)


def largest_rows(nodes: Sequence[ir.Node]) -> Array:
    """Returns the largest magnitude (K,) in each row of the weights of products of one input."""
    rows = [np.abs(float32(constant(node.inputs[1]))).max(axis=1) for node in nodes]
    largest: Array = np.max(rows, axis=0)
    return largest


def norm_of(x: ir.Value, nodes: Sequence[ir.Node]) -> ir.Node | None:
    """Returns the layer norm that makes `x` for `nodes` and nothing else, None if there is none."""
    if {node for node, _ in x.uses()} != set(nodes) or x.is_graph_output():
        return None
    node = x.producer()
    if node is not None and node.op_type == "Cast":  # norms compute in fp32 in every precision
        before = node.inputs[0]
        if before is None or len(before.uses()) > 1 or before.is_graph_output():
            return None
        node = before.producer()
    return node if node is not None and node.op_type == "LayerNormalization" else None


def divide_norm(graph: ir.Graph, norm: ir.Node, factors: Array) -> None:
    """Has a layer norm divide its channels (K,) by `factors`; returns nothing."""
    for index in (1, 2):
        part = norm.inputs[index] if index < len(norm.inputs) else None
        if part is not None:
            old = constant(part)
            shrunk = tensor(float32(old) / factors, old.dtype)
            norm.replace_input_with(index, initializer(graph, f"{part.name}.even", shrunk))


def remove_unused(graph: ir.Graph) -> None:
    """Removes the initializers that nothing reads any more; returns nothing."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def initializer(graph: ir.Graph, name: str, stored: ir.TensorProtocol) -> ir.Value:
    """Returns a new initializer, called `name` or, where that is taken, like it."""
    kind = ir.TensorType(stored.dtype)
    while name in graph.initializers:  # of norms whose equal weights are one initializer
        name += "_"
    value = ir.Value(name=name, shape=shape(stored), type=kind, const_value=stored)
    graph.register_initializer(value)
    return value


def constant(value: ir.Value | None) -> ir.TensorProtocol:
    """Returns what an initializer holds."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def shape(stored: ir.TensorProtocol) -> ir.Shape:
    """Returns a tensor's shape as a value's."""
    return ir.Shape([axis for axis in stored.shape if isinstance(axis, int)])


def float32(stored: ir.TensorProtocol) -> Array:
    """Returns a tensor's numbers as float32."""
    return stored.numpy().astype(np.float32)


def tensor(values: Array, dtype: ir.DataType) -> ir.TensorProtocol:
    """Returns `values` as a tensor of a type."""
    return ir.tensor(values.astype(dtype.numpy()))
