"""Peak memory of exporting full-size checkpoints, against the bound that exports are held to.

`python benchmarks/export_memory.py FOLDER KIND... [--dtype fp16] [--decoder int4]`

Each checkpoint is written below FOLDER with random weights of the published shapes, exported by
`ppllava-export` in a process of its own, and removed. The bound is 1.3 x the weights of the largest
graph + 1.5 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.manifest import MANIFEST, Manifest

_COMMON = {
    "extend_clip": True,
    "max_T": 64,
    "pooling": "ppllava",
    "pooling_kernel": [2, 3, 3],
    "pooling_stride": [2, 3, 3],
    "image_pooling_kernel": [1, 3, 3],
    "image_pooling_stride": [1, 3, 3],
    "pooling_temp": 0.01,
}
CLIP: dict[str, Any] = {
    "model_type": "llava_next",
    "qwen": False,
    "btadapter": True,
    "btadapter_depth": 4,
    "clip_weight": "openai/clip-vit-large-patch14-336",
    "frame_shape": [24, 24],
    "vision_feature_layer": -2,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
SIGLIP: dict[str, Any] = {
    "model_type": "llava_onevision",
    "qwen": True,
    "btadapter": False,
    "clip_weight": "google/siglip-so400m-patch14-384",
    "frame_shape": [27, 27],
    "vision_feature_layer": -1,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}


def decoder_config(kind: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """Returns the text_config of `sizes`: width, feed-forward, layers, heads, kv heads, tokens."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads "
    names += "num_key_value_heads vocab_size"
    stated = dict(zip(names.split(), sizes, strict=True))
    return {
        "model_type": kind,
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
        **stated,
        **more,
    }


_QWEN2 = decoder_config("qwen2", (1536, 8960, 28, 12, 2, 151936), tie_word_embeddings=True)
_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip-btadapter": (CLIP, decoder_config("llama", (512, 1408, 4, 8, 8, 32064))),
    "siglip": (SIGLIP, decoder_config("qwen2", (512, 1408, 4, 8, 2, 32000))),
    "qwen2-1.5b": (SIGLIP, _QWEN2),
    "vicuna-7b": (CLIP, decoder_config("llama", (4096, 11008, 32, 32, 32, 32064))),
}
_BLOCK = 1_000_003  # random numbers, repeated; a prime, so that no two rows of a matrix are equal
_SHIFT = 9973
_GB = 1e9
# A process's peak begins with what the one that starts it holds, so this one starts the export.
_WAIT = """
import os, sys
process = os.spawnvp(os.P_NOWAIT, sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(process, 0)
with open(sys.argv[1], "w") as report:
    report.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


@dataclass(frozen=True)
class Row:
    """One measured export; sizes in bytes."""

    kind: str
    precision: str
    graph: str
    weights: int
    peak: int
    seconds: float

    @property
    def bound(self) -> float:
        """What the peak may be."""
        return 1.3 * self.weights + 1.5 * _GB

    def __str__(self) -> str:
        verdict = "yes" if self.peak <= self.bound else "NO"
        sizes = " | ".join(f"{size / _GB:.2f}" for size in (self.weights, self.bound, self.peak))
        return (
            f"| {self.kind} | {self.precision} | {self.graph} | {sizes} | {verdict} "
            f"| {self.seconds:.0f} |"
        )


def write_checkpoint(
    folder: Path,
    family: dict[str, Any],
    decoder: dict[str, Any],
    known: Mapping[str, NDArray[np.float32]] | None = None,
) -> None:
    """Writes config.json and model.safetensors below `folder`, a tensor at a time.

    Args:
        folder: Must not be there.
        family: Fields of config.json, over those that all checkpoints share.
        decoder: Its text_config.
        known: Tensors by name that are written as they are; all others are random and fp16.
    """
    import torch

    from ppllava_export.checkpoint import load_config
    from ppllava_export.modules.model import PPLLaVA

    config = _COMMON | {"image_token_index": decoder["vocab_size"] - 1} | family
    config["text_config"] = decoder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    with torch.device("meta"):
        state = PPLLaVA(load_config(folder)).state_dict()
    if decoder.get("tie_word_embeddings"):
        del state["language_model.lm_head.weight"]
    known = known or {}
    header, offset = {}, 0
    for name, tensor in state.items():
        dtype, size = ("F32", 4) if name in known else ("F16", 2)
        end = offset + size * tensor.numel()
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for index, (name, tensor) in enumerate(state.items()):
            if name in known:
                stream.write(known[name].data)
                continue
            # Equal layers would be stored once by whoever looks for them.
            here = np.roll(noise, index * _SHIFT)
            block = _block(name, tuple(tensor.shape), here).astype(np.float16)
            for start in range(0, tensor.numel(), _BLOCK):
                stream.write(block[: tensor.numel() - start].tobytes())


def _block(name: str, shape: tuple[int, ...], noise: NDArray[np.float32]) -> NDArray[np.float32]:
    """Norms near one, matrices that keep the size of what they are applied to."""
    if name.endswith("logit_scale"):
        return np.full(1, 4.6, np.float32)
    if "norm" in name or "_ln" in name or "layrnorm" in name:
        return float(name.endswith("weight")) + 0.05 * noise
    if name.endswith("bias") or len(shape) < 2:
        return 0.05 * noise
    return noise / math.sqrt(math.prod(shape[1:]))


def measure(folder: Path, kind: str, dtype: str, decoder: str | None) -> Row:
    """Returns what one export took; `folder` is made and removed."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    try:
        write_checkpoint(checkpoint, *_KINDS[kind])
        command = [sys.executable, "-m", "ppllava_export.cli", str(checkpoint), str(bundle)]
        command += ["--skip-tokenizer", "--dtype", dtype]
        command += ["--decoder", decoder] if decoder else []
        began = time.perf_counter()
        peak = _peak_memory(command, folder / "time.txt")
        seconds = time.perf_counter() - began
        manifest = Manifest.from_json((bundle / MANIFEST).read_text(encoding="utf-8"))
        paths = [*(graph.path for graph in manifest.graphs.values()), manifest.decoder.path]
        weights = {
            path: sum(file.size for name, file in manifest.files.items() if name.startswith(path))
            for path in paths
        }
        largest = max(weights, key=lambda name: weights[name])
        return Row(kind, str(manifest.precision), largest, weights[largest], peak, seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _peak_memory(command: list[str], report: Path) -> int:
    """Returns the peak resident bytes of a command, which must succeed; its output is on stderr."""
    waiting = [sys.executable, "-c", _WAIT, str(report), *command]
    subprocess.run(waiting, check=True, stdout=sys.stderr)
    return int(report.read_text(encoding="ascii")) * 1024


def main() -> None:
    """Prints a table of the exports, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="room for a checkpoint and its bundle")
    parser.add_argument("kinds", nargs="+", choices=tuple(_KINDS))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--decoder", choices=("int8", "int4"))
    arguments = parser.parse_args()
    print(
        "| checkpoint | precision | largest graph | weights, GB | bound, GB | peak, GB | held | s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in arguments.kinds:
        row = measure(arguments.folder / kind, kind, arguments.dtype, arguments.decoder)
        print(row, flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx-ir", "onnxruntime"))
    print(f"\npython {platform.python_version()}, {versions}, {platform.machine()}")


if __name__ == "__main__":
    main()
