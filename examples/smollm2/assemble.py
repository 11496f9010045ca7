"""SmolLM2 and untrained towers → a whole PPLLaVA checkpoint.

`python -m smollm2.assemble OUT` writes OUT/checkpoint (540 MB: the decoder in fp32, as the GGUF
file's numbers stand for it) and OUT/clip. It talks, and it sees nothing: the towers and the
projector are random. What it is for is to measure a decoder that says something.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from ppllava_export.checkpoint import load_config
from ppllava_export.modules.model import PPLLaVA

from .gguf_file import GgufFile, find_file

IMAGE_TOKEN = "<image>"
_RESERVED = "<empty_output>"  # a token of notebooks, which gives its id to the image
_DECODER = "language_model."
_MAX_FRAMES = 64
_TEXT = {
    "vocab_size": 514,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "bos_token_id": 512,
    "eos_token_id": 513,
}
_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 8,
    "projection_dim": 32,
}


def assemble(out: Path, gguf: Path) -> Path:
    """Returns `out`/checkpoint, a PPLLaVA of the CLIP family that it writes.

    Args:
        out: Made where it is missing; files of the same names are replaced.
        gguf: SmolLM2's file.
    """
    checkpoint, clip = out / "checkpoint", out / "clip"
    for folder in (checkpoint, clip):
        folder.mkdir(parents=True, exist_ok=True)
    source = GgufFile(gguf)
    tokenizer = source.tokenizer({_RESERVED: IMAGE_TOKEN})
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    _text_tokenizer().save(str(clip / "tokenizer.json"))
    image_id = tokenizer.get_vocab()[IMAGE_TOKEN]
    _write_configs(checkpoint, clip, source.config(), image_id)
    tensors = dict(_untrained(checkpoint))
    for name, value in source.tensors():
        tensors[_DECODER + name] = torch.from_numpy(value)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def _write_configs(checkpoint: Path, clip: Path, decoder: dict[str, Any], image_id: int) -> None:
    side = _VISION["image_size"] // _VISION["patch_size"]  # type: ignore[operator]
    end = decoder["eos_token_id"]
    _write(
        checkpoint / "config.json",
        {
            "architectures": ["LlavaInterleaveForConditionalGeneration"],
            "model_type": "llava_next",
            "btadapter": False,
            "qwen": False,
            "clip_weight": "../clip",
            "extend_clip": True,
            "frame_shape": [side, side],
            "image_pooling_kernel": [1, 3, 3],
            "image_pooling_stride": [1, 3, 3],
            "image_token_index": image_id,
            "max_T": _MAX_FRAMES,
            "pooling": "ppllava",
            "pooling_kernel": [2, 3, 3],
            "pooling_stride": [2, 3, 3],
            "pooling_temp": 0.01,
            "projector_hidden_act": "gelu",
            "text_config": decoder,
            "vision_config": _VISION,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
    )
    _write(checkpoint / "generation_config.json", {"eos_token_id": end})
    _write(
        clip / "config.json",
        {
            "model_type": "clip",
            "projection_dim": _VISION["projection_dim"],
            "text_config": _TEXT,
            "vision_config": _VISION,
        },
    )


def _untrained(checkpoint: Path) -> dict[str, Tensor]:
    """Returns seeded random weights of everything but the decoder, by name.

    Norms are one, and a matrix keeps the size of what it is applied to.
    """
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in PPLLaVA(load_config(checkpoint)).state_dict().items()}
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        if name.startswith(_DECODER):
            continue
        if len(shape) >= 2:
            scale = shape[1:].numel() ** -0.5
            tensors[name] = scale * torch.randn(shape, generator=random)
        elif name.endswith("logit_scale"):
            tensors[name] = torch.tensor(2.6592)
        else:
            is_norm = name.endswith("weight")
            tensors[name] = torch.ones(shape) if is_norm else torch.zeros(shape)
    return tensors


def _text_tokenizer() -> Tokenizer:
    """Returns CLIP's rules without merges: lower case, a token per byte, a word's last marked."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    begin, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), begin, end]
    ids = {token: at for at, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=[], unk_token=end, end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, ids[begin]), (end, ids[end])]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (begin, end)])
    return tokenizer


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Assembles the checkpoint from the installed package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file; by default the package's")
    arguments = parser.parse_args()
    print(assemble(arguments.out, arguments.gguf or find_file()))


if __name__ == "__main__":
    main()
