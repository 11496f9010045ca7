"""Attention spelt out: products, a mask and a softmax in fp32, all of them plain operators."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ppllava_engines.errors import IncompatibleError

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]

# What a standard Attention may say besides its scale and whether it is causal.
_PLAIN = {"softcap": 0.0, "qk_matmul_output_mode": 0}
_KNOWN = {*_PLAIN, "scale", "is_causal", "softmax_precision", "q_num_heads", "kv_num_heads"}


class Writer:
    """Puts plain operators in front of a node, under names that tell what they stand for.

    Args:
        graph: What is written into.
        node: What the operators go before; the caller removes it when they replace it.
        name: What they stand for; None is the node itself.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, name: str | None = None) -> None:
        self._graph = graph
        self._node = node
        self._name = name or node.name or node.op_type
        self._count = 0

    def op(self, op_type: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> Any:
        """The value that an operator makes, or a tuple of them where `outputs` is not 1."""
        import onnx_ir as ir

        name = f"{self._name}/{op_type}_{self._count}"
        self._count += 1
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}/output_{index}"
        self._graph.insert_before(self._node, node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def ints(self, *values: int) -> ir.Value:
        """The int64 constant `values` (k)."""
        return self.constant(f"int64/{list(values)}", np.array(values, np.int64))

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        """The constant `value` () of a type."""
        import onnx_ir as ir

        tensor = ir.tensor(np.array(value).astype(dtype.numpy()), dtype)
        return self.constant(f"{dtype.name.lower()}/{value}", tensor)

    def constant(self, name: str, value: Array | ir.TensorProtocol) -> ir.Value:
        """The constant of that name, which has the same value wherever it is used."""
        import onnx_ir as ir

        if name not in self._graph.initializers:
            tensor = ir.tensor(value) if isinstance(value, np.ndarray) else value
            kind = ir.TensorType(tensor.dtype)
            shape = ir.Shape(tensor.shape.numpy())
            made = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
            self._graph.register_initializer(made)
        return self._graph.initializers[name]

    def cast(self, value: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
        """`value` in the type `target`; itself where that is its `source` already."""
        made: ir.Value = value if source == target else self.op("Cast", value, to=target)
        return made

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The size (1) of an axis, an int64."""
        made: ir.Value = self.op("Shape", value, start=axis, end=axis + 1)
        return made

    def count(self, value: ir.Value, axis: int) -> ir.Value:
        """The numbers 0, 1, … (n), int64, n being the size of an axis."""
        import onnx_ir as ir

        zero, one = (self.scalar(number, ir.DataType.INT64) for number in (0, 1))
        length = self.op("Squeeze", self.size(value, axis), self.ints(0))
        made: ir.Value = self.op("Range", zero, length, one)
        return made

    def causal(self, value: ir.Value, axis: int) -> ir.Value:
        """(n,n) bool, n being the size of an axis: which later (row) sees which earlier one."""
        at = self.count(value, axis)
        rows, columns = (self.op("Unsqueeze", at, self.ints(to)) for to in (1, 0))
        made: ir.Value = self.op("GreaterOrEqual", rows, columns)
        return made

    def scores(self, query: ir.Value, key: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        """(B,H,m,n) fp32: products of queries (B,H,m,d) and keys (B,H,n,d) of a type, scaled.

        The scale's power of two is exact in every type, so it is multiplied into the queries, and
        fp16 does not overflow where the scores do not; the rest would round there, and is fp32.
        """
        import onnx_ir as ir

        mantissa, exponent = math.frexp(scale)
        scaled = self.op("Mul", query, self.scalar(2.0 ** (exponent - 1), dtype))
        product = self.op("MatMul", scaled, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        wide = self.cast(product, dtype, ir.DataType.FLOAT)
        if mantissa == 0.5:
            return wide
        made: ir.Value = self.op("Mul", wide, self.scalar(2 * mantissa, ir.DataType.FLOAT))
        return made

    def masked(self, scores: ir.Value, seen: ir.Value) -> ir.Value:
        """fp32 scores, and -inf where nothing may be seen; every row must see something."""
        import onnx_ir as ir

        made: ir.Value = self.op("Where", seen, scores, self.scalar(-np.inf, ir.DataType.FLOAT))
        return made


def lower_attention(graph: ir.Graph) -> None:
    """Writes every standard Attention of a graph out, in place; returns nothing.

    Before: queries, keys and values are (B,H,n,d) and nothing else goes in, which is how the
    vision and the text graph are traced. After: the graph has no Attention, and each softmax is
    computed in fp32, between Casts where the values are narrower.

    Raises:
        IncompatibleError: An Attention with a mask, a cache, several outputs or an unknown option.
    """
    masks: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Attention" and node.domain == "":
            _lower(graph, node, masks)


def _lower(graph: ir.Graph, node: ir.Node, masks: dict[str, ir.Value]) -> None:
    import onnx_ir as ir

    query, key, value = _operands(node)
    dtype, shape = query.dtype, query.shape
    assert dtype is not None
    assert shape is not None
    scale = node.attributes.get_float("scale", 0.0) or float(shape[3]) ** -0.5  # type: ignore[arg-type]
    write = Writer(graph, node)
    scores = write.scores(query, key, scale, dtype)
    if node.attributes.get_int("is_causal", 0):
        length = str(shape[2])
        if length not in masks:
            masks[length] = write.causal(query, 2)
        scores = write.masked(scores, masks[length])
    shares = write.cast(write.op("Softmax", scores, axis=-1), ir.DataType.FLOAT, dtype)
    seen = write.op("MatMul", shares, value)
    replace(node, [seen])


def replace(node: ir.Node, values: list[ir.Value]) -> None:
    """Puts `values` in the place of what a node makes, and removes it; returns nothing."""
    for old, new in zip(node.outputs, values, strict=True):
        new.shape, new.type = new.shape or old.shape, new.type or old.type
        if old.is_graph_output():
            new.name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)


def _operands(node: ir.Node) -> list[ir.Value]:
    operands = [value for value in node.inputs if value is not None]
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    unknown = [name for name, plain in _PLAIN.items() if options.get(name, plain) != plain]
    unknown += sorted(options.keys() - _KNOWN)
    shapes = [value.shape for value in operands]
    heads = {shape[1] for shape in shapes if shape is not None and len(shape) == 4}
    if unknown or len(node.outputs) != 1 or len(operands) != 3 or len(heads) != 1:
        raise IncompatibleError(
            f"{node.name}: an Attention of {len(operands)} inputs and {len(node.outputs)} outputs "
            f"with {unknown or 'plain options'} and shapes {[str(shape) for shape in shapes]} has "
            "no lowering, expected queries, keys and values (B,H,n,d): export the checkpoint again"
        )
    return operands
