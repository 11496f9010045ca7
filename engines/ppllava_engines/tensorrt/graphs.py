"""A bundle's graphs → what TensorRT 10.3 to 11 and TensorRT-RTX take: one lowering for all.

Opset 20 (21 only for weights quantized in blocks), standard operators only, except for the pool
node where a plugin runs it. No weight is read: the lowered graph refers to the bundle's own data.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ppllava_engines.bundle import Bundle, GraphSpec, TensorSpec
from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    NotFoundError,
    StorageError,
    UnavailableError,
    UsageError,
)
from ppllava_engines.manifest import Axes
from ppllava_engines.tensorrt.attention import Writer, lower_attention
from ppllava_engines.tensorrt.decoder_graph import lower_decoder

if TYPE_CHECKING:
    import onnx_ir as ir

PoolNode = Literal["body", "attributes", "inputs"]
GRAPHS = ("vision", "text", "pool", "decoder")
OPSET = 20
BLOCKS_OPSET = 21  # the first with a scale per block of a weight
DOMAIN = "ppllava"
OP_TYPE = "StridedWeightedPool"
_IR_VERSION = 10  # the newest that TensorRT 10.3 reads
_AXES = ("kernel", "stride")


def write_graph(
    bundle: Bundle,
    name: str,
    folder: Path,
    *,
    pool_node: PoolNode = "body",
    kernel: Axes | None = None,
    stride: Axes | None = None,
) -> GraphSpec:
    """The spec of the graph `name` as TensorRT takes it, written to `folder`/`name`.onnx.

    vision, text: inputs and outputs are those of the bundle's own graph (axes T and n).
    pool: keys, hidden, text_embed [, kernel, stride] → pooled ([N],D), relevance ([T],h,w).
    decoder: see `decoder_graph`; what it takes and makes of the cache is the caller's to keep.

    Data that the bundle keeps in a file of its own is not copied: a hard link to it is made in
    `folder`, which TensorRT and ONNX Runtime both follow, or a symbolic one where the file system
    cannot, which only TensorRT follows. onnx's own loader refuses either, and while a hard link is
    there refuses the bundle's graph too: remove `folder` when the graph has been read.

    Args:
        bundle: What the graph belongs to.
        name: One of GRAPHS.
        folder: Where it goes; it is made.
        pool_node: What becomes of the pool graph's own operator. "body": plain operators with
            kernel and stride baked in. "attributes": the plugin's node with both as attributes.
            "inputs": the plugin's node with both as int64 (3) inputs of the graph, from parser
            10.1 on.
        kernel: Extents of a window over (T,h,w), for the pool graph where it is baked in; None is
            the model's own.
        stride: Steps between windows, likewise.

    Raises:
        DataError: The graph's file cannot be read.
        IncompatibleError: The graph has an operator or a feature that has no lowering.
        NotFoundError: The bundle has no such graph.
        StorageError: The graph cannot be written.
        UnavailableError: onnx_ir is missing.
        UsageError: Windows that fit no grid of the model, windows where none are baked in, or a
            folder that holds the bundle's own graph.
    """
    manifest = bundle.manifest
    paths = {known: graph.path for known, graph in manifest.graphs.items()}
    paths["decoder"] = manifest.decoder.path
    if name not in paths:
        raise NotFoundError(
            f"bundle {bundle.path}: no graph {name!r}, there are {', '.join(sorted(paths))}"
        )
    baked = name == "pool" and pool_node != "inputs"
    if not baked and (kernel is not None or stride is not None):
        raise UsageError(f"graph {name}: kernel and stride are not baked in here: leave them out")
    source = bundle.file(paths[name])
    if folder.resolve() == source.parent.resolve():
        raise UsageError(f"graph {name}: {folder} is the bundle's own, give another folder")
    model = _load(source)
    if name == "pool":
        size = (manifest.model.max_frames, *manifest.model.grid)
        windows = kernel or manifest.model.kernel, stride or manifest.model.stride
        _refuse_windows(*windows, size)
        _lower_pool(model, pool_node, *windows)
    elif name == "decoder":
        lower_decoder(model.graph, manifest.decoder)
    else:
        lower_attention(model.graph)
        _widen_convolutions(model.graph)
    _tidy(model)
    return _save(model, name, source.parent, folder)


def _load(path: Path) -> ir.Model:
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise UnavailableError(
            "TensorRT takes graphs through onnx_ir, which is not installed: "
            "pip install 'ppllava-edge[tensorrt]'"
        ) from error
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's share no base class
        raise DataError(f"{path}: it is no graph, export the checkpoint again: {error}") from error


def _refuse_windows(kernel: Axes, stride: Axes, size: Axes) -> None:
    fits = all(1 <= extent <= limit for extent, limit in zip(kernel, size, strict=True))
    if not fits or min(stride) < 1:
        raise UsageError(
            f"pool: kernel {kernel} and stride {stride} have no window in {size} tokens, expected "
            "a kernel between 1 and that and a stride of 1 or more"
        )


def _lower_pool(model: ir.Model, pool_node: PoolNode, kernel: Axes, stride: Axes) -> None:
    import onnx_ir as ir
    from onnx_ir.passes import common as passes

    graph = model.graph
    (node,) = (node for node in graph if node.domain == DOMAIN)
    if pool_node != "inputs":
        graph.inputs[:] = [value for value in graph.inputs if value.name not in _AXES]
    if pool_node == "body":
        for name, index, values in zip(_AXES, (2, 3), (kernel, stride), strict=True):
            tensor = ir.tensor(list(values), ir.DataType.INT64, name=name)
            baked = ir.Value(
                name=name, shape=ir.Shape([3]), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.register_initializer(baked)
            node.replace_input_with(index, baked)
        passes.InlinePass()(model)
        _settle_casts(graph)
        return
    model.functions.clear()
    if pool_node == "attributes":
        node.resize_inputs(2)
        node.attributes["kernel"] = ir.AttrInt64s("kernel", kernel)
        node.attributes["stride"] = ir.AttrInt64s("stride", stride)
    else:
        # Once for the kernel, which reads them on the device; once more as shape inputs, whose
        # values TensorRT shows to a plugin only to know how many tokens come out.
        node.resize_inputs(6)
        for index in (2, 3):
            node.replace_input_with(index + 2, node.inputs[index])
        name = "tensorrt_plugin_shape_input_indices"
        node.attributes[name] = ir.AttrInt64s(name, (4, 5))
    node.attributes["plugin_version"] = ir.AttrString("plugin_version", "1")
    node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)


def _settle_casts(graph: ir.Graph) -> None:
    """Makes each CastLike a Cast to the type of the graph's data; returns nothing."""
    import onnx_ir as ir

    (hidden,) = (value for value in graph.inputs if value.name == "hidden")
    assert hidden.dtype is not None
    for node in list(graph):
        if node.op_type == "CastLike":
            cast = ir.node("Cast", node.inputs[:1], {"to": hidden.dtype}, name=node.name)
            graph.insert_before(node, cast)
            node.outputs[0].replace_all_uses_with(cast.outputs[0])
            graph.remove(node, safe=True)


def _widen_convolutions(graph: ir.Graph) -> None:
    """Makes the bfloat16 convolutions compute in fp32: opset 20 has none; returns nothing."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type == "Conv" and node.outputs[0].dtype == ir.DataType.BFLOAT16:
            wide = Writer(graph, node)
            for index, value in enumerate(node.inputs):
                if value is not None:
                    cast = wide.cast(value, ir.DataType.BFLOAT16, ir.DataType.FLOAT)
                    node.replace_input_with(index, cast)
            (output,) = node.outputs
            narrow = ir.node(
                "Cast", [output], {"to": ir.DataType.BFLOAT16}, name=f"{node.name}/Cast"
            )
            output.replace_all_uses_with(narrow.outputs[0])
            narrow.replace_input_with(0, output)
            graph.insert_after(node, narrow)
            output.type = ir.TensorType(ir.DataType.FLOAT)


def _tidy(model: ir.Model) -> None:
    """Removes what leads nowhere and settles the versions; returns nothing.

    Raises:
        IncompatibleError: An operator that is not a standard one is left.
    """
    from onnx_ir.passes import common as passes

    graph = model.graph
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveUnusedNodesPass()(model)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    unknown = sorted({f"{n.domain}.{n.op_type}" for n in graph if n.domain not in ("", DOMAIN)})
    if unknown:
        raise IncompatibleError(
            f"graph {graph.name}: {', '.join(unknown)} has no lowering for TensorRT: use a newer "
            "release"
        )
    in_blocks = any("block_size" in node.attributes for node in graph)
    model.ir_version = _IR_VERSION
    graph.opset_imports.clear()
    graph.opset_imports[""] = BLOCKS_OPSET if in_blocks else OPSET
    if any(node.domain == DOMAIN for node in graph):
        graph.opset_imports[DOMAIN] = 1
    for node in graph:
        node.version = None


def _save(model: ir.Model, name: str, source: Path, folder: Path) -> GraphSpec:
    import onnx_ir as ir

    path = folder / f"{name}.onnx"
    tensors = [value.const_value for value in model.graph.initializers.values()]
    external = {t.location for t in tensors if isinstance(t, ir.ExternalTensor)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        ir.save(model, path)
        for location in external:
            _link((source / location).resolve(), folder / location)
    except OSError as error:
        raise StorageError(f"graph {name}: {path} cannot be written: {error}") from error
    graph = model.graph
    inputs, outputs = (tuple(map(_spec, values)) for values in (graph.inputs, graph.outputs))
    return GraphSpec(path.name, inputs, outputs)


def _link(data: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another file system, or somebody else's file
        link.hardlink_to(data)
        return
    link.symlink_to(data)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    axes = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape)
    return TensorSpec(value.name, str(value.dtype.numpy()), axes)
