"""The traced vision graph → the same with its linear layers in int8, by explicit Q/DQ.

A linear layer of which a calibration knows the input is computed from int8: its input through
QuantizeLinear and DequantizeLinear with one step for all, its weight stored as int8 with a step per
output channel, see `int8_weights`. Both are symmetric, as TensorRT takes them; what comes out is
of the graph's own float type, and so is everything between the layers: patches, norms, attention,
activations. The input's channels are evened out first, see `linear_layers`: by the layer norm that
makes them, elsewhere by one Mul.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ppllava_engines.errors import DataError, InternalError

from .int8_weights import LEVELS, column_steps, round_columns
from .linear_layers import (
    Array,
    constant,
    divide_norm,
    even_factors,
    float32,
    initializer,
    largest_rows,
    linear_layers,
    norm_of,
    remove_unused,
    shape,
    tensor,
)

# Chosen on DINOv2-S, whose 72 linear layers saw 24 frames of real videos; measured on 12 others, as
# the cosine of its features with torch's in fp32, and the least of a single token's:
#   one step for all channels, up to the largest magnitude   0.9901, 0.81
#   channels evened out                                      0.9984, 0.986
#   and the 6 layers with noisy inputs left float            0.9988, 0.992
# Steps of least squared error, which cut off what is largest, were worse: 0.973 against 0.993 from
# 12 frames.
# Signal to noise of a rounded input, in decibels, below which its layers stay float.
_LEAST_SIGNAL = 30.0


@dataclass(frozen=True)
class Channels:
    """What a calibration saw of a linear layer's input (..., K).

    Attributes:
        peaks: (K,) float32, the largest magnitude.
        powers: (K,) float32, the mean square.
    """

    peaks: Array
    powers: Array


def quantize_vision(model: ir.Model, seen: Mapping[str, Channels]) -> None:
    """Makes the linear layers that `seen` names compute from int8, in place; returns nothing.

    Layers whose input would lose too much stay as they are, see `count_layers`. Weights stay on
    disk: each is read here for its steps, and once more when the graph is saved.

    Args:
        model: A traced graph whose nodes still carry the tracer's scopes, and whose linear layers
            take their weights (K, N) from initializers.
        seen: By module name, from `calibration.calibrate`.

    Raises:
        DataError: Every layer stays as it is.
        InternalError: Layers that the graph does not have; all are named.
    """
    found = dict(linear_layers(model.graph))
    missing = sorted(seen.keys() - found.keys())
    if missing:
        raise InternalError(
            f"vision int8: the traced graph does not have the calibrated layers "
            f"{', '.join(missing)}"
        )
    layers = defaultdict[ir.Value, list[str]](list)
    for name in seen:
        x = found[name].inputs[0]
        assert x is not None
        layers[x].append(name)
    changed = [
        _quantize(model.graph, x, [found[name] for name in names], seen[names[0]])
        for x, names in layers.items()  # query, key and value share theirs
    ]
    if not any(changed):
        raise DataError(
            f"vision int8: none of {len(seen)} layers can be rounded, what the calibration videos "
            f"feed each of them is within {_LEAST_SIGNAL:g} dB of the rounding: calibrate on other "
            "videos, or leave the vision graph float"
        )
    remove_unused(model.graph)


def count_layers(path: Path) -> tuple[int, int]:
    """Returns how many linear layers of a saved vision graph compute from int8, and of how many."""
    graph = ir.load(path).graph
    weights = [node.inputs[1] for node in graph if node.op_type == "MatMul" and not node.domain]
    makers = [weight.producer() for weight in weights if weight is not None]
    rounded = sum(1 for maker in makers if maker and maker.op_type == "DequantizeLinear")
    rounded += sum(1 for node in graph if node.op_type == "MatMulInteger")
    floats = sum(1 for weight in weights if weight is not None and weight.is_initializer())
    return rounded, rounded + floats


def _quantize(graph: ir.Graph, x: ir.Value, nodes: Sequence[ir.Node], seen: Channels) -> bool:
    """Returns whether it made the products of `x` with weights compute from int8.

    It does not where that loses too much.
    """
    factors = even_factors(seen.peaks, largest_rows(nodes))
    step = float((seen.peaks / factors).max()) / LEVELS or 1.0
    noise = step**2 / 12
    signal = float((seen.powers / factors**2).mean())
    if signal < noise * 10 ** (_LEAST_SIGNAL / 10):
        return False
    divided = _divided(graph, x, nodes, factors)
    for node in nodes:
        # A pair for each layer: ONNX Runtime leaves products as they are whose quantized input has
        # more than one reader.
        node.replace_input_with(0, _rounded(graph, node, divided, step))
        node.replace_input_with(1, _stored(graph, node, constant(node.inputs[1]), factors))
    return True


def _divided(graph: ir.Graph, x: ir.Value, nodes: Sequence[ir.Node], factors: Array) -> ir.Value:
    """Returns `x` with its channels divided, by the norm that it comes from where there is one."""
    norm = norm_of(x, nodes)
    if norm is not None:
        divide_norm(graph, norm, factors)
        return x
    inverse = initializer(graph, f"{x.name}.shrink", tensor(1 / factors, _dtype(x)))
    node = ir.node("Mul", [x, inverse], metadata_props=nodes[0].metadata_props)
    _describe(node, f"{x.name}.even", x)
    graph.insert_before(nodes[0], node)
    return node.outputs[0]


def _rounded(graph: ir.Graph, node: ir.Node, x: ir.Value, step: float) -> ir.Value:
    """Returns `x` after a trip through int8, made before `node`."""
    name = f"{node.outputs[0].name}.input"
    scale = initializer(graph, f"{name}.scale", _not_below(np.array(step), _dtype(x)))
    zero = initializer(graph, f"{name}.zero_point", ir.tensor(np.int8(0)))
    quantize = ir.node("QuantizeLinear", [x, scale, zero], metadata_props=node.metadata_props)
    _describe(quantize, f"{name}.int8", x, ir.DataType.INT8)
    operands = [quantize.outputs[0], scale, zero]
    dequantize = ir.node("DequantizeLinear", operands, metadata_props=node.metadata_props)
    _describe(dequantize, name, x)
    graph.insert_before(node, (quantize, dequantize))
    return dequantize.outputs[0]


def _stored(graph: ir.Graph, node: ir.Node, weight: ir.TensorProtocol, factors: Array) -> ir.Value:
    """Returns what stands for a weight (K, N) whose rows are multiplied, made before `node`."""
    steps = _not_below(column_steps(float32(weight) * factors[:, None]), weight.dtype)

    def make() -> ir.TensorProtocol:
        even = float32(weight) * factors[:, None]
        return ir.tensor(round_columns(even, steps.numpy()), name=name)

    name = f"{weight.name}.int8"
    lazy = ir.LazyTensor(make, ir.DataType.INT8, shape(weight), name=name)
    operands = [
        initializer(graph, name, lazy),
        initializer(graph, f"{name}.scale", steps),
        initializer(graph, f"{name}.zero_point", ir.tensor(np.zeros(steps.shape.numpy(), np.int8))),
    ]
    dequantize = ir.node(
        "DequantizeLinear", operands, {"axis": 1}, metadata_props=node.metadata_props
    )
    like = node.inputs[1]
    assert like is not None
    _describe(dequantize, f"{name}.float", like)
    graph.insert_before(node, dequantize)
    return dequantize.outputs[0]


def _describe(node: ir.Node, name: str, like: ir.Value, dtype: ir.DataType | None = None) -> None:
    output = node.outputs[0]
    output.name, output.shape = name, like.shape
    output.type = ir.TensorType(dtype or _dtype(like))


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _not_below(values: Array, dtype: ir.DataType) -> ir.TensorProtocol:
    """Returns the smallest positive values of a float type that are not below `values`.

    Rounded down, a step would not reach the largest magnitude. In fp16 that is not a matter of the
    last bits: steps of weights are of the size of its smallest numbers.
    """
    nearest = tensor(values, dtype).numpy()
    above = np.nextafter(nearest, np.array(np.inf, nearest.dtype))
    return tensor(np.where(nearest.astype(np.float64) < values, above, nearest), dtype)
