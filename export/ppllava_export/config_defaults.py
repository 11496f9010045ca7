"""What published config.json files leave out, because it is their config class's default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .modules.config import Family

MAX_LAYERS = 512  # beyond any model, and few enough to be built before a tensor is found missing


@dataclass(frozen=True)
class FamilyDefaults:
    """The defaults of a family's own config classes, of its vision tower and its text tower.

    Attributes:
        vision, text: Sizes of the towers, by field.
        encoder: Fields that both towers share.
        mean, std: Per-channel normalisation of RGB in [0, 1].
        strategy: `vision_feature_select_strategy` that leaves the patches and nothing else.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    encoder: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    strategy: str


FAMILIES: dict[Family, FamilyDefaults] = {
    "clip": FamilyDefaults(
        vision={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
        },
        text={
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        encoder={"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        strategy="default",  # drops the class token
    ),
    "siglip": FamilyDefaults(
        vision={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
        },
        text={
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
        },
        encoder={"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        strategy="full",
    ),
}


@dataclass(frozen=True)
class KindDefaults:
    """The defaults of the config class that `model_type` names.

    Attributes:
        family: What it is a class for.
        vision: Sizes of the tower where config.json has no `vision_config` at all.
        decoder: `model_type` of the decoder.
        feature_layer: Index into the tower's hidden states.
        image_token_index: Id that stands for an image.
        tiles: Sizes (rows, columns) of stills in units of `vision`'s image size.
    """

    family: Family
    vision: dict[str, Any]
    decoder: str
    feature_layer: int
    image_token_index: int
    tiles: tuple[tuple[int, int], ...]


KINDS = {
    "llava_next": KindDefaults(
        family="clip",
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        decoder="llama",
        feature_layer=-2,
        image_token_index=32000,
        tiles=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    ),
    "llava_onevision": KindDefaults(
        family="siglip",
        vision={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        decoder="qwen2",
        feature_layer=-1,
        image_token_index=151646,
        tiles=tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7)),
    ),
}
