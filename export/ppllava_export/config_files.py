"""config.json and its neighbours → ModelConfig, typed, with every refusal named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppllava_engines.errors import DataError, IncompatibleError, NotFoundError

from .modules.config import EncoderConfig, ModelConfig, TextConfig, VisionConfig, Window
from .modules.pooling import window_from_output
from .sections import Section

Shapes = Callable[[], Mapping[str, tuple[int, ...]]]

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_LEGACY_EOS = 2
_PUBLISHED_FRAMES = 32

# What CLIP's config classes leave out of a config.json because it is their default.
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
# Text towers of the published checkpoints, by the last component of the hub name in clip_weight.
_CLIP_PRESETS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        "projection_dim": 768,
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "eos_token_id": _LEGACY_EOS,
        },
    },
}
_CLIP_HEAD_DIM = 64  # in every published CLIP text tower
_CLIP_PREFIX = "multi_modal_projector.clip_text_model."

# Field → the one value that this release exports, and what an absent field means.
_SUPPORTED: dict[str, tuple[Any, Any]] = {
    "model_type": ("llava_next", "llava_next"),
    "qwen": (False, False),
    "valuew_plus": (False, False),
    "btadapter": (False, False),
    "pooling": ("ppllava", None),
    "projector_hidden_act": ("gelu", "gelu"),
    "vision_feature_select_strategy": ("default", "default"),
    "vision_config.model_type": ("clip_vision_model", "clip_vision_model"),
    "vision_config.num_channels": (3, 3),
    "text_config.model_type": ("llama", "llama"),
}
# Fields that stand for code or weights this exporter never loads, at any level of the config.
_REFUSED = ("auto_map", "quantization_config")


@dataclass(frozen=True)
class CheckpointFiles:
    """What a checkpoint says besides its model: where its parts are, how it is used.

    Attributes:
        folder: The checkpoint.
        clip: The folder that `clip_weight` names, which need not be there when that is the name of
            a model on a hub; None without `clip_weight`.
        num_frames: Frames to take of a video unless told otherwise: `num_frames` of
            preprocessor_config.json, else what the published checkpoints were trained with.
    """

    folder: Path
    clip: Path | None
    num_frames: int


def read_model_config(folder: Path, shapes: Shapes) -> tuple[ModelConfig, CheckpointFiles]:
    """Returns what the checkpoint in `folder` says of its model, and where its parts are.

    Args:
        folder: Holds config.json and maybe generation_config.json, preprocessor_config.json.
        shapes: Gives the tensors' shapes by name; called only when `clip_weight` names neither a
            folder that is there nor a known tower.

    Raises:
        DataError: Malformed JSON, or a field that is missing or not what it must be.
        IncompatibleError: A variant that this release does not export; names every reason.
        NotFoundError: No config.json in `folder`, or none in the folder `clip_weight`.
    """
    config = Section.read(folder / "config.json")
    _refuse_unsupported(config)
    clip_folder = _clip_folder(config, folder)
    vision = _vision_config(config.section("vision_config"))
    clip = _clip_section(config, clip_folder, shapes)
    decoder = _decoder_config(config.section("text_config"))
    preprocessor = _optional(folder / "preprocessor_config.json")
    max_frames = config.integer("max_T", 64)
    num_frames = min(preprocessor.integer("num_frames", _PUBLISHED_FRAMES), max_frames)
    kernel, stride = _pooling_window(config, vision.grid, num_frames)
    if any(k > size for k, size in zip(kernel, (max_frames, *vision.grid), strict=True)):
        raise config.wrong("pooling_kernel", list(kernel), f"at most {[max_frames, *vision.grid]}")
    if (shape := config.get("frame_shape", list(vision.grid))) != list(vision.grid):
        raise config.wrong("frame_shape", shape, f"{list(vision.grid)}, the vision tower's grid")
    feature_layer = config.get("vision_feature_layer", -2)
    num_hidden = vision.encoder.num_hidden_layers + 1
    if type(feature_layer) is not int or not -num_hidden <= feature_layer < num_hidden:
        raise config.wrong("vision_feature_layer", feature_layer, f"one of {num_hidden} layers")
    model = ModelConfig(
        name=folder.resolve().name,
        vision=vision,
        text=_text_config(clip.section("text_config"), extended=config.flag("extend_clip")),
        projection_dim=clip.integer("projection_dim", 512),
        decoder=decoder,
        feature_layer=feature_layer,
        grid=vision.grid,
        kernel=kernel,
        stride=stride,
        image_kernel=config.triple("image_pooling_kernel", kernel, int),
        image_stride=config.triple("image_pooling_stride", stride, int),
        temperature=config.number("pooling_temp", 0.01),
        max_frames=max_frames,
        image_token_index=_below(config, "image_token_index", decoder["vocab_size"]),
        image_mean=preprocessor.triple("image_mean", _CLIP_MEAN, float),
        image_std=preprocessor.triple("image_std", _CLIP_STD, float),
        eos_token_ids=_eos_token_ids(folder, decoder),
    )
    return model, CheckpointFiles(folder, clip_folder, num_frames)


def text_token_ids(text: TextConfig) -> tuple[int, int]:
    """Returns the (begin, end) ids that belong around a question for the text tower.

    OpenAI's own configs state 0 and 2, which are not the ids in use: those are the two highest.
    """
    if text.eos_token_id == _LEGACY_EOS:
        return text.vocab_size - 2, text.vocab_size - 1
    return text.bos_token_id, text.eos_token_id


def _refuse_unsupported(config: Section) -> None:
    reasons = [
        f"{key} is {value!r} and only {supported!r} is supported"
        for key, (supported, absent) in _SUPPORTED.items()
        if (value := config.get(key, absent)) != supported or type(value) is not type(supported)
    ]
    for prefix in ("", "vision_config.", "text_config."):
        reasons += [
            f"{prefix}{key} is set and never followed"
            for key in _REFUSED
            if config.get(prefix + key) is not None
        ]
    if isinstance(config.get("vision_feature_layer"), list):
        reasons.append("vision_feature_layer is a list and only one layer is supported")
    if reasons:
        raise IncompatibleError(f"{config.where}: {'; '.join(reasons)}")


def _clip_folder(config: Section, folder: Path) -> Path | None:
    name = config.get("clip_weight")
    if name is None:
        return None
    if not isinstance(name, str):
        raise config.wrong("clip_weight", name, "a folder or the name of a CLIP model")
    return folder / name  # an absolute name stands for itself


def _clip_section(config: Section, clip: Path | None, shapes: Shapes) -> Section:
    preset = _CLIP_PRESETS.get(clip.name) if clip else None
    if clip is not None and clip.is_dir() and not (preset and not (clip / "config.json").exists()):
        section = Section.read(clip / "config.json")
        if (kind := section.get("model_type", "clip")) != "clip":
            raise IncompatibleError(f"{section.where}: model_type is {kind!r}, expected 'clip'")
        return section
    if clip is not None and preset is not None:
        return Section(preset, clip.name)
    remedy = f"put CLIP's config.json into {clip or 'a folder and name it by clip_weight'}"
    return Section(_clip_from_shapes(shapes(), config.where, remedy), "tensor shapes")


def _clip_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], where: str, remedy: str
) -> dict[str, Any]:
    """Returns the text tower's config as far as its tensors show it: heads are of 64 channels."""
    try:
        vocab_size, width = shapes[f"{_CLIP_PREFIX}embeddings.token_embedding.weight"]
        intermediate = shapes[f"{_CLIP_PREFIX}encoder.layers.0.mlp.fc1.weight"][0]
        projection = shapes["multi_modal_projector.clip_text_projection.weight"][0]
    except (KeyError, ValueError) as error:
        raise NotFoundError(
            f"{where}: clip_weight names no folder here and the checkpoint has no CLIP text tower "
            f"to tell its sizes from: {remedy}"
        ) from error
    if width % _CLIP_HEAD_DIM:
        raise NotFoundError(
            f"{where}: clip_weight names no folder here, and a text tower {width} channels wide "
            f"does not show its number of heads: {remedy}"
        )
    table = f"{_CLIP_PREFIX}embeddings.position_embedding"
    rows = shapes[table][0] if table in shapes else shapes.get(f"{table}.weight", (77,))[0]
    layers = {
        name.removeprefix(f"{_CLIP_PREFIX}encoder.layers.").partition(".")[0]
        for name in shapes
        if name.startswith(f"{_CLIP_PREFIX}encoder.layers.")
    }
    return {
        "projection_dim": projection,
        "text_config": {
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": len(layers),
            "num_attention_heads": width // _CLIP_HEAD_DIM,
            "max_position_embeddings": (rows + 60) // 4 if table in shapes else rows,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": _LEGACY_EOS,
        },
    }


def _encoder(section: Section, defaults: Mapping[str, Any]) -> EncoderConfig:
    sizes = {
        key: section.integer(key, defaults[key])
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise section.wrong(
            "hidden_size", sizes["hidden_size"], f"a multiple of {sizes['num_attention_heads']}"
        )
    if (act := section.get("hidden_act", "quick_gelu")) not in ("quick_gelu", "gelu"):
        raise IncompatibleError(
            f"{section.where}: hidden_act is {act!r}, expected 'quick_gelu' or 'gelu'"
        )
    eps = section.number("layer_norm_eps", 1e-5)
    return EncoderConfig(**sizes, hidden_act=act, layer_norm_eps=eps)


def _vision_config(section: Section) -> VisionConfig:
    image_size, patch_size = (
        section.integer(key, _VISION_DEFAULTS[key]) for key in ("image_size", "patch_size")
    )
    if patch_size > image_size:
        raise section.wrong("patch_size", patch_size, f"at most the image size {image_size}")
    return VisionConfig(_encoder(section, _VISION_DEFAULTS), image_size, patch_size)


def _text_config(section: Section, extended: bool) -> TextConfig:
    vocab_size = section.integer("vocab_size", _TEXT_DEFAULTS["vocab_size"])
    # Twenty positions are kept and the rest interpolated, so there must be more than twenty.
    least = 21 if extended else 2
    positions = section.integer("max_position_embeddings", 77, least=least)
    return TextConfig(
        encoder=_encoder(section, _TEXT_DEFAULTS),
        vocab_size=vocab_size,
        positions=4 * positions - 60 if extended else positions,
        extended=extended,
        bos_token_id=_below(section, "bos_token_id", vocab_size, _TEXT_DEFAULTS["bos_token_id"]),
        eos_token_id=_below(section, "eos_token_id", vocab_size, _TEXT_DEFAULTS["eos_token_id"]),
    )


def _decoder_config(section: Section) -> dict[str, Any]:
    from transformers import LlamaConfig

    given = {key: section.values[key] for key in section.values if "dtype" not in key}
    try:
        resolved: dict[str, Any] = LlamaConfig(**given).to_dict()
    except Exception as error:  # transformers has a class of its own for each field it dislikes
        reason = " ".join(str(error).split())
        raise DataError(f"{section.where}: not a Llama config: {reason}") from error
    return {key: value for key, value in resolved.items() if "dtype" not in key}


def _pooling_window(config: Section, grid: tuple[int, int], frames: int) -> tuple[Window, Window]:
    """Returns (kernel, stride), derived from `pllava_pooling_shape` where that alone is given."""
    keys = ("pooling_kernel", "pooling_stride")
    if config.get("pllava_pooling_shape") is None or any(config.get(key) for key in keys):
        kernel, stride = (config.triple(key, None, int) for key in keys)
        return kernel, stride
    output = config.triple("pllava_pooling_shape", None, int)
    try:
        return window_from_output((frames, *grid), output)
    except ValueError as error:
        raise config.wrong("pllava_pooling_shape", list(output), str(error)) from error


def _eos_token_ids(folder: Path, decoder: Mapping[str, Any]) -> tuple[int, ...]:
    generation = _optional(folder / "generation_config.json")
    value = generation.get("eos_token_id", decoder.get("eos_token_id"))
    ids = value if isinstance(value, list) else [value]
    vocab_size = decoder["vocab_size"]
    if not ids or any(type(item) is not int or not 0 <= item < vocab_size for item in ids):
        raise generation.wrong("eos_token_id", value, f"ids below {vocab_size}")
    return tuple(ids)


def _below(section: Section, key: str, limit: int, default: int | None = None) -> int:
    value = section.integer(key, default, least=0)
    if value >= limit:
        raise section.wrong(key, value, f"an id below the vocabulary's {limit}")
    return value


def _optional(path: Path) -> Section:
    return Section.read(path) if path.exists() else Section({}, str(path))
