"""Graphs as TensorRT takes them: made, checked, compared, and compiled ahead of time."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle, GraphSpec
from ppllava_engines.tensorrt.graphs import write_graph

Array = NDArray[Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Sizes = tuple[int, int, int]

# What both parsers import, of TensorRT 10.3 and of TensorRT-RTX.
OPERATORS = """
    Add ArgMax Cast Clip Concat Conv DequantizeLinear Div Equal Expand Flatten Gather GatherElements
    Gelu Gemm GreaterOrEqual LayerNormalization Less MatMul Max Min Mod Mul QuantizeLinear Range
    ReduceL2 ReduceMean ReduceProd ReduceSum Reshape Shape Sigmoid Slice Softmax Split Sqrt Squeeze
    Sub Transpose Unsqueeze Where"""
# Two roundings meet in a product, and some 30 products follow one another.
TOLERANCE = {"fp32": 30 * 2 * 2.0**-24, "fp16": 30 * 2 * 2.0**-11}
BUILD = """
import json, sys
import tensorrt_rtx as trt
path, profiles = sys.argv[1], json.loads(sys.argv[2])
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
network = builder.create_network(flag)
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(path):
    sys.exit("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM86, 0)
for shapes in profiles:
    profile = builder.create_optimization_profile()
    for name, sizes in shapes.items():
        profile.set_shape(name, *sizes)
    config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
print(plan.nbytes if plan else 0)
"""


def lower(bundle: Bundle, name: str, folder: Path, **options: Any) -> tuple[Path, GraphSpec]:
    """The file and the spec of a lowered graph."""
    spec = write_graph(bundle, name, folder, **options)
    return folder / spec.path, spec


def check(path: Path, spec: GraphSpec, scratch: Path, *, opset: int = 20) -> onnx.ModelProto:
    """The graph, which is what the spec says, valid, and of operators that are known."""
    shutil.copytree(path.parent, scratch)  # the checker takes links for attacks
    onnx.checker.check_model(str(scratch / path.name), full_check=True)
    model = onnx.load(str(scratch / path.name))
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    nodes = [node for node in model.graph.node if node.domain == ""]
    assert {node.op_type for node in nodes} <= set(OPERATORS.split())
    assert opsets.pop("") == opset
    assert set(opsets) == {node.domain for node in model.graph.node} - {""}
    assert model.ir_version <= 10
    assert not model.functions
    for values, specs in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        assert [value.name for value in values] == [entry.name for entry in specs]
        for value, entry in zip(values, specs, strict=True):
            dims = value.type.tensor_type.shape.dim
            assert tuple(dim.dim_param or dim.dim_value for dim in dims) == entry.shape
            element = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            assert str(element) == entry.dtype
    return model


def error(got: Array, expected: Array) -> float:
    """The largest error of finite arrays as a share of the largest magnitude."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    wide = expected.astype(np.float32)
    return float(np.abs(got.astype(np.float32) - wide).max() / np.abs(wide).max())


def compiles(run_with: Run, path: Path, spec: GraphSpec, *profiles: dict[str, Sizes]) -> None:
    """Nothing, when TensorRT-RTX makes a plan whose axes have these least, usual, most sizes."""
    shapes = [
        {
            entry.name: [
                [sizes[axis][index] if isinstance(axis, str) else axis for axis in entry.shape]
                for index in range(3)
            ]
            for entry in spec.inputs
            if any(isinstance(axis, str) for axis in entry.shape)
        }
        for sizes in profiles
    ]
    done = run_with("rtx", "-c", BUILD, path, json.dumps(shapes))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0, done.stderr
