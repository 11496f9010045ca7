"""`text_config` and generation_config.json → what the decoder is built from, checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ppllava_engines.errors import DataError, IncompatibleError

from .config_defaults import MAX_LAYERS
from .sections import Section, shown

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# Read by the libraries wherever it is set, though Qwen2's own class does not have it.
_HEAD_DIM = "head_dim"
# Not part of the model: nothing is ever padded, and the cache is always used.
_LEFT_OUT = ("pad_token_id", "layer_types", "use_cache")
# Angles are looked up, so the graph holds a row per position: at this many, some 500 MB.
_MOST_POSITIONS = 1 << 20
# A rotation's fields; today's files have them under the first name, those before 5.0 the second.
_ROTATIONS = ("rope_parameters", "rope_scaling")
_ROTATION = (
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "partial_rotary_factor",
)  # fmt: skip


def read_decoder_config(section: Section, kind: str) -> dict[str, Any]:
    """Returns the config of a Llama or Qwen2 as `transformers` takes it, defaults filled in.

    Args:
        section: `text_config`.
        kind: `model_type` where the section states none.

    Only what the model's own config class has is in it: `transformers` and the model builder look
    for the fields of other models as well, each for those it knows.

    Raises:
        DataError: `transformers` does not take it, or its sizes do not fit one another.
        IncompatibleError: An activation or a rotation that is not exported.
    """
    from transformers import LlamaConfig, Qwen2Config

    from .modules.model import language_model

    kind = section.get("model_type", kind)
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
    own = {*inspect.get_annotations(config_class), _HEAD_DIM} - {*_LEFT_OUT}
    given = {key: value for key, value in section.values.items() if key in own}
    given |= _rotation(section)
    _check_activation(section)
    try:
        resolved = config_class(**given).to_dict()
    except Exception as error:  # transformers has a class of its own for each field it dislikes
        raise _not_a_decoder(section, kind, error) from error
    decoder = {key: value for key, value in resolved.items() if key in {*own, "model_type"}}
    sizes = Section(decoder, section.where)
    for key in _SIZES:
        sizes.integer(key)
    sizes.integer("num_hidden_layers", most=MAX_LAYERS)
    sizes.number("rms_norm_eps", 1e-6)
    positions = sizes.integer("max_position_embeddings")
    if positions > _MOST_POSITIONS:
        expected = f"at most {_MOST_POSITIONS}, as the graph holds the angles of every position"
        raise sizes.wrong("max_position_embeddings", positions, expected)
    heads, groups = decoder["num_attention_heads"], decoder["num_key_value_heads"]
    if heads % groups:
        raise sizes.wrong("num_key_value_heads", groups, f"a divisor of {heads}")
    if decoder.get(_HEAD_DIM) is None and decoder["hidden_size"] % heads:
        raise sizes.wrong("hidden_size", decoder["hidden_size"], f"a multiple of {heads}")
    head_dim = sizes.integer(_HEAD_DIM, decoder["hidden_size"] // heads)
    if head_dim % 2:
        raise sizes.wrong(_HEAD_DIM, head_dim, "even, as channels turn in pairs")
    try:  # one layer, without memory: says what no field alone does, such as an unknown rope_type
        with torch.device("meta"):
            language_model({**decoder, "num_hidden_layers": 1})
    except Exception as error:
        raise _not_a_decoder(section, kind, error) from error
    return decoder


def read_eos_token_ids(
    folder: Path, config: Section, decoder: Mapping[str, Any]
) -> tuple[int, ...]:
    """Returns the ids that end an answer; none when neither file states any.

    Args:
        folder: May hold generation_config.json, whose word counts most.
        config: config.json.
        decoder: Its `text_config`, defaults filled in.

    Raises:
        DataError: They are not ids of the decoder's vocabulary.
    """
    section = Section.read_optional(folder / "generation_config.json")
    if section.get("eos_token_id") is None:
        section = Section(decoder, f"{config.where}: text_config")
    value = section.get("eos_token_id")
    if value is None:
        return ()
    ids, vocab_size = value if isinstance(value, list) else [value], decoder["vocab_size"]
    if not ids or any(type(item) is not int or not 0 <= item < vocab_size for item in ids):
        raise section.wrong("eos_token_id", value, f"ids below {vocab_size}")
    return tuple(ids)


def _rotation(section: Section) -> dict[str, Any]:
    """Returns the fields that say how positions turn channels, as far as they are given.

    Raises:
        DataError: One is not of its type.
        IncompatibleError: A rotation of some channels only, or one with fields not known here.
    """
    rotations = {key: section.section(key) for key in _ROTATIONS if section.section(key).values}
    for rotation in (section, *rotations.values()):
        rotation.number("rope_theta", 1.0)
        if (share := rotation.number("partial_rotary_factor", 1.0)) != 1:
            raise IncompatibleError(
                f"{rotation.where}: partial_rotary_factor is {share:g} and only 1 is supported"
            )
    fields: dict[str, Any] = {}
    for name, rotation in rotations.items():
        rotation.number("factor", 1.0)
        fields[name] = rotation.values
        unknown = [key for key in rotation.values if key not in _ROTATION]
        if unknown:
            raise IncompatibleError(
                f"{rotation.where}: {shown(unknown[0])} is not known here, expected a rotation by "
                f"{', '.join(_ROTATION)}"
            )
    if (theta := section.get("rope_theta")) is not None:
        fields["rope_theta"] = theta
    return fields


def _check_activation(section: Section) -> None:
    """Raises what is to be said of an activation that `transformers` does not have."""
    from transformers.activations import ACT2FN

    act = section.get("hidden_act", "silu")
    if not isinstance(act, str):
        raise section.wrong("hidden_act", act, "an activation's name")
    if act not in ACT2FN:
        raise IncompatibleError(
            f"{section.where}: hidden_act is {shown(act)}, which is no activation known here"
        )


def _not_a_decoder(section: Section, kind: str, error: Exception) -> DataError:
    name = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
    return DataError(f"{section.where}: not a {name} config: {' '.join(str(error).split())}")
