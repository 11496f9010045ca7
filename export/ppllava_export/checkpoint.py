"""A checkpoint folder → its config and its model, strictly: what does not fit is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ppllava_engines.errors import DataError, NotFoundError

from .config_files import CheckpointFiles, read_model_config
from .modules.config import ModelConfig
from .modules.model import PPLLaVA
from .modules.unused import is_unused
from .sections import is_normal
from .weights import Weights, check_values, differences

_LM_HEAD = "language_model.lm_head.weight"
_EMBEDDING = "language_model.model.embed_tokens.weight"
_IMAGE_NEWLINE = "image_newline"
_LOGIT_SCALE = "multi_modal_projector.logit_scale"
_ALIGNMENT = ("multi_modal_projector.clip_", "multi_modal_projector.logit_")
_ONE_NUMBER = (((), (1,)), ((1,), ()))  # the logit scale, published in either shape


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found complete.

    Attributes:
        config: What it says of its model.
        files: Where its parts are.
        weights: Every tensor in its files, memory-mapped.
        overlay: Tensors by name that take the place of those in its files.
    """

    config: ModelConfig
    files: CheckpointFiles
    weights: Weights
    overlay: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor that the model calls `name`, in the type it is stored in.

        Raises:
            KeyError: There is none.
        """
        if name in self.overlay:
            return self.overlay[name]
        if name == _LM_HEAD and name not in self.weights:
            return self.weights[_EMBEDDING]
        return self.weights[name]

    def image_newline(self) -> Tensor | None:
        """Returns the separator (D,) of an image's rows, None when the checkpoint has none."""
        return self.weights.get(_IMAGE_NEWLINE)

    def logit_scale(self) -> float:
        """Returns what cosines are multiplied by before the softmax over all tokens."""
        return float(self.tensor(_LOGIT_SCALE).double().exp())

    def skeleton(self) -> PPLLaVA:
        """Returns the model in evaluation mode without its weights, to be traced."""
        return _skeleton(self.config)

    def model(self) -> PPLLaVA:
        """Returns the model in evaluation mode, its weights mapped from the files as stored.

        Compute with it inside `mapped.streamed_fp32`: the types of its parts differ, and all of it
        in fp32 may not fit into memory.
        """
        model = self.skeleton()
        tensors = {}
        for name, expected in model.state_dict().items():
            if name == _IMAGE_NEWLINE and name not in self.weights:
                tensors[name] = torch.zeros(expected.shape)
            else:
                tensors[name] = self.tensor(name).reshape(expected.shape)
        model.load_state_dict(tensors, assign=True, strict=True)
        # Its one buffer is computed, not stored, so the meta device left it without values.
        decoder = model.language_model.model
        decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
        return model.requires_grad_(False)


def load_config(folder: Path) -> ModelConfig:
    """Returns what the checkpoint in `folder` says of its model.

    Raises:
        DataError, IncompatibleError, NotFoundError: See `config_files.read_model_config`.
    """
    return read_model_config(_existing(folder), lambda: Weights(folder).shapes)[0]


def load_checkpoint(
    folder: Path, limit: float = torch.finfo(torch.float32).max, clip: str | None = None
) -> Checkpoint:
    """Returns the checkpoint in `folder` after every tensor was found and looked at.

    Args:
        folder: Holds config.json and the weights, see `weights.Weights`.
        limit: The largest magnitude of a weight that the export's float type holds.
        clip: `open_clip:MODEL[:FILE]`, whose alignment takes the place of the checkpoint's.

    Raises:
        DataError: Missing, unexpected or misshapen tensors, all named at once; values that are
            not finite; a logit scale or temperature that float32 does not hold; malformed files.
        IncompatibleError: A model variant that this release does not export.
        NotFoundError: No such folder, or no config.json in it.
    """
    folder = _existing(folder)
    shapes = None if clip else lambda: Weights(folder).shapes
    config, files = read_model_config(folder, shapes)
    weights = Weights(folder)
    overlay: Mapping[str, Tensor] = {}
    if clip is not None:
        from .open_clip_source import replace_alignment

        config, overlay = replace_alignment(config, clip)
    checkpoint = Checkpoint(config, files, weights, overlay)
    expected = {name: tuple(t.shape) for name, t in _skeleton(config).state_dict().items()}
    _check_shapes(checkpoint, expected)
    optional = _optional(config)
    tensors = {name: checkpoint.tensor(name) for name in expected if name not in optional}
    tensors |= {name: weights[name] for name in optional if name in weights}
    check_values(tensors, f"checkpoint {folder}", limit, weights.release)
    _check_sharpness(checkpoint)
    return checkpoint


def _skeleton(config: ModelConfig) -> PPLLaVA:
    try:
        with torch.device("meta"):
            return PPLLaVA(config).requires_grad_(False).eval()
    except RuntimeError as error:  # there is no memory that could be missing: torch cannot count it
        raise DataError(
            f"{config.name}: sizes beyond any tensor's in config.json: {error}"
        ) from error


def _optional(config: ModelConfig) -> set[str]:
    return {_IMAGE_NEWLINE} | ({_LM_HEAD} if config.decoder["tie_word_embeddings"] else set())


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise NotFoundError(f"checkpoint {folder}: no such folder")
    try:  # what reads weights and tokenizers takes no other paths, and the name is in the bundle
        str(folder.resolve()).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"checkpoint {folder}: its path is not UTF-8, rename it") from error
    return folder


def _check_sharpness(checkpoint: Checkpoint) -> None:
    """Raises DataError for a relevance that float32 cannot weigh tokens by."""
    scale, temperature = checkpoint.logit_scale(), checkpoint.config.temperature
    if not is_normal(scale) or not is_normal(scale / temperature):
        raise DataError(
            f"checkpoint {checkpoint.files.folder}: {_LOGIT_SCALE} stands for a factor of "
            f"{scale:g}, and {scale / temperature:g} over pooling_temp {temperature:g}, expected "
            "both in float32's normal range"
        )


def _check_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    config, overlay = checkpoint.config, checkpoint.overlay
    optional = _optional(config)
    held = checkpoint.weights.shapes | {name: tuple(t.shape) for name, t in overlay.items()}
    found = {}
    for name, shape in held.items():
        replaced = bool(overlay) and name.startswith(_ALIGNMENT)
        if name in expected or not (replaced or is_unused(name, config)):
            one = (shape, expected.get(name)) in _ONE_NUMBER
            found[name] = expected[name] if one else shape
    absent = optional - found.keys()
    wanted = {name: shape for name, shape in expected.items() if name not in absent}
    problems = differences(wanted, found)
    if problems:
        raise DataError(f"checkpoint {checkpoint.files.folder}: tensors are wrong, {problems}")
