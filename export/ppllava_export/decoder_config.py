"""`text_config` and generation_config.json → what the decoder is built from, checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ppllava_engines.errors import DataError

from .config_defaults import MAX_LAYERS
from .sections import Section

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
# Not part of the model: the type is the tensors' own, and nothing is ever padded.
_LEFT_OUT = ("dtype", "torch_dtype", "pad_token_id", "layer_types")


def read_decoder_config(section: Section, kind: str) -> dict[str, Any]:
    """Returns the config of a Llama or Qwen2 as `transformers` takes it, defaults filled in.

    Args:
        section: `text_config`.
        kind: `model_type` where the section states none.

    Raises:
        DataError: `transformers` does not take it, or its sizes do not fit one another.
    """
    from transformers import LlamaConfig, Qwen2Config

    from .modules.model import language_model

    kind = section.get("model_type", kind)
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
    given = {key: value for key, value in section.values.items() if key not in _LEFT_OUT}
    try:
        resolved = config_class(**given).to_dict()
    except Exception as error:  # transformers has a class of its own for each field it dislikes
        raise _not_a_decoder(section, kind, error) from error
    decoder = {key: value for key, value in resolved.items() if key not in _LEFT_OUT}
    sizes = Section(decoder, section.where)
    for key in _SIZES:
        sizes.integer(key)
    sizes.integer("num_hidden_layers", most=MAX_LAYERS)
    heads, groups = decoder["num_attention_heads"], decoder["num_key_value_heads"]
    if heads % groups:
        raise sizes.wrong("num_key_value_heads", groups, f"a divisor of {heads}")
    if decoder.get("head_dim") is None and decoder["hidden_size"] % heads:
        raise sizes.wrong("hidden_size", decoder["hidden_size"], f"a multiple of {heads}")
    try:  # one layer, without memory: says what no field alone does, such as an unknown rope_type
        with torch.device("meta"):
            language_model({**decoder, "num_hidden_layers": 1})
    except Exception as error:
        raise _not_a_decoder(section, kind, error) from error
    return decoder


def read_eos_token_ids(folder: Path, decoder: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ids that end an answer; none when neither file states any.

    Raises:
        DataError: They are not ids of the decoder's vocabulary.
    """
    generation = Section.read_optional(folder / "generation_config.json")
    value = generation.get("eos_token_id", decoder.get("eos_token_id"))
    if value is None:
        return ()
    ids, vocab_size = value if isinstance(value, list) else [value], decoder["vocab_size"]
    if not ids or any(type(item) is not int or not 0 <= item < vocab_size for item in ids):
        raise generation.wrong("eos_token_id", value, f"ids below {vocab_size}")
    return tuple(ids)


def _not_a_decoder(section: Section, kind: str, error: Exception) -> DataError:
    name = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
    return DataError(f"{section.where}: not a {name} config: {' '.join(str(error).split())}")
