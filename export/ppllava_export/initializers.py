"""The tensors of a traced graph: read from the checkpoint one at a time, while it is written.

A graph is traced from a model without weights, so its initializers are names and shapes. Here they
become lazy: each is read, cast and rearranged when it is saved, and forgotten right after.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from onnxscript import optimizer
from torch import Tensor

# What may be done to a weight while it is written: it only moves or rounds its numbers.
_REARRANGING = ("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose")
# Constants above this size are no shape arithmetic, and are left to be folded while written.
_SMALL = 1024
_RELEASE_BYTES = 1 << 20


def lazy(
    name: str, dtype: ir.DataType, read: Callable[[str], Tensor], release: Callable[[], None]
) -> ir.LazyTensor:
    """Returns the checkpoint's tensor `name` in `dtype` as one that is read when it is written."""
    shape = ir.Shape(read(name).shape)

    def make() -> TorchTensor:
        stored = read(name)
        if stored.nbytes > _RELEASE_BYTES:
            release()  # of what was read before
        return TorchTensor(stored.detach().to(to_torch_dtype(dtype)).contiguous(), name=name)

    return ir.LazyTensor(make, dtype, shape, name=name)


def bind(model: ir.Model, read: Callable[[str], Tensor], release: Callable[[], None]) -> None:
    """Gives a graph that was traced without weights its weights, lazily, and returns nothing.

    Args:
        model: Its initializers that have no values bear the names of the checkpoint's tensors.
        read: Name → tensor.
        release: Called before the next large tensor is read.
    """
    for name, value in model.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, Tensor) and raw.device.type == "meta":
            assert value.dtype is not None
            value.const_value = lazy(name, value.dtype, read, release)


def save_beside(model: ir.Model, path: Path, other: Path) -> None:
    """Writes a graph whose tensors stay in the other's data file where that has them, by name.

    Args:
        model: The graph.
        path: Its file, in the folder of the other's.
        other: A graph with all of its tensors in a file of data.
    """
    model.graph.sort()
    initializers = model.graph.initializers
    there = ir.load(other).graph.initializers
    own = [name for name in initializers if name not in there]
    values = [initializers[name].const_value for name in own]
    tensors = [value for value in values if value is not None]
    stored = ir.external_data.convert_tensors_to_external(tensors, path.parent, f"{path.name}.data")
    for name, tensor in zip(own, stored, strict=True):
        initializers[name].const_value = tensor
    for name in initializers.keys() - set(own):
        initializers[name].const_value = there[name].const_value
    ir.save(model, path)


def simplify(model: ir.Model) -> None:
    """Computes beforehand what does not depend on the graph's inputs, and returns nothing.

    What is small is computed now. What only rearranges weights is computed when they are written.
    """
    _lift_constants(model)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_SMALL,
        output_size_limit=_SMALL,
        should_fold=lambda node: False if any(map(_is_lazy, node.inputs)) else None,
    )
    _lift_constants(model)
    for node in list(model.graph):
        _fold_lazily(model.graph, node)
    for clean in (
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.DeduplicateInitializersPass(size_limit=_SMALL),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
    ):
        clean(model)


def _lift_constants(model: ir.Model) -> None:
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _is_lazy(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.const_value, ir.LazyTensor)


def _fold_lazily(graph: ir.Graph, node: ir.Node) -> None:
    if node.domain or node.op_type not in _REARRANGING or not any(map(_is_lazy, node.inputs)):
        return
    inputs = [value for value in node.inputs if value is not None]
    if any(value.const_value is None for value in inputs):
        return
    output = node.outputs[0]
    if output.is_graph_output() or output.dtype is None or output.shape is None:
        return
    proto = ir.serde.serialize_node(node)
    tensors = {str(value.name): value.const_value for value in inputs}

    def make() -> ir.TensorProtocol:
        feeds = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
        (result,) = ReferenceEvaluator(proto).run(None, feeds)
        return ir.Tensor(np.ascontiguousarray(result), dtype=output.dtype, name=folded.name)

    first = next(value for value in inputs if _is_lazy(value))
    name = f"{first.name}.{node.op_type.lower()}"
    while name in graph.initializers:
        name += "_"
    shape = ir.Shape(output.shape)
    folded = ir.Value(name=name, shape=shape, type=ir.TensorType(output.dtype))
    folded.const_value = ir.LazyTensor(make, output.dtype, shape, name=name)
    graph.register_initializer(folded)
    output.replace_all_uses_with(folded)
    graph.remove(node, safe=True)
