"""A seeded checkpoint of the CLIP family with random weights, in the layout people publish."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
TEXT = {
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
IMAGE_TOKEN_INDEX = 3
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaInterleaveForConditionalGeneration"],
    "model_type": "llava_next",
    "btadapter": False,
    "qwen": False,
    "clip_weight": "../clip",
    "extend_clip": True,
    "frame_shape": [4, 4],
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

Tensors = dict[str, NDArray[Any]]


def write_checkpoint(
    folder: Path, seed: int = 0, *, dtype: str = "float32", **overrides: Any
) -> Path:
    """Returns `folder`/checkpoint; CLIP's config and tokenizer are in `folder`/clip.

    Args:
        folder: Made where it is missing.
        seed: Of the weights.
        dtype: A numpy float type, of the weights.
        overrides: Fields of config.json by name; an object is merged, None removes the field.
    """
    checkpoint, clip = folder / "checkpoint", folder / "clip"
    for made in (checkpoint, clip):
        made.mkdir(parents=True, exist_ok=True)
    config = merged(CONFIG, overrides)
    write_json(checkpoint / "config.json", config)
    write_json(checkpoint / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(
        checkpoint / "preprocessor_config.json",
        {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    write_json(
        clip / "config.json",
        {
            "model_type": "clip",
            "projection_dim": VISION["projection_dim"],
            "text_config": TEXT,
            "vision_config": config.get("vision_config", {}),
        },
    )
    decoder_tokenizer().save(str(checkpoint / "tokenizer.json"))
    text_tokenizer().save(str(clip / "tokenizer.json"))
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
        if not shape:
            value = np.array(2.6592)
        elif "norm" in name or "_ln" in name or "layrnorm" in name:
            value = float(name.endswith("weight")) + 0.05 * rng.standard_normal(shape)
        elif name.endswith("bias"):
            value = 0.05 * rng.standard_normal(shape)
        else:
            fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
            value = rng.standard_normal(shape) / np.sqrt(fan_in)
        tensors[name] = value.astype(np.float32)
    return tensors


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    vision, decoder = config["vision_config"], config["text_config"]
    c, w, d = vision["hidden_size"], TEXT["hidden_size"], decoder["hidden_size"]
    assert isinstance(w, int)
    p, patch = vision["projection_dim"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2

    tower = "vision_tower.vision_model."
    yield f"{tower}embeddings.class_embedding", (c,)
    yield f"{tower}embeddings.patch_embedding.weight", (c, 3, patch, patch)
    yield f"{tower}embeddings.position_embedding.weight", (patches + 1, c)
    yield from _linear(f"{tower}pre_layrnorm", (c,))
    yield from _encoder(f"{tower}encoder", vision)
    yield from _linear(f"{tower}post_layernorm", (c,))

    projector = "multi_modal_projector."
    yield from _linear(f"{projector}linear_1", (d, c))
    yield from _linear(f"{projector}linear_2", (d, d))
    text = f"{projector}clip_text_model."
    vocabulary, positions = TEXT["vocab_size"], TEXT["max_position_embeddings"]
    assert isinstance(vocabulary, int)
    assert isinstance(positions, int)
    yield f"{text}embeddings.token_embedding.weight", (vocabulary, w)
    if config.get("extend_clip"):
        for table in ("position_embedding", "position_embedding_res"):
            yield f"{text}embeddings.{table}", (4 * positions - 60, w)
    else:
        yield f"{text}embeddings.position_embedding.weight", (positions, w)
    yield from _encoder(f"{text}encoder", TEXT)
    yield from _linear(f"{text}final_layer_norm", (w,))
    yield f"{projector}clip_text_projection.weight", (p, w)
    yield from _linear(f"{projector}clip_visual_ln", (c,))
    yield f"{projector}clip_visual_projection.weight", (p, c)
    yield f"{projector}logit_scale", ()
    yield "image_newline", (d,)
    yield from _llama("language_model.", decoder)


def _linear(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _encoder(name: str, sizes: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    for layer in range(sizes["num_hidden_layers"]):
        block = f"{name}.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{block}self_attn.{projection}", (width, width))
        yield from _linear(f"{block}layer_norm1", (width,))
        yield from _linear(f"{block}layer_norm2", (width,))
        yield from _linear(f"{block}mlp.fc1", (inner, width))
        yield from _linear(f"{block}mlp.fc2", (width, inner))


def _llama(name: str, sizes: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    yield f"{name}model.embed_tokens.weight", (vocabulary, width)
    for layer in range(sizes["num_hidden_layers"]):
        block = f"{name}model.layers.{layer}."
        yield f"{block}input_layernorm.weight", (width,)
        yield f"{block}post_attention_layernorm.weight", (width,)
        yield f"{block}self_attn.q_proj.weight", (queries, width)
        yield f"{block}self_attn.k_proj.weight", (keys, width)
        yield f"{block}self_attn.v_proj.weight", (keys, width)
        yield f"{block}self_attn.o_proj.weight", (width, queries)
        yield f"{block}mlp.gate_proj.weight", (inner, width)
        yield f"{block}mlp.up_proj.weight", (inner, width)
        yield f"{block}mlp.down_proj.weight", (width, inner)
    yield f"{name}model.norm.weight", (width,)
    if not sizes.get("tie_word_embeddings"):
        yield f"{name}lm_head.weight", (vocabulary, width)


def decoder_tokenizer() -> Tokenizer:
    """Llama's rules without merges: printable ASCII by the letter, all else by its bytes."""
    special = ["<unk>", "<s>", "</s>", "<image>"]
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
