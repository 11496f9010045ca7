"""A checkpoint folder → its config and its model, strictly: what does not fit is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ppllava_engines.errors import DataError, NotFoundError

from .config_files import CheckpointFiles, read_model_config
from .modules.config import ModelConfig
from .modules.model import PPLLaVA
from .modules.tower import layers_needed
from .weights import Weights

_TOWER = "vision_tower.vision_model."
_LAYER = re.compile(re.escape(_TOWER) + r"encoder\.layers\.(\d+)\.")
_LM_HEAD = "language_model.lm_head.weight"
_EMBEDDING = "language_model.model.embed_tokens.weight"
# Present in published checkpoints and read by nothing here: buffers, what follows the last layer
# that PPLLaVA uses, and the separator of image tiles.
_UNUSED = re.compile(
    rf"{re.escape(_TOWER)}(post_layernorm|head)\..*"
    r"|(.*\.)?position_ids"
    r"|language_model\..*\.rotary_emb\.inv_freq"
    r"|image_newline"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found complete.

    Attributes:
        config: What it says of its model.
        files: Where its parts are.
        weights: Every tensor in its files, memory-mapped.
    """

    config: ModelConfig
    files: CheckpointFiles
    weights: Weights

    def model(self) -> PPLLaVA:
        """Returns the model in evaluation mode, its weights mapped from the files.

        Towers and projector are fp32; the decoder keeps the type it is stored in, because it is
        too large to be held twice.
        """
        expected = _expected_shapes(self.config)
        with torch.device("meta"):
            model = PPLLaVA(self.config)
        tensors = {name: self.weights[name] for name in expected if name in self.weights}
        if _LM_HEAD not in tensors:
            tensors[_LM_HEAD] = tensors[_EMBEDDING]
        tensors.setdefault("image_newline", torch.zeros(self.config.decoder_width))
        model.load_state_dict(tensors, assign=True, strict=True)
        for part in (model.vision_tower, model.multi_modal_projector):
            part.float()
        # Its one buffer is computed, not stored, so the meta device left it without values.
        decoder = model.language_model.model
        decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
        return model.requires_grad_(False).eval()


def load_config(folder: Path) -> ModelConfig:
    """Returns what the checkpoint in `folder` says of its model.

    Raises:
        DataError, IncompatibleError, NotFoundError: See `config_files.read_model_config`.
    """
    return read_model_config(_existing(folder), lambda: Weights(folder).shapes)[0]


def load_checkpoint(folder: Path, limit: float = torch.finfo(torch.float32).max) -> Checkpoint:
    """Returns the checkpoint in `folder` after every tensor was found and looked at.

    Args:
        folder: Holds config.json and model.safetensors, or shards with their index.
        limit: The largest magnitude of a weight that the export's float type holds.

    Raises:
        DataError: Missing, unexpected or misshapen tensors, all named at once; values that are
            not finite; malformed files.
        IncompatibleError: A model variant that this release does not export.
        NotFoundError: A file is missing.
    """
    folder = _existing(folder)
    config, files = read_model_config(folder, lambda: Weights(folder).shapes)
    weights = Weights(folder)
    expected = _expected_shapes(config)
    _check_shapes(folder, config, expected, weights.shapes)
    weights.check_values({name: None for name in expected if name in weights}, limit)
    return Checkpoint(config, files, weights)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise NotFoundError(f"checkpoint {folder}: no such folder")
    return folder


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = PPLLaVA(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_shapes(
    folder: Path,
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    optional = {"image_newline"} | ({_LM_HEAD} if config.decoder["tie_word_embeddings"] else set())
    missing = [
        f"{name} {shape}"
        for name, shape in expected.items()
        if name not in found and name not in optional
    ]
    unexpected = [
        f"{name} {shape}"
        for name, shape in found.items()
        if name not in expected and not _is_unused(name, config)
    ]
    misshapen = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise DataError(f"checkpoint {folder}: tensors are wrong, {'; '.join(problems)}")


def _is_unused(name: str, config: ModelConfig) -> bool:
    layer = _LAYER.match(name)
    if layer is not None:
        total = config.vision.encoder.num_hidden_layers
        return layers_needed(total, config.feature_layer) <= int(layer[1]) < total
    return _UNUSED.fullmatch(name) is not None
