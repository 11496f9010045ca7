"""The decoder → one KV-cached graph fed by embeddings, and the embedding table beside it.

onnxruntime-genai's model builder makes the graph; its fused attention writes past and present into
one buffer. Weights go from the checkpoint's mapped files to the graph's data file one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime_genai.models  # noqa: F401  # makes the builder's own modules importable
import torch
from onnxruntime_genai.models.builders.base import Model as GenaiModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from ppllava_engines.bundle import DecoderSpec
from ppllava_engines.errors import IncompatibleError

from .decoder_quantization import Bits, Quantization
from .decoder_weights import Matrix
from .initializers import save_beside
from .precision import edge

GRAPH = "decoder/model.onnx"
PREFILL = "decoder/prefill.onnx"
EMBEDDING = "decoder/embedding.npy"
_ROWS = 4096  # of the embedding table, converted at a time
_LM_HEAD = "/lm_head/MatMul"
_BITS: dict[Quantization, Bits] = {"int8": 8, "int4": 4}
# GroupQueryAttention rotates queries and keys itself, but only heads of such a multiple.
_FUSED_ROTARY_MULTIPLE = 16
# What changes with the length of the input cannot be a table.
_ROTARY_TABLES = ("default", "linear", "llama3", "yarn")
_FLOATS = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


class _Builder(GenaiModel):  # type: ignore[misc]  # the builder has no types
    """The builder, given a model instead of a folder and a graph that needs no position ids.

    It is the builder of every architecture whose blocks are Llama's, biases allowed: what its
    subclasses for Llama and Qwen2 add is rotation, which is taken from the model itself here.
    """

    def __init__(
        self,
        language_model: LlamaForCausalLM | Qwen2ForCausalLM,
        dtype: torch.dtype,
        quantization: Quantization | None,
        release: Callable[[], None],
        *,
        is_prefill: bool = False,
    ) -> None:
        self._language_model = language_model
        self._is_prefill = is_prefill
        self._bits = _BITS[quantization] if quantization else None
        self._release = release
        config = copy.deepcopy(language_model.config)
        config.architectures = [type(language_model).__name__]
        # The builder pairs half precision with CUDA only. What it makes then are the same operators
        # as for CPU, all of which ONNX Runtime has or, for fp16, casts around there.
        provider = "cpu" if dtype == torch.float32 else "cuda"
        options = {"exclude_embeds": True, "prune_lm_head": True}
        super().__init__(config, _FLOATS[dtype], _FLOATS[dtype], provider, "", options)
        self.input_names.pop("position_ids", None)
        if dtype == torch.bfloat16:  # numpy has none; the logits leave the builder's graph as fp32
            self.input_types["inputs_embeds"] = ir.DataType.FLOAT

    def load_weights(self, _input_path: str) -> nn.Module:
        return self._language_model

    def has_lm_head(self, module: nn.Module) -> bool:
        # The builder takes any linear for it that has as many outputs as there are tokens.
        return module is self._language_model.lm_head

    def is_fused_rope_supported(self) -> bool:
        return bool(self.head_size % _FUSED_ROTARY_MULTIPLE == 0)

    def is_packed_matmul_supported(self) -> bool:
        return self.is_fused_rope_supported()  # only fused attention takes packed projections

    def make_rope_init(self, config: Any) -> None:
        kind = config.rope_parameters["rope_type"]
        if kind not in _ROTARY_TABLES:
            raise NotImplementedError(
                f"rope_type is {kind!r}, expected {', '.join(_ROTARY_TABLES)}"
            )

    def make_rotary_embedding_caches_from_scratch(self) -> tuple[Tensor, Tensor]:
        decoder = self._language_model.model
        rotary = type(decoder.rotary_emb)(decoder.config)
        positions = torch.arange(self.context_length)[None]
        cos, sin = rotary(torch.zeros(1), positions)
        return cos[0], sin[0]

    def make_preprocessing_nodes(self) -> None:
        super().make_preprocessing_nodes()
        if self.is_fused_rope_supported():
            return
        # Positions follow from the lengths: those of this call's tokens end the attention mask.
        base, constant = "/model/position_ids", "/model/constants/INT64"
        total = "/model/attn_mask_reformat/attn_mask_subgraph/Gather/output_0"
        int64 = ir.DataType.INT64
        self.make_shape(f"{base}/Shape", "inputs_embeds", shape=[3])
        length = [f"{base}/Shape/output_0", f"{constant}/1"]
        self.make_gather(f"{base}/Gather", length, dtype=int64, shape=[], axis=0)
        past = [total, f"{base}/Gather/output_0"]
        self.make_sub(f"{base}/Sub", past, dtype=int64, shape=[])
        span = [f"{base}/Sub/output_0", total, f"{constant}/1"]
        self.make_range(f"{base}/Range", span, dtype=int64, shape=["sequence_length"])
        row = [f"{base}/Range/output_0", f"{constant}/[0]"]
        self.make_unsqueeze(f"{base}/Unsqueeze", row, dtype=int64, shape=[1, "sequence_length"])
        self.input_names["position_ids"] = f"{base}/Unsqueeze/output_0"

    def make_layer(self, layer_id: int, layer: nn.Module) -> None:
        if layer_id == 0 and self.input_types["inputs_embeds"] != self.io_dtype:
            name = "/model/inputs_embeds/Cast"
            shape = self.make_hidden_state_shape()
            self.make_cast(name, "inputs_embeds", dtype=self.io_dtype, shape=shape)
            self.layernorm_attrs["root_input"] = f"{name}/output_0"
            self.layernorm_attrs["skip_input"] = f"{name}/output_0"
        super().make_layer(layer_id, layer)

    def make_packed_matmul_float_class(
        self, q_matmul: nn.Linear, k_matmul: nn.Linear, v_matmul: nn.Linear, **_: Any
    ) -> Matrix:
        return Matrix([part.weight for part in (q_matmul, k_matmul, v_matmul)], self._release)

    def make_matmul_float(
        self, matmul: nn.Linear | Matrix, name: str, root_input: str, **kwargs: Any
    ) -> str:
        matrix = matmul if isinstance(matmul, Matrix) else Matrix([matmul.weight], self._release)
        output = "logits" if kwargs.get("logits") else f"{name}/output_0"
        if self._is_prefill and name != _LM_HEAD:
            weights = matrix.columns(_weight_name(name))
            inputs = [root_input, *map(self._make_lazy, weights)]
            op, domain = "DynamicQuantizeMatMul", "com.microsoft"
            self.make_node(op, inputs=inputs, outputs=[output], name=name, domain=domain)
        else:
            inputs = [root_input, self._make_weight(matrix, name)]
            self.make_node("MatMul", inputs=inputs, outputs=[output], name=name)
        shape = self.make_hidden_state_shape(
            seq_dim=kwargs.get("seq_dim", "sequence_length"), last_dim=matrix.num_outputs
        )
        self.make_value(output, self.io_dtype, shape=shape)
        return name

    def _make_weight(self, matrix: Matrix, name: str) -> str:
        """Returns the value that holds the weights (K, N) of the node `name` as floats."""
        weight = _weight_name(name)
        # Its error goes straight into the logits, so the head never has less than eight bits.
        bits: Bits | None = 8 if self._bits and name == _LM_HEAD else self._bits
        block = matrix.block_size(bits) if bits else None
        if bits is None or block is None:
            self._make_lazy(matrix.floats(weight, self.io_dtype))
            return weight
        tensors = matrix.quantized(weight, bits, self.io_dtype)
        node = f"{name}/DequantizeLinear"
        self.make_node(
            "DequantizeLinear",
            inputs=[self._make_lazy(tensor) for tensor in tensors],
            outputs=[f"{node}/output_0"],
            name=node,
            axis=0,
            block_size=block,
        )
        shape = [matrix.num_inputs, matrix.num_outputs]
        self.make_value(f"{node}/output_0", self.io_dtype, shape=shape)
        return f"{node}/output_0"

    def _make_lazy(self, tensor: ir.LazyTensor) -> str:
        value = self.make_value(tensor.name, tensor.dtype, tensor.shape)
        value.const_value = tensor
        self.model.graph.register_initializer(value)
        return str(tensor.name)


def export_decoder(
    language_model: LlamaForCausalLM | Qwen2ForCausalLM,
    eos_token_ids: tuple[int, ...],
    dtype: torch.dtype,
    folder: Path,
    *,
    quantization: Quantization | None,
    prefill: bool = False,
    release: Callable[[], None],
) -> DecoderSpec:
    """Returns the spec of the decoder that it writes below the bundle's `folder`.

    inputs_embeds (1, n, D), attention_mask (1, total), past per layer → logits (1, 1, V) of the
    last position, present per layer. In a bfloat16 graph the embeddings and the logits are float32
    and the cache is bfloat16: to convert all of it on every step would cost more than attention.

    Args:
        language_model: Weights in any float type, mapped from the checkpoint.
        eos_token_ids: Any of them ends an answer.
        dtype: Type of the graph's floats; its norms and its softmax compute in fp32 inside.
        folder: The bundle.
        quantization: Of the linears' weights; None leaves them floats. A linear whose inputs no
            block divides stays float, and the head has no less than eight bits.
        prefill: Whether to write a second graph for prompts, of float32 only: the same, but that
            its linears, except the head, multiply int8 by int8. A run's inputs of a linear share
            one scale, so what begins a sequence must not be among them: decoders attend to their
            first tokens far more than to others, and some of those inputs are hundreds of times
            as large.
        release: Called after each slice of weights that was read, to let go of its pages.

    Raises:
        IncompatibleError: A feature of the decoder that the model builder does not know.
    """
    (folder / GRAPH).parent.mkdir(exist_ok=True)
    if any(kind != "full_attention" for kind in _layer_types(language_model.config)):
        raise IncompatibleError("decoder: use_sliding_window is set and only false is supported")
    try:
        builder = _Builder(language_model, dtype, quantization, release)
        builder.make_model("")
    except (NotImplementedError, KeyError) as error:
        raise IncompatibleError(f"decoder: no graph can be made of it: {error}") from error
    builder.save_model(str((folder / GRAPH).parent))
    if prefill:
        for_prompts = _Builder(language_model, dtype, quantization, release, is_prefill=True)
        for_prompts.make_model("")
        save_beside(for_prompts.model, folder / PREFILL, folder / GRAPH)
    edge_name = str(edge(dtype)).removeprefix("torch.")
    table = language_model.get_parameter("model.embed_tokens.weight")
    _write_table(table, folder / EMBEDDING, np.dtype(edge_name), release)
    return DecoderSpec(
        path=GRAPH,
        prefill=PREFILL if prefill else None,
        embedding=EMBEDDING,
        vocab_size=table.shape[0],
        width=table.shape[1],
        num_layers=builder.num_layers,
        num_kv_heads=builder.num_kv_heads,
        head_dim=builder.head_size,
        max_positions=builder.context_length,
        dtype=edge_name,
        eos_token_ids=eos_token_ids,
    )


def _weight_name(node: str) -> str:
    return node.removeprefix("/").replace("/", ".") + ".weight"


def _layer_types(config: Any) -> list[str]:
    return list(getattr(config, "layer_types", None) or [])


def _write_table(
    table: Tensor, path: Path, dtype: np.dtype[Any], release: Callable[[], None]
) -> None:
    """Writes a (V, D) table as .npy, some rows at a time: it may be mapped from a larger file."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": tuple(table.shape)}
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for rows in table.detach().split(_ROWS):
            stream.write(rows.float().numpy().astype(dtype, copy=False).tobytes())
            release()
