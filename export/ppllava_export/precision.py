"""Float modules → modules in half precision, with fp32 islands where that costs answers.

The modules are cast before they are traced, so that the tracer settles the type of every value.
Islands: layer norms, the normalisation of keys and question, and the softmax of attention. The
pool graph keeps its own (similarity, both softmaxes, pooling weights), see `pool_graph`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

from .modules.alignment import ClipProjector, SiglipProjector

M = TypeVar("M", bound=nn.Module)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def edge(dtype: torch.dtype) -> torch.dtype:
    """Returns the type of a graph's inputs and outputs: numpy has no bfloat16."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


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
        # F.normalize squares: fp16 overflows above 255 and loses what is below 0.008.
        elif isinstance(part, ClipProjector):
            part.clip_visual_projection.register_forward_hook(_output_to(torch.float32))
            part.clip_text_projection.register_forward_hook(_output_to(torch.float32))
        elif isinstance(part, SiglipProjector):
            part.clip_visual_head.register_forward_hook(_output_to(torch.float32))
            part.clip_text_model.register_forward_hook(_output_to(torch.float32))
    return module


def keep_softmax_fp32(model: ir.Model) -> None:
    """Makes every Attention node compute its softmax in fp32, whatever it takes."""
    for node in model.graph:
        if node.op_type == "Attention" and node.domain == "":
            node.attributes["softmax_precision"] = ir.AttrInt64(
                "softmax_precision", ir.DataType.FLOAT
            )


def widen(source: Path, target: Path) -> None:
    """Writes a bfloat16 graph once more, as one that computes in fp32; returns nothing.

    Its weights are those of the bfloat16 graph: a CPU without bfloat16 kernels shows with it what
    their rounding costs. No larger tensor than one is held.

    Args:
        source: A graph with its data beside it.
        target: The new graph; its data goes beside it.
    """
    model = ir.load(source)
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        nodes = list(graph.all_nodes())
        values = [*graph.inputs, *graph.initializers.values()]
        values += [output for node in nodes for output in node.outputs]
        for value in values:
            if value.dtype == narrow:
                value.dtype = wide
            if value.const_value is not None and value.const_value.dtype == narrow:
                value.const_value = _widened(value.const_value)
        for node in nodes:
            for name, attribute in list(node.attributes.items()):
                if node.op_type == "Cast" and name == "to" and attribute.as_int() == narrow:
                    node.attributes[name] = ir.AttrInt64(name, wide)
                elif attribute.type == ir.AttributeType.TENSOR:
                    tensor = attribute.as_tensor()
                    if tensor.dtype == narrow:
                        node.attributes[name] = ir.AttrTensor(name, _widened(tensor))
    target.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, target, external_data=f"{target.name}.data")


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def make() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)

    return ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _input_to_fp32(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(arg.float() for arg in args)


def _output_to(dtype: torch.dtype) -> Any:
    return lambda _module, _args, output: output.to(dtype)
