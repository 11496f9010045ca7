"""`clip_weight` → the text tower's config: from a folder, a known name or the tensors' shapes.

Only sizes are wanted: the weights themselves are in the checkpoint. Nothing is ever downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ppllava_engines.errors import DataError

from .modules.config import Family
from .modules.text import KEPT_POSITIONS, LEGACY_EOS
from .sections import Section, is_file

Shapes = Callable[[], Mapping[str, tuple[int, ...]]]

# Text towers of the published checkpoints, by the last component of the hub name.
_PRESETS: dict[Family, dict[str, dict[str, Any]]] = {
    "clip": {
        "clip-vit-large-patch14-336": {
            "projection_dim": 768,
            "text_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "eos_token_id": LEGACY_EOS,
            },
        },
    },
    "siglip": {
        "siglip-so400m-patch14-384": {
            "text_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
            },
        },
    },
}
_HEAD_DIM = 64  # in every published text tower but the one below
_SO400M_WIDTH, _SO400M_HEADS = 1152, 16
_PREFIX = "multi_modal_projector.clip_text_model."
_LAYERS = f"{_PREFIX}encoder.layers."


def clip_folder(config: Section, folder: Path) -> Path | None:
    """Returns the folder that `clip_weight` names, whether or not it is there; None without one.

    Raises:
        DataError: `clip_weight` is not a string.
    """
    name = config.get("clip_weight")
    if name is None:
        return None
    expected = "a folder or the name of a CLIP model"
    if not isinstance(name, str) or "\0" in name:
        raise config.wrong("clip_weight", name, expected)
    try:
        dangling = not (folder / name).exists() and (folder / name).is_symlink()
    except OSError as error:  # such as a name that is too long
        raise config.wrong("clip_weight", name, expected) from error
    if dangling:
        raise config.wrong("clip_weight", name, f"{expected}, and it links to what is not there")
    return folder / name  # an absolute name stands for itself


def clip_section(
    config: Section, clip: Path | None, family: Family, shapes: Shapes | None
) -> Section | None:
    """Returns the config of the CLIP or SigLIP model whose text tower the checkpoint holds.

    Args:
        config: The checkpoint's.
        clip: See `clip_folder`.
        family: What it must be a model of.
        shapes: Gives the tensors' shapes by name; called only when `clip` is neither a folder that
            is there nor a known name. Without it, None is returned then.

    Raises:
        DataError: The folder has no config.json or a malformed one, or the shapes do not tell.
    """
    preset = _PRESETS[family].get(clip.name) if clip else None
    if clip is not None and clip.is_dir():
        if is_file(clip / "config.json"):
            section = Section.read(clip / "config.json")
            if (kind := section.get("model_type", family)) != family:
                raise section.wrong("model_type", kind, f"{family!r}, as the checkpoint's towers")
            return section
        if preset is None and shapes is not None:
            raise DataError(f"{clip}: has no config.json: put {family}'s config.json there")
    if clip is not None and preset is not None:
        return Section(preset, clip.name)
    if shapes is None:
        return None
    remedy = f"put {family}'s config.json into {clip or 'a folder and name it by clip_weight'}"
    return Section(_from_shapes(shapes(), family, config.where, remedy), "tensor shapes")


def _from_shapes(
    shapes: Mapping[str, tuple[int, ...]], family: Family, where: str, remedy: str
) -> dict[str, Any]:
    """Returns the text tower's config as far as its tensors show it."""
    siglip = family == "siglip"
    output = f"{_PREFIX}head" if siglip else "multi_modal_projector.clip_text_projection"
    try:
        vocab_size, width = shapes[f"{_PREFIX}embeddings.token_embedding.weight"]
        intermediate, _ = shapes[f"{_LAYERS}0.mlp.fc1.weight"]
        projection, _ = shapes[f"{output}.weight"]
        extended = shapes.get(f"{_PREFIX}embeddings.position_embedding")
        rows, _ = extended or shapes[f"{_PREFIX}embeddings.position_embedding.weight"]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{where}: clip_weight names no folder here and the checkpoint has no {family} text "
            f"tower to tell its sizes from: {remedy}"
        ) from error
    if width % _HEAD_DIM:
        raise DataError(
            f"{where}: clip_weight names no folder here, and a text tower {width} channels wide "
            f"does not show its number of heads: {remedy}"
        )
    heads = _SO400M_HEADS if siglip and width == _SO400M_WIDTH else width // _HEAD_DIM
    layers = {
        name.removeprefix(_LAYERS).partition(".")[0] for name in shapes if name.startswith(_LAYERS)
    }
    text = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        # What `extended_positions` makes of it is as many rows again.
        "max_position_embeddings": (rows + 3 * KEPT_POSITIONS) // 4 if extended else rows,
    }
    if not siglip:
        text |= {"bos_token_id": vocab_size - 2, "eos_token_id": LEGACY_EOS}
    return {"projection_dim": projection, "text_config": text | {"projection_size": projection}}
