"""The weights of a decoder's linears as initializers that are made only while they are written.

What is read is the checkpoint's mapped file, a slice of rows at a time; what is held is the one
tensor being written. ONNX wants (K, N) where checkpoints hold (N, K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor

from .decoder_quantization import Bits, block_size, pack_int4, quantize
from .int8_weights import column_steps, round_columns

_SLICE = 1 << 19  # weights at a time: larger slices leave the processor's cache and take longer


class Matrix:
    """The weights (K, N) of one linear, or of several with the same input side by side.

    Attributes:
        num_inputs: K.
        num_outputs: N.
    """

    def __init__(self, parts: Sequence[Tensor], release: Callable[[], None]) -> None:
        """Holds on to `parts`, (N, K) each, and calls `release` after each slice that it reads."""
        self._parts = tuple(parts)
        self._release = release
        self._scales: NDArray[Any] | None = None
        self.num_inputs = parts[0].shape[1]
        self.num_outputs = sum(part.shape[0] for part in parts)

    def floats(self, name: str, dtype: ir.DataType) -> ir.LazyTensor:
        """Returns the weights (K, N) as floats."""

        def make() -> ir.TensorProtocol:
            out = torch.empty(self.num_inputs, self.num_outputs, dtype=to_torch_dtype(dtype))
            for start, rows in self._slices():
                columns = rows.to(out.dtype).T.contiguous()
                out[:, start : start + len(rows)] = columns
            return TorchTensor(out, name=name)

        return ir.LazyTensor(make, dtype, self._shape(self.num_inputs), name=name)

    def block_size(self, bits: Bits) -> int | None:
        """Returns how many inputs share a scale; None if these weights cannot be quantized."""
        odd = any(part.shape[0] % 2 for part in self._parts)  # two outputs share a byte
        return None if bits == 4 and odd else block_size(self.num_inputs, bits)

    def quantized(
        self, name: str, bits: Bits, scale_dtype: ir.DataType
    ) -> tuple[ir.LazyTensor, ir.LazyTensor]:
        """Returns the inputs of a DequantizeLinear along axis 0 that makes the weights (K, N).

        These are integers (K, N) and scales (K / block, N), which are made together, so write them
        one after the other.
        """
        block = self.block_size(bits)
        assert block is not None
        dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
        whole, blocks = self._shape(self.num_inputs), self._shape(self.num_inputs // block)

        def make_integers() -> ir.TensorProtocol:
            values, self._scales = self._quantize(bits, block, scale_dtype.numpy())
            if bits == 8:
                return ir.Tensor(values, name=name)
            return ir.PackedTensor(values.ravel(), dtype, shape=whole, name=name)

        def make_scales() -> ir.TensorProtocol:
            scales, self._scales = self._scales, None
            if scales is None:
                scales = self._quantize(bits, block, scale_dtype.numpy())[1]
            return ir.Tensor(scales, dtype=scale_dtype, name=f"{name}_scales")

        return (
            ir.LazyTensor(make_integers, dtype, whole, name=name),
            ir.LazyTensor(make_scales, scale_dtype, blocks, name=f"{name}_scales"),
        )

    def columns(self, name: str) -> tuple[ir.LazyTensor, ir.LazyTensor]:
        """Returns weights (K, N) as int8 with a float32 step (N,) per output; see `int8_weights`.

        They are made together, so write them one after the other.
        """
        whole, outputs = self._shape(self.num_inputs), ir.Shape((self.num_outputs,))

        def make_integers() -> ir.TensorProtocol:
            values, self._scales = self._round_columns()
            return ir.Tensor(values, name=f"{name}_columns")

        def make_steps() -> ir.TensorProtocol:
            steps, self._scales = self._scales, None
            if steps is None:
                steps = self._round_columns()[1]
            return ir.Tensor(steps, name=f"{name}_steps")

        return (
            ir.LazyTensor(make_integers, ir.DataType.INT8, whole, name=f"{name}_columns"),
            ir.LazyTensor(make_steps, ir.DataType.FLOAT, outputs, name=f"{name}_steps"),
        )

    def _round_columns(self) -> tuple[NDArray[Any], NDArray[Any]]:
        values = np.empty((self.num_inputs, self.num_outputs), np.int8)
        steps = np.empty(self.num_outputs, np.float32)
        for start, rows in self._slices():
            columns = np.ascontiguousarray(rows.float().numpy().T)
            end = start + len(rows)
            steps[start:end] = column_steps(columns)
            values[:, start:end] = round_columns(columns, steps[start:end])
        return values, steps

    def _quantize(
        self, bits: Bits, block: int, scale_dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        per_byte = 8 // bits
        values = np.empty((self.num_inputs, self.num_outputs // per_byte), np.int8)
        scales = np.empty((self.num_inputs // block, self.num_outputs), scale_dtype)
        for start, rows in self._slices():
            columns = np.ascontiguousarray(rows.float().numpy().T)
            quantized = quantize(columns.reshape(-1, block, len(rows)), bits, scale_dtype)
            end = start + len(rows)
            part = quantized[0].reshape(columns.shape)
            if bits == 4:
                part = pack_int4(part).view(np.int8)
            values[:, start // per_byte : end // per_byte] = part
            scales[:, start:end] = quantized[1]
        return values.view(np.int8 if bits == 8 else np.uint8), scales

    def _slices(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (index of its first output, an even number of rows (n, K)), in order."""
        at = 0
        count = max(2, _SLICE // self.num_inputs // 2 * 2)
        for part in self._parts:
            for rows in part.detach().split(count):
                yield at, rows
                at += len(rows)
                self._release()

    def _shape(self, rows: int) -> ir.Shape:
        return ir.Shape((rows, self.num_outputs))
