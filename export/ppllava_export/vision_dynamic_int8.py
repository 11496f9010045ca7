"""The traced vision graph → the same with its tower's linear layers in int8, without calibration.

A linear layer is fed uint8: DynamicQuantizeLinear rounds its input by the range that this run's
has, MatMulInteger multiplies with the stored int8 weight, see `int8_weights`, and the product goes
back to float32 by the input's step times the output channel's. These are standard ops; ONNX Runtime
fuses them, and rounds once what several layers read. Channels that a layer norm makes are evened
out, see `linear_layers`, by the sizes that the norm's own weights tell.

One step serves all frames of a run: for results that do not depend on which frames those are, run
one at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .int8_weights import column_steps, round_columns
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
)

# Chosen on DINOv2-S, whose 72 linear layers are in its blocks; measured on 25 frames of real videos
# as 1 - cosine of each token with fp32, its mean and its 99th percentile:
#   every layer, channels as they are            1.9e-3, 1.3e-2
#   channels after norms evened out              1.0e-3, 5.4e-3
#   and the first block left float               6.7e-4, 3.0e-3
#   evened, all fc2 float, a fifth slower        7.3e-4, 5.0e-3
#   evened, any other single block float         8.2e-4 and more
# What the first block loses, all others are fed. It is 1 of 23 in ViT-L.
_TOWER = "vision_tower."
_FIRST_BLOCK = "encoder.layers.0."
# Alignment and projector, 1 to 3 % of the work, stay float as well: which tokens a question is told
# of hangs on the first, and other graphs run both on all frames at once.
_PEAK = 4.0  # magnitude that a normalised channel rarely exceeds


def quantize_tower(model: ir.Model) -> None:
    """Makes the linear layers of a vision graph's tower compute from int8, in place.

    Weights stay on disk: each is read here for its channels' sizes and for its steps, and once more
    when the graph is saved.

    Args:
        model: A traced graph of float32, whose nodes still carry the tracer's scopes, and whose
            linear layers take their weights (K, N) from initializers.
    """
    graph = model.graph
    layers = defaultdict[ir.Value, list[ir.Node]](list)
    for name, node in linear_layers(graph):
        if name.startswith(_TOWER) and _FIRST_BLOCK not in name:
            x = node.inputs[0]
            assert x is not None
            layers[x].append(node)
    for x, nodes in layers.items():  # query, key and value share theirs
        factors = _even(graph, x, nodes)
        rounded = ir.node(
            "DynamicQuantizeLinear", [x], num_outputs=3, metadata_props=nodes[0].metadata_props
        )
        uint8, float_ = ir.DataType.UINT8, ir.DataType.FLOAT
        for value, what, dtype in zip(
            rounded.outputs, ("uint8", "step", "zero_point"), (uint8, float_, uint8), strict=True
        ):
            value.name, value.type = f"{x.name}.{what}", ir.TensorType(dtype)
            value.shape = x.shape if what == "uint8" else ir.Shape(())
        graph.insert_before(nodes[0], rounded)
        for node in nodes:
            _multiply(graph, node, rounded, factors)
    remove_unused(graph)


def _even(graph: ir.Graph, x: ir.Value, nodes: Sequence[ir.Node]) -> Array:
    """Returns by what (K,) each channel of `x` was divided, by the norm that makes it.

    Elsewhere sizes are not known, and it is 1.
    """
    largest = largest_rows(nodes)
    norm = norm_of(x, nodes)
    if norm is None:
        return np.ones(len(largest), np.float32)
    gain, *bias = (float32(constant(value)) for value in norm.inputs[1:])
    peaks = _PEAK * np.abs(gain) + sum(map(np.abs, bias))
    factors = even_factors(peaks, largest)
    divide_norm(graph, norm, factors)
    return factors


def _multiply(graph: ir.Graph, node: ir.Node, rounded: ir.Node, factors: Array) -> None:
    """Puts a product of integers in the place of a product with a weight; returns nothing."""
    x, step, zero = rounded.outputs
    weight, out = constant(node.inputs[1]), node.outputs[0]
    steps = column_steps(float32(weight) * factors[:, None])

    def make() -> ir.TensorProtocol:
        return ir.tensor(round_columns(float32(weight) * factors[:, None], steps), name=name)

    name = f"{weight.name}.int8"
    lazy = ir.LazyTensor(make, ir.DataType.INT8, shape(weight), name=name)
    props = node.metadata_props
    product = ir.node(
        "MatMulInteger", [x, initializer(graph, name, lazy), zero], metadata_props=props
    )
    scale = initializer(graph, f"{name}.scale", ir.tensor(steps))
    scales = ir.node("Mul", [step, scale], metadata_props=props)
    number = ir.node("Cast", product.outputs, {"to": ir.DataType.FLOAT}, metadata_props=props)
    result = ir.node("Mul", [*number.outputs, *scales.outputs], metadata_props=props)
    float_ = ir.DataType.FLOAT
    for made, suffix, dtype, like in (
        (product, ".int32", ir.DataType.INT32, out.shape),
        (scales, ".step", float_, scale.shape),
        (number, ".steps", float_, out.shape),
        (result, "", float_, out.shape),
    ):
        value = made.outputs[0]
        value.name, value.type = f"{out.name}{suffix}", ir.TensorType(dtype)
        value.shape = like
    graph.insert_before(node, (product, scales, number, result))
    out.replace_all_uses_with(result.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
