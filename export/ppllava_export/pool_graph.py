"""The pool graph, written as ONNX text: one custom node, with a function of plain ops as its body.

Any ONNX runtime inlines the function; one that knows `ppllava::StridedWeightedPool` runs its own
kernel instead.
"""

from __future__ import annotations

import onnx
import onnx.parser
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from .modules.alignment import Projector

DOMAIN = "ppllava"
OP_TYPE = "StridedWeightedPool"
OPSET = 23
_IR_VERSION = 11

# Windows n and the tokens in each are numbered in (T, h, w) order. For any extents (a, b, c) the
# place values (b*c, c, 1) turn coordinates into such a number and, by division, back; they are
# computed once for the grid, the windows and the kernel, as rows of one (3, 3) table.
#
# A kernel that does not fit, or a kernel or stride below one, has no windows: pooled is (0, D).
# Divisors are at least one even then: what a division by zero does is up to the runtime.
FUNCTION = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{OP_TYPE} <temperature> (hidden, weights, kernel, stride) => (pooled)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    rows = Constant <value_ints = [0]> ()
    columns = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    ones = Constant <value = int64[3,1] {{1, 1, 1}}> ()

    size = Shape (weights)
    step = Max (stride, one)
    slack = Sub (size, kernel)
    reach = Add (slack, step)
    fitting = Max (reach, zero)
    steps = Div (fitting, step)
    smaller = Min (kernel, stride)
    valid = Clip (smaller, zero, one)
    windows = Mul (steps, valid)
    some_windows = Max (windows, one)
    inside = Min (kernel, size)
    some_kernel = Max (inside, one)

    size_row = Unsqueeze (size, rows)
    windows_row = Unsqueeze (some_windows, rows)
    kernel_row = Unsqueeze (some_kernel, rows)
    extents = Concat <axis = 0> (size_row, windows_row, kernel_row)
    middle = Slice (extents, columns, two, columns)
    last = Slice (extents, two, three, columns)
    plane = Mul (middle, last)
    places = Concat <axis = 1> (plane, last, ones)
    size_places, windows_places, kernel_places = Split <axis = 0, num_outputs = 3> (places)

    num_windows = ReduceProd <keepdims = 0> (windows)
    window = Range (zero, num_windows, one)
    window_column = Unsqueeze (window, columns)
    window_count = Div (window_column, windows_places)
    window_at = Mod (window_count, windows_row)
    first_at = Mul (window_at, stride)
    first_parts = Mul (first_at, size_places)
    first = ReduceSum <keepdims = 1> (first_parts, columns)

    num_tokens = ReduceProd <keepdims = 0> (some_kernel)
    token = Range (zero, num_tokens, one)
    token_column = Unsqueeze (token, columns)
    token_count = Div (token_column, kernel_places)
    token_at = Mod (token_count, kernel_row)
    offset_parts = Mul (token_at, size_places)
    offset = ReduceSum <keepdims = 0> (offset_parts, columns)
    index = Add (first, offset)

    flat_weights = Flatten <axis = 0> (weights)
    all_weights = Squeeze (flat_weights, rows)
    window_weights = Gather (all_weights, index)
    temperature = Constant <value_float: float = @temperature> ()
    scores = Div (window_weights, temperature)
    shares = Softmax <axis = -1> (scores)
    typed_shares = CastLike (shares, hidden)
    share_rows = Unsqueeze (typed_shares, columns)

    tokens = Flatten <axis = 3> (hidden)
    window_tokens = Gather (tokens, index)
    pooled_rows = MatMul (share_rows, window_tokens)
    pooled = Squeeze (pooled_rows, columns)
}}
"""


def _graph(projector: Projector, grid: tuple[int, int], dtype: str) -> str:
    height, width = grid
    tokens = height * width
    decoder_width = projector.linear_2.out_features
    key_width = projector.projection_dim
    # SigLIP's logit_bias is not here: added to every logit alike, it changes no softmax, and its
    # size would only cost the logits some of their last bits.
    scale = float(projector.logit_scale.double().exp())
    return f"""
<ir_version: {_IR_VERSION}, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>
pool (
    {dtype}[T,{tokens},{key_width}] keys,
    {dtype}[T,{tokens},{decoder_width}] hidden,
    {dtype}[1,{key_width}] text_embed,
    int64[3] kernel,
    int64[3] stride
) => ({dtype}[N,{decoder_width}] pooled, float[T,{height},{width}] relevance)
<
    int64[3] grid_shape = {{-1, {height}, {width}}},
    int64[4] hidden_shape = {{-1, {height}, {width}, {decoder_width}}},
    int64[2] one_row = {{1, -1}},
    float logit_scale = {{{scale!r}}}
>
{{
    keys_fp32 = Cast <to = {TensorProto.FLOAT}> (keys)
    text_fp32 = Cast <to = {TensorProto.FLOAT}> (text_embed)
    text_column = Transpose <perm = [1, 0]> (text_fp32)
    cosines = MatMul (keys_fp32, text_column)
    relevance = Reshape (cosines, grid_shape)

    logits = Mul (cosines, logit_scale)
    logits_row = Reshape (logits, one_row)
    weights_row = Softmax <axis = -1> (logits_row)
    weights = Reshape (weights_row, grid_shape)

    hidden_grid = Reshape (hidden, hidden_shape)
    pooled_hidden = {DOMAIN}.{OP_TYPE} <temperature = {projector.temperature!r}>
        (hidden_grid, weights, kernel, stride)
    pooled = Gemm <transB = 1>
        (pooled_hidden, linear_2_weight, linear_2_bias)
}}
"""


def pool_graph(projector: Projector, grid: tuple[int, int], dtype: torch.dtype) -> onnx.ModelProto:
    """Returns the pool graph: keys, hidden and a question → pooled tokens and the relevance map.

    Similarity, both softmaxes and the pooling weights are fp32 whatever `dtype` is; linear_2 runs
    after the pooling, on the pooled tokens only.

    Args:
        projector: Holds linear_2, the logit scale and the temperature.
        grid: (h, w) patches per frame.
        dtype: Type of keys, hidden, text_embed and pooled.
    """
    name = {torch.float32: "float", torch.float16: "float16"}[dtype]
    model = onnx.parser.parse_model(_graph(projector, grid, name))
    model.functions.append(onnx.parser.parse_function(FUNCTION))
    model.graph.initializer.extend(
        _initializer(f"linear_2_{part}", tensor.to(dtype))
        for part, tensor in projector.linear_2.named_parameters()
    )
    return model


def _initializer(name: str, tensor: Tensor) -> TensorProto:
    return numpy_helper.from_array(tensor.detach().numpy(), name)
