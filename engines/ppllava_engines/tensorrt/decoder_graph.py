"""The decoder's graph → plain operators, with the cache's buffers outside of it.

Inputs and outputs of the lowered graph, in this order (L layers, V tokens, F the bundle's float
type, C the cache's: F, but bfloat16 in a bf16 bundle, whose F is float32):

    inputs_embeds                  F (1,[n],D)      the n new tokens
    length                         int64 (1)        tokens in the cache; a tensor, not a shape
    past_key_values.{i}.key        C (1,Hkv,[c],d)  for i in 0..L-1, each followed by
    past_key_values.{i}.value      C (1,Hkv,[c],d)  its value
    →
    logits                         float32 (1,1,V)  of the last new token
    present.{i}.key                C (1,Hkv,[n],d)  the new tokens' rows, rotated; each followed by
    present.{i}.value              C (1,Hkv,[n],d)  its value

Only the first `length` positions of the cache count; what is behind them must be finite (a masked
value is multiplied by zero), so buffers are zeroed once when they are made. The caller copies the
rows of `present` to positions length..length+n-1. A step is n = 1 with c the cache's capacity:
fixed shapes. The first call passes length = 0 and c = 1. Chunks (n > 1, length > 0) work, and to
rewind is to pass a smaller length. length + n must not exceed the manifest's max_positions.

Long prompts belong in chunks: scores take some 6·H·n·(c+n) bytes, H being the heads. TensorRT-RTX's
plan asks for 873 MB of activations at H = 32, n = 2048, c = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppllava_engines.bundle import DecoderSpec
from ppllava_engines.errors import IncompatibleError
from ppllava_engines.tensorrt.attention import Writer, replace

if TYPE_CHECKING:
    import onnx_ir as ir

_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
# Of the fused operators, what may be set besides the heads and the scale.
_PLAIN = {
    "softcap": 0.0,
    "local_window_size": -1,
    "rotary_interleaved": 0,
    "interleaved": 0,
    "num_heads": 0,  # of a RotaryEmbedding: that many are in the input's width
    "rotary_embedding_dim": 0,
    "smooth_softmax": 0,
    "axis": -1,
    "stash_type": 1,
}


@dataclass(frozen=True)
class _Shared:
    """What all layers share.

    Attributes:
        positions: (n) int64 of the new tokens.
        seen_past: (c) bool, which positions of the cache count.
        seen_new: (n,n) bool, which new token sees which.
    """

    positions: ir.Value
    seen_past: ir.Value
    seen_new: ir.Value


def lower_decoder(graph: ir.Graph, spec: DecoderSpec) -> None:
    """Makes a bundle's decoder graph the one described above, in place; returns nothing.

    Before: attention, rotation and norms are the fused operators of ONNX Runtime, as the exporter
    leaves them. After: every operator is a standard one, or leads to no output; what leads to none
    is left to the caller to remove.

    Args:
        graph: Of `decoder/model.onnx`.
        spec: What the manifest says of it.

    Raises:
        IncompatibleError: A fused operator with an option that has no lowering.
    """
    import onnx_ir as ir

    given = {str(value.name): value for value in graph.inputs}
    embeds = given["inputs_embeds"]
    length = ir.Value(name="length", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    names = [f"{layer}.{part}" for layer in range(spec.num_layers) for part in ("key", "value")]
    past = [given[f"past_key_values.{name}"] for name in names]
    graph.inputs[:] = [embeds, length, *past]
    shared = _share(Writer(graph, graph[0], "cache"), embeds, length, past[0])
    for node in list(graph):
        if node.op_type in _NORMS:
            _lower_norm(graph, node)
        elif node.op_type == "DequantizeLinear":
            _settle_block(graph, node)
        elif node.op_type == "GroupQueryAttention":
            _lower_attention(graph, node, spec, shared)
    made = {str(value.name): value for value in graph.outputs}
    present = [made[f"present.{name}"] for name in names]
    graph.outputs[:] = [_as_fp32(graph, made["logits"]), *present]
    embeds.shape = ir.Shape([1, "n", spec.width])
    graph.outputs[0].shape = ir.Shape([1, 1, spec.vocab_size])
    graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    for values, axis in ((past, "c"), (present, "n")):
        for value in values:
            value.shape = ir.Shape([1, spec.num_kv_heads, axis, spec.head_dim])
            value.type = past[0].type


def _share(write: Writer, embeds: ir.Value, length: ir.Value, past: ir.Value) -> _Shared:
    positions = write.op("Add", write.count(embeds, 1), length)
    seen_past = write.op("Less", write.count(past, 2), length)
    return _Shared(positions, seen_past, write.causal(embeds, 1))


def _as_fp32(graph: ir.Graph, logits: ir.Value) -> ir.Value:
    import onnx_ir as ir

    if logits.dtype == ir.DataType.FLOAT:
        return logits
    cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT}, name="logits/Cast")
    logits.name, cast.outputs[0].name = "narrow_logits", "logits"
    graph.append(cast)
    return cast.outputs[0]


def _settle_block(graph: ir.Graph, node: ir.Node) -> None:
    """Makes int8 weights whose columns are one block each what they are: a scale per column.

    TensorRT-RTX's compiler fails on products of such blocks when they share what they multiply.
    """
    import onnx_ir as ir

    weight, *rows = node.inputs
    tensors = [row.const_value for row in rows if row is not None]
    assert weight is not None
    if weight.dtype != ir.DataType.INT8 or any(t is None or t.shape[0] != 1 for t in tensors):
        return
    write = Writer(graph, node)
    for index, tensor in enumerate(tensors, start=1):
        assert tensor is not None
        shape, flat = ir.Shape(tensor.shape.numpy()[1:]), tensor
        if isinstance(tensor, ir.ExternalTensor):
            place = tensor.location, tensor.offset, tensor.length, tensor.dtype
            name, folder = str(tensor.name), tensor.base_dir
            flat = ir.ExternalTensor(*place, shape=shape, name=name, base_dir=folder)
        else:
            flat = ir.tensor(tensor.numpy()[0], tensor.dtype)
        node.replace_input_with(index, write.constant(f"{tensor.name}.columns", flat))
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    node.attributes.pop("block_size")


def _lower_norm(graph: ir.Graph, node: ir.Node) -> None:
    """Writes a root-mean-square norm out, with the sum before it where it has one."""
    import onnx_ir as ir

    _refuse_options(node, {"epsilon"})
    write, inputs = Writer(graph, node), [value for value in node.inputs if value is not None]
    is_sum = node.op_type == "SkipSimplifiedLayerNormalization"
    if len(inputs) != 2 + is_sum or (is_sum and any(v.uses() for v in node.outputs[1:3])):
        raise IncompatibleError(f"decoder: {node.name} has a bias or statistics, expected none")
    weight = inputs[-1]
    dtype, wide = weight.dtype, ir.DataType.FLOAT
    assert dtype is not None
    x = write.op("Add", *inputs[:2]) if is_sum else inputs[0]
    epsilon = write.scalar(node.attributes.get_float("epsilon", 1e-5), wide)
    x32 = write.cast(x, dtype, wide)
    square = write.op("ReduceMean", write.op("Mul", x32, x32), write.ints(-1))
    root = write.op("Sqrt", write.op("Add", square, epsilon))
    normed = write.op("Mul", write.op("Div", x32, root), write.cast(weight, dtype, wide))
    outputs = [write.cast(normed, wide, dtype)]
    # Of the others only the last is used, the sum.
    replace(node, outputs + [x] * (len(node.outputs) - 1))


def _lower_attention(graph: ir.Graph, node: ir.Node, spec: DecoderSpec, shared: _Shared) -> None:
    """Writes a layer's attention out; its new keys and values are what it makes of them.

    The heads that share keys and values are the rows of one product, and past and new scores meet
    only in the softmax: neither is the cache repeated nor copied.
    """
    import onnx_ir as ir

    _refuse_options(node, {"num_heads", "kv_num_heads", "scale", "do_rotary"})
    if any(value is not None for value in node.inputs[9:]):
        raise IncompatibleError(f"decoder: {node.name} has a bias or sinks, expected none")
    write = Writer(graph, node)
    kv_heads, width = spec.num_kv_heads, spec.head_dim
    heads = node.attributes["num_heads"].as_int()
    group = heads // kv_heads
    past_key, past_value = node.inputs[3:5]
    assert past_key is not None
    assert past_value is not None
    dtype = past_key.dtype
    assert dtype is not None

    query, key, value = _projections(write, node, heads, kv_heads, width)
    tables = _tables(node)
    if tables is not None:
        turns = [write.op("Gather", table, shared.positions, axis=0) for table in tables]
        query, key = (_rotated(write, part, *turns) for part in (query, key))
    scale = node.attributes.get_float("scale", 0.0) or width**-0.5
    if group > 1:
        query = write.op("Reshape", query, write.ints(1, kv_heads, -1, width))

    def scores(keys: ir.Value, seen: ir.Value) -> ir.Value:
        product = write.scores(query, keys, scale, dtype)
        if group > 1:  # (1,Hkv,G·n,·) → (Hkv,G,n,·): the 0 keeps the last size
            product = write.op("Reshape", product, write.ints(kv_heads, group, -1, 0))
        return write.masked(product, seen)

    both = [scores(past_key, shared.seen_past), scores(key, shared.seen_new)]
    shares = write.op("Softmax", write.op("Concat", *both, axis=-1), axis=-1)
    shares = write.cast(shares, ir.DataType.FLOAT, dtype)
    if group > 1:
        shares = write.op("Reshape", shares, write.ints(1, kv_heads, -1, 0))
    capacity, last = write.size(past_key, 2), write.ints(3)
    of_past = write.op("Slice", shares, write.ints(0), capacity, last)
    of_new = write.op("Slice", shares, capacity, write.ints(2**31 - 1), last)
    sums = [write.op("MatMul", of_past, past_value), write.op("MatMul", of_new, value)]
    seen = write.op("Add", *sums)
    if group > 1:
        seen = write.op("Reshape", seen, write.ints(1, heads, -1, width))
    rows = write.op("Transpose", seen, perm=[0, 2, 1, 3])
    rows = write.op("Reshape", rows, write.ints(0, 0, heads * width))
    replace(node, [rows, key, value])


def _projections(
    write: Writer, node: ir.Node, heads: int, kv_heads: int, width: int
) -> list[ir.Value]:
    """Queries, keys and values (1,H,n,d), not rotated."""
    parts = [_unrotated(value) for value in node.inputs[:3] if value is not None]
    counts = (heads, kv_heads, kv_heads)
    if len(parts) == 1:
        sizes = write.ints(*(count * width for count in counts))
        parts = write.op("Split", parts[0], sizes, outputs=3, axis=-1)
    split = [
        write.op("Reshape", part, write.ints(0, 0, count, width))
        for part, count in zip(parts, counts, strict=True)
    ]
    return [write.op("Transpose", part, perm=[0, 2, 1, 3]) for part in split]


def _rotation(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "RotaryEmbedding" else None


def _unrotated(value: ir.Value) -> ir.Value:
    node = _rotation(value)
    if node is None:
        return value
    _refuse_options(node, set())
    (x, *_) = node.inputs
    assert x is not None
    return x


def _tables(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Cosines and sines (positions,d/2), None where nothing is rotated."""
    before = _rotation(node.inputs[0])
    fused = node.attributes.get_int("do_rotary", 0)
    cos, sin = before.inputs[2:4] if before else node.inputs[7:9] if fused else (None, None)
    return None if cos is None or sin is None else (cos, sin)


def _rotated(write: Writer, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """`x` (1,H,n,d) with channel k and k + d/2 as the two axes of a plane, turned by its angle."""
    first, second = write.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    a = write.op("Sub", write.op("Mul", first, cos), write.op("Mul", second, sin))
    b = write.op("Add", write.op("Mul", second, cos), write.op("Mul", first, sin))
    made: ir.Value = write.op("Concat", a, b, axis=-1)
    return made


def _refuse_options(node: ir.Node, known: set[str]) -> None:
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    for name, value in options.items():
        if name not in known and (name not in _PLAIN or value != _PLAIN[name]):
            raise IncompatibleError(
                f"decoder: {node.name} has {name} = {value!r}, which has no lowering: use a newer "
                "release"
            )
