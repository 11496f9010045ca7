"""The pool graphs, written as ONNX text: one custom node, with a function of plain ops as its body.

Any ONNX runtime inlines the function; one that knows `ppllava::StridedWeightedPool` runs its own
kernel instead. `ppllava::ScaledStridedWeightedPool` is the same of int8 values, each of which
stands for a multiple of its token's scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx.parser
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from .modules.alignment import Projector

DOMAIN = "ppllava"
OP_TYPE = "StridedWeightedPool"
SCALED_OP_TYPE = "ScaledStridedWeightedPool"
OPSET = 23
_IR_VERSION = 11

# Windows n and the tokens in each are numbered in (T, h, w) order. For any extents (a, b, c) the
# place values (b*c, c, 1) turn coordinates into such a number and, by division, back; they are
# computed once for the grid, the windows and the kernel, as rows of one (3, 3) table.
#
# A kernel that does not fit, or a kernel or stride below one, has no windows: pooled is (0, D).
# Divisors are at least one even then: what a division by zero does is up to the runtime.
_SHARES = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    rows = Constant <value_ints = [0]> ()
    columns = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    ones = Constant <value = int64[3,1] {1, 1, 1}> ()

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
"""

FUNCTION = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{OP_TYPE} <temperature> (hidden, weights, kernel, stride) => (pooled)
{{{_SHARES}
    typed_shares = CastLike (shares, hidden)
    share_rows = Unsqueeze (typed_shares, columns)

    tokens = Flatten <axis = 3> (hidden)
    window_tokens = Gather (tokens, index)
    pooled_rows = MatMul (share_rows, window_tokens)
    pooled = Squeeze (pooled_rows, columns)
}}
"""

# A token's scale is folded into its share, so that none of its values is multiplied by it.
SCALED_FUNCTION = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{SCALED_OP_TYPE} <temperature> (hidden, scales, weights, kernel, stride) => (pooled)
{{{_SHARES}
    flat_scales = Flatten <axis = 0> (scales)
    all_scales = Squeeze (flat_scales, rows)
    window_scales = Gather (all_scales, index)
    scaled_shares = Mul (shares, window_scales)
    share_rows = Unsqueeze (scaled_shares, columns)

    tokens = Flatten <axis = 3> (hidden)
    window_tokens = Gather (tokens, index)
    window_values = CastLike (window_tokens, scales)
    pooled_rows = MatMul (share_rows, window_values)
    pooled = Squeeze (pooled_rows, columns)
}}
"""

# From the cosines of all tokens to what people see of them and to what pools.
RELEVANCE_NODES = """
    relevance = Reshape (cosines, grid_shape)

    logits = Mul (cosines, logit_scale)
    logits_row = Reshape (logits, one_row)
    weights_row = Softmax <axis = -1> (logits_row)
    weights = Reshape (weights_row, grid_shape)
"""

TEXT_NODES = f"""
    text_fp32 = Cast <to = {TensorProto.FLOAT}> (text_embed)
    text_column = Transpose <perm = [1, 0]> (text_fp32)
"""

_KEY_NODES = f"""
    keys_fp32 = Cast <to = {TensorProto.FLOAT}> (keys)
    {TEXT_NODES}
    cosines = MatMul (keys_fp32, text_column)
"""

_NAMES = {torch.float32: "float", torch.float16: "float16", torch.int8: "int8"}
_NUMBERS = {torch.float32: int(TensorProto.FLOAT), torch.float16: int(TensorProto.FLOAT16)}


@dataclass(frozen=True)
class PoolText:
    """What the graphs around the pooling are written of.

    Attributes:
        grid: (h, w) patches of a frame.
        dtype: Type of text_embed and pooled, and of the projector's weights.
        vision_width, key_width, decoder_width: C, P and D.
        temperature: Of the pooling.
        logit_scale: What cosines are multiplied by before the softmax over all of them.
    """

    grid: tuple[int, int]
    dtype: torch.dtype
    vision_width: int
    key_width: int
    decoder_width: int
    temperature: float
    logit_scale: float

    @staticmethod
    def of(projector: Projector, grid: tuple[int, int], dtype: torch.dtype) -> PoolText:
        """Returns what is written of a projector for frames of `grid` patches."""
        return PoolText(
            grid,
            dtype,
            projector.linear_1.in_features,
            projector.projection_dim,
            projector.linear_2.out_features,
            projector.temperature,
            # SigLIP's logit_bias is not here: added to every logit alike, it changes no softmax,
            # and its size would only cost the logits some of their last bits.
            float(projector.logit_scale.double().exp()),
        )

    @property
    def num_tokens(self) -> int:
        """Patches of a frame, L."""
        return self.grid[0] * self.grid[1]

    @property
    def number(self) -> int:
        """The type as ONNX numbers it."""
        return _NUMBERS[self.dtype]

    def tokens(self, frames: str = "T") -> str:
        """How a memory's tokens are declared."""
        return f"float16[{frames},{self.num_tokens},{self.vision_width}] tokens"

    @property
    def text_embed(self) -> str:
        """How the input is declared."""
        return f"{_NAMES[self.dtype]}[1,{self.key_width}] text_embed"

    @property
    def pooled(self) -> str:
        """How the output is declared."""
        return f"{_NAMES[self.dtype]}[N,{self.decoder_width}] pooled"

    def over_grid(self, name: str, frames: str = "T") -> str:
        """How the fp32 numbers `name`, one of each token, are declared."""
        return f"float[{frames},{self.grid[0]},{self.grid[1]}] {name}"

    def graph(
        self, name: str, inputs: Sequence[str], outputs: Sequence[str], nodes: str
    ) -> onnx.ModelProto:
        """Returns a graph of text, whose nodes may use the constants named here."""
        height, width = self.grid
        return onnx.parser.parse_model(f"""
            <ir_version: {_IR_VERSION}, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>
            {name} ({", ".join(inputs)}) => ({", ".join(outputs)})
            <
                int64[3] grid_shape = {{-1, {height}, {width}}},
                int64[4] hidden_shape = {{-1, {height}, {width}, {self.decoder_width}}},
                int64[2] one_row = {{1, -1}},
                float logit_scale = {{{self.logit_scale!r}}}
            >
            {{ {nodes} }}
        """)

    def pool_nodes(self, hidden: torch.dtype) -> str:
        """Returns the nodes from `hidden` of a type and `weights` to `pooled`.

        They leave two weights open, see `linear_2`.
        """
        op, scales, made = OP_TYPE, "", hidden
        if hidden == torch.int8:
            op, scales, made = SCALED_OP_TYPE, "scales_grid,", torch.float32
        cast = made != self.dtype
        result = "pooled_sums" if cast else "pooled_hidden"
        return f"""
            hidden_grid = Reshape (hidden, hidden_shape)
            {"scales_grid = Reshape (scales, grid_shape)" if scales else ""}
            {result} = {DOMAIN}.{op} <temperature = {self.temperature!r}>
                (hidden_grid, {scales} weights, kernel, stride)
            {f"pooled_hidden = Cast <to = {self.number}> ({result})" if cast else ""}
            pooled = Gemm <transB = 1> (pooled_hidden, linear_2_weight, linear_2_bias)
        """


def memory_pool_graph(text: PoolText, keys: torch.dtype, hidden: torch.dtype) -> onnx.ModelProto:
    """Returns the pool graph of a memory of a video, without the weights of linear_2.

    keys, hidden, for int8 also scales (T, L) fp32, text_embed, kernel, stride → pooled, relevance.
    Similarity, both softmaxes and the pooling weights are fp32 whatever the types are; linear_2
    runs after the pooling, on the pooled tokens only.

    Args:
        text: What it is written of.
        keys: Type of keys (T, L, P).
        hidden: Type of hidden (T, L, D); int8 is multiplied by `scales`.
    """
    scaled = hidden == torch.int8
    rows = f"T,{text.num_tokens}"
    model = text.graph(
        "pool",
        [
            f"{_NAMES[keys]}[{rows},{text.key_width}] keys",
            f"{_NAMES[hidden]}[{rows},{text.decoder_width}] hidden",
            *([f"float[{rows}] scales"] if scaled else []),
            text.text_embed,
            "int64[3] kernel",
            "int64[3] stride",
        ],
        [text.pooled, text.over_grid("relevance")],
        _KEY_NODES + RELEVANCE_NODES + text.pool_nodes(hidden),
    )
    model.functions.append(onnx.parser.parse_function(SCALED_FUNCTION if scaled else FUNCTION))
    return model


def pool_graph(projector: Projector, grid: tuple[int, int], dtype: torch.dtype) -> onnx.ModelProto:
    """Returns the pool graph: keys, hidden and a question → pooled tokens and the relevance map.

    Args:
        projector: Holds linear_2, the logit scale and the temperature.
        grid: (h, w) patches per frame.
        dtype: Type of keys, hidden, text_embed and pooled.
    """
    model = memory_pool_graph(PoolText.of(projector, grid, dtype), dtype, dtype)
    model.graph.initializer.extend(
        _initializer(f"linear_2_{part}", tensor.to(dtype))
        for part, tensor in projector.linear_2.named_parameters()
    )
    return model


def _initializer(name: str, tensor: Tensor) -> TensorProto:
    return numpy_helper.from_array(tensor.detach().numpy(), name)
