"""The Llama decoder → one KV-cached graph fed by embeddings, and the embedding table beside it.

onnxruntime-genai's model builder makes the graph; its fused attention writes past and present into
one buffer. Weights go from the checkpoint's mapped files to the graph's data file one at a time.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime_genai.models  # noqa: F401  # makes the builder's own modules importable
import torch
from numpy.lib.format import open_memmap
from onnxruntime_genai.models.builders.llama import LlamaModel
from transformers import LlamaForCausalLM

from ppllava_engines.bundle import DecoderSpec
from ppllava_engines.errors import IncompatibleError

from .modules.config import ModelConfig

GRAPH = "decoder/model.onnx"
EMBEDDING = "decoder/embedding.npy"
_ROWS = 4096  # of the embedding table, converted at a time
# GroupQueryAttention rotates queries and keys itself, but only heads of such a multiple.
_FUSED_ROTARY_MULTIPLE = 16


class _Builder(LlamaModel):  # type: ignore[misc]  # the builder has no types
    """The builder, given a model instead of a folder and a graph that needs no position ids."""

    def __init__(self, language_model: LlamaForCausalLM, dtype: torch.dtype) -> None:
        self._language_model = language_model
        config = copy.deepcopy(language_model.config)
        config.architectures = [type(language_model).__name__]
        fp16 = dtype == torch.float16
        float_type = ir.DataType.FLOAT16 if fp16 else ir.DataType.FLOAT
        # The builder pairs fp16 with CUDA only. What it makes then are the same operators as for
        # CPU, all of which ONNX Runtime has or casts around there.
        provider = "cuda" if fp16 else "cpu"
        options = {"exclude_embeds": True, "prune_lm_head": True}
        super().__init__(config, float_type, float_type, provider, "", options)
        self.input_names.pop("position_ids", None)

    def load_weights(self, _input_path: str) -> LlamaForCausalLM:
        return self._language_model

    def is_fused_rope_supported(self) -> bool:
        return bool(self.head_size % _FUSED_ROTARY_MULTIPLE == 0)

    def is_packed_matmul_supported(self) -> bool:
        return self.is_fused_rope_supported()  # only fused attention takes packed projections

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


def export_decoder(
    language_model: LlamaForCausalLM, config: ModelConfig, dtype: torch.dtype, folder: Path
) -> DecoderSpec:
    """Returns the spec of the decoder that it writes below the bundle's `folder`.

    inputs_embeds (1, n, D), attention_mask (1, total), past per layer → logits (1, 1, V) of the
    last position, present per layer.

    Args:
        language_model: Weights in any float type, mapped from the checkpoint.
        config: The checkpoint's.
        dtype: Type of the graph's floats; its norms and its softmax compute in fp32 inside.
        folder: The bundle.

    Raises:
        IncompatibleError: A feature of the decoder that the model builder does not know.
    """
    (folder / GRAPH).parent.mkdir(exist_ok=True)
    try:
        builder = _Builder(language_model, dtype)
        builder.make_model("")
    except (NotImplementedError, KeyError) as error:
        raise IncompatibleError(f"decoder: no graph can be made of it: {error}") from error
    builder.save_model(str((folder / GRAPH).parent))
    table = language_model.get_parameter("model.embed_tokens.weight")
    _write_table(table, folder / EMBEDDING, np.dtype(str(dtype).removeprefix("torch.")))
    decoder: dict[str, Any] = config.decoder
    return DecoderSpec(
        path=GRAPH,
        embedding=EMBEDDING,
        vocab_size=table.shape[0],
        width=table.shape[1],
        num_layers=decoder["num_hidden_layers"],
        num_kv_heads=decoder["num_key_value_heads"],
        head_dim=decoder["head_dim"],
        max_positions=decoder["max_position_embeddings"],
        dtype=str(dtype).removeprefix("torch."),
        eos_token_ids=config.eos_token_ids,
    )


def _write_table(table: torch.Tensor, path: Path, dtype: np.dtype[Any]) -> None:
    """Writes a (V, D) table as .npy, some rows at a time: it may be mapped from a larger file."""
    out = open_memmap(path, mode="w+", dtype=dtype, shape=tuple(table.shape))
    for start in range(0, table.shape[0], _ROWS):
        rows = table[start : start + _ROWS].detach()
        out[start : start + _ROWS] = rows.float().numpy()
    out.flush()
