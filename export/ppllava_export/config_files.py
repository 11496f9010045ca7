"""config.json and its neighbours → ModelConfig, typed, with every refusal named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppllava_engines.bundle import Pooling
from ppllava_engines.errors import DataError, IncompatibleError

from .clip_weight import Shapes, clip_folder, clip_section
from .config_defaults import FAMILIES, KINDS, MAX_LAYERS, KindDefaults
from .decoder_config import read_decoder_config, read_eos_token_ids
from .modules.config import (
    BTAdapterConfig,
    EncoderConfig,
    Family,
    ModelConfig,
    TextConfig,
    VisionConfig,
    Window,
)
from .modules.encoder import ACTIVATIONS
from .modules.text import KEPT_POSITIONS, LEGACY_EOS, extended_positions
from .sections import Section, shown

_PUBLISHED_FRAMES = 32
# Of the research code's own config class.
_DEFAULT_DEPTH, _DEFAULT_MAX_T = 4, 128
# A still is enlarged to all of them at once; 36 are the most that is published.
_MOST_TILES, _MOST_PINPOINTS = 64, 512
# An extended table keeps some positions and interpolates the rest, so there must be more. A causal
# tower is traced with four tokens.
_LEAST_EXTENDED, _LEAST_CAUSAL = KEPT_POSITIONS + 1, 4


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


def read_model_config(folder: Path, shapes: Shapes | None) -> tuple[ModelConfig, CheckpointFiles]:
    """Returns what the checkpoint in `folder` says of its model, and where its parts are.

    Args:
        folder: Holds config.json and maybe generation_config.json, preprocessor_config.json.
        shapes: Gives the tensors' shapes by name; called only when `clip_weight` names neither a
            folder that is there nor a known tower. None when another text tower takes the place of
            the checkpoint's: then nothing needs to tell its sizes, and the config's mean nothing.

    Raises:
        DataError: Malformed JSON, a field that is missing or not what it must be, `auto_map`, or a
            `clip_weight` from which no text tower can be told.
        IncompatibleError: A variant that this release does not export; names every reason.
        NotFoundError: No config.json in `folder`.
    """
    config = Section.read(folder / "config.json")
    kind = _kind(config)
    family: Family = "siglip" if config.flag("qwen", kind.family == "siglip") else "clip"
    _refuse_unsupported(config, kind, family)
    clip = clip_folder(config, folder)
    clip_config = clip_section(config, clip, family, shapes)
    vision = _vision_config(config, kind, family)
    if clip_config is None:
        sizes = {"projection_size": vision.encoder.hidden_size}
        clip_config = Section({"text_config": sizes}, "a text tower to be replaced")
    _refuse_code(clip_config)
    text, projection_dim = _text_config(config, clip_config, family, vision)
    decoder = read_decoder_config(config.section("text_config"), kind.decoder)
    preprocessor = Section.read_optional(folder / "preprocessor_config.json")
    max_frames = vision.btadapter.max_frames if vision.btadapter else _max_frames(config)
    num_frames = min(preprocessor.integer("num_frames", _PUBLISHED_FRAMES), max_frames)
    kernel, stride, pooling = _pooling_window(config, (num_frames, *vision.grid))
    image_kernel = config.triple("image_pooling_kernel", kernel)
    for key, value in (("pooling_kernel", kernel), ("image_pooling_kernel", image_kernel)):
        if any(k > size for k, size in zip(value, (max_frames, *vision.grid), strict=True)):
            raise config.wrong(key, list(value), f"at most {[max_frames, *vision.grid]}")
    if (shape := config.get("frame_shape", list(vision.grid))) != list(vision.grid):
        raise config.wrong("frame_shape", shape, f"{list(vision.grid)}, the vision tower's grid")
    defaults = FAMILIES[family]
    model = ModelConfig(
        name=folder.resolve().name,
        vision=vision,
        text=text,
        projection_dim=projection_dim,
        decoder=decoder,
        feature_layer=_feature_layer(config, kind, vision),
        grid=vision.grid,
        kernel=kernel,
        stride=stride,
        image_kernel=image_kernel,
        image_stride=config.triple("image_pooling_stride", stride),
        temperature=config.number("pooling_temp", 0.01),
        max_frames=max_frames,
        image_token_index=config.index(
            "image_token_index", decoder["vocab_size"], kind.image_token_index
        ),
        image_mean=preprocessor.channels("image_mean", defaults.mean, positive=False),
        image_std=preprocessor.channels("image_std", defaults.std, positive=True),
        eos_token_ids=read_eos_token_ids(folder, config, decoder),
        family=family,
        image_grid_pinpoints=_pinpoints(config, kind, vision.image_size),
        pooling=pooling,
    )
    return model, CheckpointFiles(folder, clip, num_frames)


def text_token_ids(text: TextConfig) -> tuple[int | None, int]:
    """Returns the (begin, end) ids that belong around a question for the text tower.

    SigLIP's has no begin. OpenAI's own configs state 0 and 2, which are not the ids in use: those
    are the two highest.
    """
    if text.bos_token_id is not None and text.eos_token_id == LEGACY_EOS:
        return text.vocab_size - 2, text.vocab_size - 1
    return text.bos_token_id, text.eos_token_id


def _kind(config: Section) -> KindDefaults:
    _refuse_code(config)
    name = config.get("model_type", "llava_next")
    expected = " or ".join(KINDS)
    if not isinstance(name, str):
        raise config.wrong("model_type", name, expected)
    if name not in KINDS:
        raise IncompatibleError(f"{config.where}: model_type is {shown(name)}, expected {expected}")
    return KINDS[name]


def _refuse_code(config: Section) -> None:
    """Refuses what asks a loader to run the checkpoint's own code."""
    inner: list[Any] = [config.values]
    while inner:
        value = inner.pop()
        if isinstance(value, dict) and value.get("auto_map") is not None:
            raise DataError(
                f"{config.where}: auto_map asks for code of the checkpoint's own, which is never "
                "run: remove it if the model needs none"
            )
        if isinstance(value, dict | list):
            inner += value.values() if isinstance(value, dict) else value


def _refuse_unsupported(config: Section, kind: KindDefaults, family: Family) -> None:
    """Raises one error that names every field whose value this release does not export."""
    supported: dict[str, tuple[Any, Any]] = {  # field → (the one value, what an absent one means)
        "pooling": ("ppllava", None),
        "valuew_plus": (False, False),
        "projector_hidden_act": ("gelu", "gelu"),
        "multimodal_projector_bias": (True, True),
        "vision_feature_select_strategy": (FAMILIES[family].strategy,) * 2,
        "vision_config.model_type": (f"{family}_vision_model", f"{kind.family}_vision_model"),
        "vision_config.num_channels": (3, 3),
        "text_config.use_sliding_window": (False, False),
    }
    reasons = []
    for key, (only, absent) in supported.items():
        value = config.get(key, absent)
        if value is not None and type(value) is not type(only):
            raise config.wrong(key, value, repr(only))
        if value != only:
            reasons.append(f"{key} is {shown(value)} and only {only!r} is supported")
    if family == "siglip" and config.flag("btadapter"):
        reasons.append("btadapter is True and only CLIP towers have one")
    decoder, expected = config.get("text_config.model_type", kind.decoder), "'llama' or 'qwen2'"
    if not isinstance(decoder, str):
        raise config.wrong("text_config.model_type", decoder, expected)
    if decoder not in ("llama", "qwen2"):
        reasons.append(f"text_config.model_type is {shown(decoder)}, expected {expected}")
    reasons += [
        f"{prefix}quantization_config is set and quantised weights are not read"
        for prefix in ("", "vision_config.", "text_config.")
        if config.get(f"{prefix}quantization_config") is not None
    ]
    layers = config.get("vision_feature_layer")
    if isinstance(layers, list) and len(layers) > 1 and all(type(i) is int for i in layers):
        reasons.append(f"vision_feature_layer is {shown(layers)} and only one layer is supported")
    if reasons:
        raise IncompatibleError(f"{config.where}: {'; '.join(reasons)}")


def _encoder(section: Section, sizes: Mapping[str, Any], family: Family) -> EncoderConfig:
    defaults = {**sizes, **FAMILIES[family].encoder}
    width = section.integer("hidden_size", defaults["hidden_size"])
    heads = section.integer("num_attention_heads", defaults["num_attention_heads"])
    if width % heads:
        raise section.wrong("hidden_size", width, f"a multiple of {heads}")
    act, expected = section.get("hidden_act", defaults["hidden_act"]), ", ".join(ACTIVATIONS)
    if not isinstance(act, str):
        raise section.wrong("hidden_act", act, f"one of {expected}")
    if act not in ACTIVATIONS:
        raise IncompatibleError(
            f"{section.where}: hidden_act is {shown(act)}, expected one of {expected}"
        )
    return EncoderConfig(
        hidden_size=width,
        intermediate_size=section.integer("intermediate_size", defaults["intermediate_size"]),
        num_hidden_layers=section.integer(
            "num_hidden_layers", defaults["num_hidden_layers"], most=MAX_LAYERS
        ),
        num_attention_heads=heads,
        hidden_act=act,
        layer_norm_eps=section.number("layer_norm_eps", defaults["layer_norm_eps"]),
    )


def _vision_config(config: Section, kind: KindDefaults, family: Family) -> VisionConfig:
    section = config.section("vision_config")
    whole = config.get("vision_config") is None
    defaults = kind.vision if whole else FAMILIES[family].vision
    encoder = _encoder(section, defaults, family)
    image_size = section.integer("image_size", defaults["image_size"])
    patch_size = section.integer("patch_size", defaults["patch_size"], most=image_size)
    adapter = None
    if config.flag("btadapter"):
        # Beside the tower's own copy of both fields, these are the ones that count.
        depth = section.integer("depth", _DEFAULT_DEPTH)
        adapter = BTAdapterConfig(
            depth=config.integer("btadapter_depth", depth, most=encoder.num_hidden_layers),
            max_frames=_max_frames(config),
        )
    return VisionConfig(encoder, image_size, patch_size, adapter)


def _max_frames(config: Section) -> int:
    inner = config.section("vision_config").integer("max_T", _DEFAULT_MAX_T)
    return config.integer("max_T", inner)


def _text_config(
    config: Section, clip: Section, family: Family, vision: VisionConfig
) -> tuple[TextConfig, int]:
    """Returns the text tower and the width P in which it is compared with patches."""
    section, defaults = clip.section("text_config"), FAMILIES[family].text
    extended = config.flag("extend_clip")
    vocab_size = section.integer("vocab_size", defaults["vocab_size"])
    least = _LEAST_CAUSAL if family == "clip" else 2
    positions = section.integer(
        "max_position_embeddings",
        defaults["max_position_embeddings"],
        least=_LEAST_EXTENDED if extended else least,
    )
    bos: int | None = None
    pad: int | None = None
    if family == "clip":
        bos, eos = (
            section.index(key, vocab_size, defaults[key])
            for key in ("bos_token_id", "eos_token_id")
        )
        projection_dim = clip.integer("projection_dim", 512)
    else:
        pad = section.index("pad_token_id", vocab_size, defaults["pad_token_id"])
        # What SigLIP's config class states as its end lies outside the vocabulary; a question ends
        # with the padding's own id.
        stated = section.integer("eos_token_id", pad, least=0)
        eos = stated if stated < vocab_size else pad
        width = section.integer("hidden_size", defaults["hidden_size"])
        projection_dim = section.integer("projection_size", width)
        if projection_dim != vision.encoder.hidden_size:
            raise section.wrong(
                "projection_size", projection_dim, f"{vision.encoder.hidden_size}, the patches'"
            )
    text = TextConfig(
        encoder=_encoder(section, defaults, family),
        vocab_size=vocab_size,
        positions=extended_positions(positions) if extended else positions,
        extended=extended,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return text, projection_dim


def _pooling_window(config: Section, size: Window) -> tuple[Window, Window, Pooling | None]:
    """Returns (kernel, stride) for `size` tokens, and from what they follow unless stated so."""
    kernel, stride, output = (
        None if config.get(key) is None else config.triple(key, None)
        for key in ("pooling_kernel", "pooling_stride", "pllava_pooling_shape")
    )
    if output is None:  # then neither of the others may be absent
        kernel = config.triple("pooling_kernel", kernel)
        return kernel, config.triple("pooling_stride", stride), None
    if kernel is not None and stride is not None:
        expected = "absent, as pooling_kernel and pooling_stride are both given"
        raise config.wrong("pllava_pooling_shape", list(output), expected)
    pooling = Pooling(output, kernel, stride)
    try:
        return (*pooling.window(size), pooling)
    except ValueError as error:
        raise config.wrong("pllava_pooling_shape", list(output), f"fitting: {error}") from error


def _feature_layer(config: Section, kind: KindDefaults, vision: VisionConfig) -> int:
    value = config.get("vision_feature_layer", kind.feature_layer)
    layer = value[0] if isinstance(value, list) and len(value) == 1 else value
    entries = vision.encoder.num_hidden_layers + 1
    if type(layer) is not int or not -entries <= layer < entries:
        raise config.wrong("vision_feature_layer", value, f"one of {entries} layers")
    return layer


def _pinpoints(config: Section, kind: KindDefaults, side: int) -> tuple[tuple[int, int], ...]:
    value = config.get("image_grid_pinpoints")
    if value is None:  # the class's default, in pixels of the tower that it is meant for
        nominal = kind.vision["image_size"] == side
        return tuple((h * side, w * side) for h, w in kind.tiles) if nominal else ()
    expected = (
        f"a list of at most {_MOST_PINPOINTS} [height, width] in multiples of {side}, each of at "
        f"most {_MOST_TILES} tiles"
    )
    if not isinstance(value, list) or len(value) > _MOST_PINPOINTS:
        raise config.wrong("image_grid_pinpoints", value, expected)
    for pair in value:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or any(type(size) is not int or size < side or size % side for size in pair)
            or pair[0] * pair[1] > _MOST_TILES * side**2
        ):
            raise config.wrong("image_grid_pinpoints", value, expected)
    return tuple((pair[0], pair[1]) for pair in value)
