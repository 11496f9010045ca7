"""Seeded checkpoints of both families with random weights, in the layout people publish."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
TEXT: dict[str, Any] = {
    "model_type": "clip_text_model",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "vocab_size": 514,
    "bos_token_id": 512,
    "eos_token_id": 513,
}
DECODER = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PREPROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
IMAGE_TOKEN_INDEX = 3
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaInterleaveForConditionalGeneration"],
    "model_type": "llava_next",
    "btadapter": False,
    "btadapter_depth": 3,
    "qwen": False,
    "clip_weight": "../clip",
    "extend_clip": True,
    "frame_shape": [4, 4],
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
    "image_pooling_kernel": [1, 2, 2],
    "image_pooling_stride": [1, 2, 2],
    "image_token_index": IMAGE_TOKEN_INDEX,
    "max_T": 64,
    "pooling": "ppllava",
    "pooling_kernel": [2, 2, 2],
    "pooling_stride": [2, 2, 2],
    "pooling_temp": 0.01,
    "projector_hidden_act": "gelu",
    "text_config": DECODER,
    "vision_config": VISION,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}

# Its begin and end lie outside the vocabulary, as those of SigLIP's config class do.
SIGLIP_TEXT: dict[str, Any] = TEXT | {
    "model_type": "siglip_text_model",
    "max_position_embeddings": 64,
    "vocab_size": 48,
    "projection_size": 32,
}
SIGLIP_CONFIG = CONFIG | {
    "model_type": "llava_onevision",
    "qwen": True,
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
    },
    "vision_config": VISION | {"model_type": "siglip_vision_model"},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}

Family = Literal["clip", "siglip"]
Tensors = dict[str, NDArray[Any]]


def write_checkpoint(
    folder: Path,
    seed: int = 0,
    *,
    family: Family = "clip",
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    """Returns `folder`/checkpoint; CLIP's or SigLIP's config and tokenizer are in `folder`/clip.

    Args:
        folder: Made where it is missing.
        seed: Of the weights.
        family: CLIP with a Llama decoder, or SigLIP with a Qwen2 decoder.
        dtype: A numpy float type, of the weights.
        overrides: Fields of config.json by name; an object is merged, None removes the field.
            `btadapter=True` gives CLIP's tower a branch, `extend_clip=False` the text tower one
            table of positions.
    """
    checkpoint, clip = folder / "checkpoint", folder / "clip"
    for made in (checkpoint, clip):
        made.mkdir(parents=True, exist_ok=True)
    siglip = family == "siglip"
    config = merged(SIGLIP_CONFIG if siglip else CONFIG, overrides)
    text = SIGLIP_TEXT if siglip else TEXT
    write_json(checkpoint / "config.json", config)
    write_json(checkpoint / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(checkpoint / "preprocessor_config.json", half if siglip else PREPROCESSOR)
    sizes = {} if siglip else {"projection_dim": VISION["projection_dim"]}
    towers = {"text_config": text, "vision_config": config.get("vision_config", {})}
    write_json(clip / "config.json", {"model_type": family, **sizes, **towers})
    decoder_tokenizer(chatml=siglip).save(str(checkpoint / "tokenizer.json"))
    tokenizer = siglip_text_tokenizer() if siglip else text_tokenizer()
    tokenizer.save(str(clip / "tokenizer.json"))
    tensors = random_tensors(config, np.random.default_rng(seed))
    save_tensors(checkpoint, {name: value.astype(dtype) for name, value in tensors.items()})
    return checkpoint


def save_tensors(checkpoint: Path, tensors: Tensors) -> None:
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def merged(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    out = dict(config)
    for key, value in overrides.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value)
        else:
            out[key] = value
    return out


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, merged(json.loads(path.read_text(encoding="utf-8")), changes))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def random_tensors(config: dict[str, Any], rng: np.random.Generator) -> Tensors:
    """Norms near one, matrices that keep the size of what they are applied to."""
    tensors: Tensors = {}
    for name, shape in shapes(config):
        if name.endswith(("logit_scale", "logit_bias")):
            value = np.full(shape, 2.6592 if name.endswith("scale") else -12.0)
        elif "norm" in name or "_ln" in name or "layrnorm" in name:
            value = float(name.endswith("weight")) + 0.05 * rng.standard_normal(shape)
        elif name.endswith("bias"):
            value = 0.05 * rng.standard_normal(shape)
        else:
            fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
            value = rng.standard_normal(shape) / np.sqrt(fan_in)
        tensors[name] = value.astype(np.float32)
    return tensors


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def shapes(config: dict[str, Any]) -> Shapes:
    siglip = config["qwen"]
    yield from _siglip_tower(config) if siglip else _clip_tower(config)
    yield from _projector(config, SIGLIP_TEXT if siglip else TEXT)
    yield from _siglip_alignment(config) if siglip else _clip_alignment(config)
    yield "image_newline", (config["text_config"]["hidden_size"],)
    yield from _decoder("language_model.", config["text_config"])


def _clip_tower(config: dict[str, Any]) -> Shapes:
    vision, tower = config["vision_config"], "vision_tower.vision_model."
    c, patch = vision["hidden_size"], vision["patch_size"]
    yield f"{tower}embeddings.class_embedding", (c,)
    yield f"{tower}embeddings.patch_embedding.weight", (c, 3, patch, patch)
    yield f"{tower}embeddings.position_embedding.weight", (_patches(vision) + 1, c)
    yield from _linear(f"{tower}pre_layrnorm", (c,))
    yield from _encoder(f"{tower}encoder.layers", vision)
    yield from _linear(f"{tower}post_layernorm", (c,))
    if not config["btadapter"]:
        return
    branch = vision | {"num_hidden_layers": config["btadapter_depth"]}
    yield from _encoder(f"{tower}btadapter_S_layers", branch)
    for layer in range(config["btadapter_depth"]):
        block = f"{tower}btadapter_T_layers.{layer}."
        yield from _attention(block, c)
        yield from _linear(f"{block}temporal_fc", (c, c))
    yield f"{tower}btadapter_time_embed.weight", (config["max_T"], c)
    yield f"{tower}btadapter_cls_token", (1, 1, c)


def _siglip_tower(config: dict[str, Any]) -> Shapes:
    vision, tower = config["vision_config"], "vision_tower.vision_model."
    c, patch = vision["hidden_size"], vision["patch_size"]
    yield from _linear(f"{tower}embeddings.patch_embedding", (c, 3, patch, patch))
    yield f"{tower}embeddings.position_embedding.weight", (_patches(vision), c)
    yield from _encoder(f"{tower}encoder.layers", vision)
    yield from _linear(f"{tower}post_layernorm", (c,))
    yield from _pooling_head(f"{tower}head.", vision)


def _projector(config: dict[str, Any], sizes: dict[str, Any]) -> Shapes:
    c, d = config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"]
    projector = "multi_modal_projector."
    yield from _linear(f"{projector}linear_1", (d, c))
    yield from _linear(f"{projector}linear_2", (d, d))
    yield from _linear(f"{projector}clip_visual_ln", (c,))
    text, w = f"{projector}clip_text_model.", sizes["hidden_size"]
    positions = sizes["max_position_embeddings"]
    yield f"{text}embeddings.token_embedding.weight", (sizes["vocab_size"], w)
    if config.get("extend_clip"):
        for table in ("position_embedding", "position_embedding_res"):
            yield f"{text}embeddings.{table}", (4 * positions - 60, w)
    else:
        yield f"{text}embeddings.position_embedding.weight", (positions, w)
    yield from _encoder(f"{text}encoder.layers", sizes)
    yield from _linear(f"{text}final_layer_norm", (w,))


def _clip_alignment(config: dict[str, Any]) -> Shapes:
    vision, projector = config["vision_config"], "multi_modal_projector."
    p = vision["projection_dim"]
    yield f"{projector}clip_text_projection.weight", (p, TEXT["hidden_size"])
    yield f"{projector}clip_visual_projection.weight", (p, vision["hidden_size"])
    yield f"{projector}logit_scale", ()


def _siglip_alignment(config: dict[str, Any]) -> Shapes:
    vision, projector = config["vision_config"], "multi_modal_projector."
    c = vision["hidden_size"]
    yield from _linear(f"{projector}clip_text_model.head", (c, SIGLIP_TEXT["hidden_size"]))
    yield from _pooling_head(f"{projector}clip_visual_head.", vision)
    yield f"{projector}logit_scale", (1,)
    yield f"{projector}logit_bias", (1,)


def _pooling_head(name: str, vision: dict[str, Any]) -> Shapes:
    c, inner = vision["hidden_size"], vision["intermediate_size"]
    yield f"{name}probe", (1, 1, c)
    yield f"{name}attention.in_proj_weight", (3 * c, c)
    yield f"{name}attention.in_proj_bias", (3 * c,)
    yield from _linear(f"{name}attention.out_proj", (c, c))
    yield from _linear(f"{name}layernorm", (c,))
    yield from _linear(f"{name}mlp.fc1", (inner, c))
    yield from _linear(f"{name}mlp.fc2", (c, inner))


def _patches(vision: dict[str, Any]) -> int:
    return int(vision["image_size"] // vision["patch_size"]) ** 2


def _linear(name: str, shape: tuple[int, ...]) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _encoder(name: str, sizes: dict[str, Any]) -> Shapes:
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    for layer in range(sizes["num_hidden_layers"]):
        block = f"{name}.{layer}."
        yield from _attention(block, width)
        yield from _linear(f"{block}layer_norm2", (width,))
        yield from _linear(f"{block}mlp.fc1", (inner, width))
        yield from _linear(f"{block}mlp.fc2", (width, inner))


def _attention(block: str, width: int) -> Shapes:
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _linear(f"{block}self_attn.{projection}", (width, width))
    yield from _linear(f"{block}layer_norm1", (width,))


def _decoder(name: str, sizes: dict[str, Any]) -> Shapes:
    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    head_dim = sizes.get("head_dim", width // sizes["num_attention_heads"])
    queries = sizes["num_attention_heads"] * head_dim
    keys = sizes["num_key_value_heads"] * head_dim
    yield f"{name}model.embed_tokens.weight", (vocabulary, width)
    for layer in range(sizes["num_hidden_layers"]):
        block = f"{name}model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}{norm}.weight", (width,)
        for projection, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{block}self_attn.{projection}.weight", (rows, width)
            if sizes["model_type"] == "qwen2":
                yield f"{block}self_attn.{projection}.bias", (rows,)
        yield f"{block}self_attn.o_proj.weight", (width, queries)
        for projection in ("gate_proj", "up_proj"):
            yield f"{block}mlp.{projection}.weight", (inner, width)
        yield f"{block}mlp.down_proj.weight", (width, inner)
    yield f"{name}model.norm.weight", (width,)
    if not sizes.get("tie_word_embeddings"):
        yield f"{name}lm_head.weight", (vocabulary, width)


def decoder_tokenizer(chatml: bool = False) -> Tokenizer:
    """Llama's rules without merges: printable ASCII by the letter, all else by its bytes.

    With ChatML's tokens in place of Llama's, and then none at the beginning of a text.
    """
    ends = ["<|im_start|>", "<|im_end|>"] if chatml else ["<s>", "</s>"]
    special = ["<unk>", *ends, "<image>"]
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    if not chatml:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def text_tokenizer() -> Tokenizer:
    """CLIP's rules without merges: lower case, one token per byte, the last of a word marked."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *special]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[],
            unk_token=special[1],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = ((token, vocabulary[token]) for token in special)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin[0]} $A {end[0]}", special_tokens=[begin, end]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def siglip_text_tokenizer() -> Tokenizer:
    """SigLIP's rules without pieces longer than a letter: an end, and no begin."""
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(piece, 0.0) for piece in special] + [(letter, -1.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer
