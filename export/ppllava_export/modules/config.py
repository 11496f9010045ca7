"""What a checkpoint says about its model, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Window = tuple[int, int, int]


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one CLIP transformer encoder (pre-norm blocks).

    Attributes:
        hidden_size: Width C of the tokens.
        intermediate_size: Width of each block's feed-forward layer.
        num_hidden_layers: Blocks in the published encoder, all of them.
        num_attention_heads: Heads; must divide `hidden_size`.
        hidden_act: `quick_gelu` (CLIP) or `gelu`.
        layer_norm_eps: Epsilon of every layer norm.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower over square images of `image_size` pixels."""

    encoder: EncoderConfig
    image_size: int
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches per frame."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text tower; `positions` counts the rows of its (extended) position table."""

    encoder: EncoderConfig
    vocab_size: int
    positions: int
    extended: bool
    bos_token_id: int
    eos_token_id: int


@dataclass(frozen=True)
class ModelConfig:
    """A PPLLaVA checkpoint of the CLIP family with a Llama decoder.

    Attributes:
        name: Folder name of the checkpoint.
        vision: The tower that encodes frames.
        text: The tower that encodes the question.
        projection_dim: Width P in which patches and question are compared.
        decoder: The decoder's own config, as `transformers.LlamaConfig` takes it.
        feature_layer: Index into the tower's hidden states, e.g. -2.
        grid: (h, w) of the patch tokens.
        kernel, stride: Pooling window of a video over axes (T, h, w).
        image_kernel, image_stride: The same for still images.
        temperature: tau of the window softmax.
        max_frames: Largest T.
        image_token_index: Id whose embedding the pooled tokens replace.
        image_mean, image_std: Per-channel normalisation of RGB in [0, 1].
        eos_token_ids: Ids that end an answer.
    """

    name: str
    vision: VisionConfig
    text: TextConfig
    projection_dim: int
    decoder: dict[str, Any]
    feature_layer: int
    grid: tuple[int, int]
    kernel: Window
    stride: Window
    image_kernel: Window
    image_stride: Window
    temperature: float
    max_frames: int
    image_token_index: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    eos_token_ids: tuple[int, ...]

    @property
    def decoder_width(self) -> int:
        """Width D of the decoder's embeddings."""
        return int(self.decoder["hidden_size"])
