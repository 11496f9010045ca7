"""What a checkpoint says about its model, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ppllava_engines.bundle import Pooling

Window = tuple[int, int, int]
Family = Literal["clip", "siglip"]


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one transformer encoder (pre-norm blocks).

    Attributes:
        hidden_size: Width C of the tokens.
        intermediate_size: Width of each block's feed-forward layer.
        num_hidden_layers: Blocks in the published encoder, all of them.
        num_attention_heads: Heads; must divide `hidden_size`.
        hidden_act: `quick_gelu` (CLIP), `gelu` or `gelu_pytorch_tanh` (SigLIP).
        layer_norm_eps: Epsilon of every layer norm.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class BTAdapterConfig:
    """The temporal branch beside the last `depth` blocks of a CLIP tower.

    Attributes:
        depth: Blocks of the branch, 1 up to the tower's own.
        max_frames: Rows of its time embedding, the largest T.
    """

    depth: int
    max_frames: int


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower over square images of `image_size` pixels; only CLIP's has a branch."""

    encoder: EncoderConfig
    image_size: int
    patch_size: int
    btadapter: BTAdapterConfig | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches per frame; pixels that fill no patch are not looked at."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class TextConfig:
    """A text tower.

    Attributes:
        encoder: Its transformer.
        vocab_size: Rows of its token embedding.
        positions: Rows of its (extended) position table.
        extended: Whether it holds two such tables, of which the second begins at position 20.
        bos_token_id: Begins a question; None in a SigLIP tower.
        eos_token_id: Ends a question; 2 in OpenAI's configs, where it stands for the highest id.
        pad_token_id: Fills a question up to exactly `positions` ids, as SigLIP's towers take it;
            None where padding changes nothing and is left away.
    """

    encoder: EncoderConfig
    vocab_size: int
    positions: int
    extended: bool
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A PPLLaVA checkpoint.

    Attributes:
        name: Folder name of the checkpoint.
        vision: The tower that encodes frames.
        text: The tower that encodes the question.
        projection_dim: Width P in which patches and question are compared.
        decoder: The decoder's own config, as `transformers` takes it; `model_type` is `llama` or
            `qwen2`.
        feature_layer: Index into the tower's hidden states, e.g. -2.
        grid: (h, w) of the patch tokens.
        kernel, stride: Pooling window of a video over axes (T, h, w).
        image_kernel, image_stride: The same for still images.
        temperature: tau of the window softmax.
        max_frames: Largest T.
        image_token_index: Id whose embedding the pooled tokens replace.
        image_mean, image_std: Per-channel normalisation of RGB in [0, 1].
        eos_token_ids: Ids that end an answer; none when the checkpoint states none.
        family: Which towers and which alignment.
        image_grid_pinpoints: Sizes (height, width) in pixels, multiples of the tower's, to which a
            still image may be enlarged and cut into tiles.
        pooling: The checkpoint's own words where it states an output size: kernel and stride then
            depend on T, and `kernel` and `stride` are those of the default number of frames.
        visual_head: Sizes of the norm and head that make keys of patch tokens, where they are not
            the vision tower's own but came with another text tower.
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
    family: Family = "clip"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    pooling: Pooling | None = None
    visual_head: EncoderConfig | None = None

    @property
    def decoder_width(self) -> int:
        """Width D of the decoder's embeddings."""
        return int(self.decoder["hidden_size"])

    def window(self, frames: int) -> tuple[Window, Window]:
        """Returns (kernel, stride) for a video of `frames` frames.

        Raises:
            ValueError: The checkpoint pools to an output size that so few frames do not fill.
        """
        if self.pooling is None:
            return self.kernel, self.stride
        return self.pooling.window((frames, *self.grid))

    @property
    def trunk_blocks(self) -> int:
        """How many of the tower's own blocks the features depend on; the rest is never built."""
        return layers_needed(self.vision.encoder.num_hidden_layers, self.feature_layer)

    @property
    def branch_blocks(self) -> int:
        """How many blocks of the temporal branch the features depend on; 0 without a branch."""
        if self.vision.btadapter is None:
            return 0
        first = self.vision.encoder.num_hidden_layers - self.vision.btadapter.depth
        return max(0, self.trunk_blocks - first)

    @property
    def frames_coupled(self) -> bool:
        """Whether a frame's tokens depend on the video's other frames."""
        return self.branch_blocks > 0


def layers_needed(num_hidden_layers: int, feature_layer: int) -> int:
    """Returns how many blocks `hidden_states[feature_layer]` depends on.

    `hidden_states` has one entry more than there are blocks: entry 0 is the embeddings.

    Raises:
        ValueError: The index is outside the hidden states.
    """
    entries = num_hidden_layers + 1
    if not -entries <= feature_layer < entries:
        raise ValueError(
            f"vision_feature_layer {feature_layer} is outside the {entries} hidden states"
        )
    return feature_layer % entries
