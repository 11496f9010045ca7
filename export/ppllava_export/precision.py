"""fp32 modules → fp16 modules with fp32 islands where fp16 costs answers.

The modules are cast before they are traced, so that the tracer settles the type of every value.
Islands: layer norms, the normalisation of keys and question, and the softmax of attention. The
pool graph keeps its own (similarity, both softmaxes, pooling weights), see `pool_graph`.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

from .modules.alignment import Projector

M = TypeVar("M", bound=nn.Module)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def cast(module: M, dtype: torch.dtype) -> M:
    """Returns an fp32 module as one that takes and computes in `dtype`, islands excepted.

    What is normalised comes out as fp32; the caller casts it when it leaves the graph. The module
    itself is never changed: for fp32 it is returned, otherwise a copy.
    """
    if dtype == torch.float32:
        return module
    module = copy.deepcopy(module).to(dtype)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.float()
            part.register_forward_pre_hook(_input_to_fp32)
            part.register_forward_hook(_output_to(dtype))
        elif isinstance(part, Projector):
            # F.normalize squares: fp16 overflows above 255 and loses what is below 0.008.
            for projection in (part.clip_visual_projection, part.clip_text_projection):
                projection.register_forward_hook(_output_to(torch.float32))
    return module


def keep_softmax_fp32(model: ir.Model) -> None:
    """Makes every Attention node compute its softmax in fp32, whatever it takes."""
    for node in model.graph:
        if node.op_type == "Attention" and node.domain == "":
            node.attributes["softmax_precision"] = ir.AttrInt64(
                "softmax_precision", ir.DataType.FLOAT
            )


def _input_to_fp32(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(arg.float() for arg in args)


def _output_to(dtype: torch.dtype) -> Any:
    return lambda _module, _args, output: output.to(dtype)
