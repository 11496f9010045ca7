"""BT-Adapter: a temporal branch beside CLIP's last blocks, which couples all frames of a video.

A frame's class token is the same in every frame of the branch, their mean over time; each frame
holds a copy, so that a branch has the shape of its trunk, (T, 1 + L, C).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .config import BTAdapterConfig, EncoderConfig, VisionConfig
from .encoder import Attention, Block
from .tower import ClipVisionTower

_LAYER_NORM_EPS = 1e-5  # in the branch, whatever the tower's is


class TimeBlock(nn.Module):
    """Attention over the frames of one patch; class tokens pass by."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_fc = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (T, 1 + L, C)."""
        by_patch = self.layer_norm1(x[:, 1:].transpose(0, 1))
        change = self.temporal_fc(self.self_attn(by_patch)).transpose(0, 1)
        return torch.cat([x[:, :1], x[:, 1:] + change], dim=1)


class SpaceBlock(Block):
    """A block per frame, whose class tokens are told the mean of what each frame told its own."""

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Returns (T, 1 + L, C)."""
        x = x + share_class_token(self.self_attn(self.layer_norm1(x), causal))
        return x + self.mlp(self.layer_norm2(x))


class BTAdapterTower(ClipVisionTower):
    """CLIP's tower and its temporal branch up to the hidden state that PPLLaVA reads.

    One call is one video: every frame's tokens depend on all the others.
    """

    def __init__(
        self,
        config: VisionConfig,
        adapter: BTAdapterConfig,
        num_layers: int,
        num_branch_layers: int,
    ) -> None:
        super().__init__(config, num_layers)
        sizes = dataclasses.replace(config.encoder, layer_norm_eps=_LAYER_NORM_EPS)
        self.btadapter_T_layers = nn.ModuleList(TimeBlock(sizes) for _ in range(num_branch_layers))
        self.btadapter_S_layers = nn.ModuleList(SpaceBlock(sizes) for _ in range(num_branch_layers))
        self.btadapter_time_embed = nn.Embedding(adapter.max_frames, sizes.hidden_size)
        self.btadapter_cls_token = nn.Parameter(torch.zeros(1, 1, sizes.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns patch tokens (T, L, C), the average of trunk and branch.

        Args:
            pixel_values: Normalised frames (T, 3, S, S) of one video, T up to the adapter's. Three
                frames are taken with time and colour swapped, see `as_the_reference_reads`.
        """
        x = self.pre_layrnorm(self.embeddings(as_the_reference_reads(pixel_values)))
        alone = len(self.encoder.layers) - len(self.btadapter_T_layers)
        for block in self.encoder.layers[:alone]:
            x = block(x)
        branch: Tensor | None = None
        beside = zip(
            self.encoder.layers[alone:],
            self.btadapter_T_layers,
            self.btadapter_S_layers,
            strict=True,
        )
        for block, time_block, space_block in beside:
            x = block(x)
            shared = share_class_token(x)
            branch = self._begin(shared) if branch is None else branch + shared
            branch = space_block(time_block(branch))
        assert branch is not None  # a tower without branch blocks is a ClipVisionTower
        return (x[:, 1:] + branch[:, 1:]) / 2

    def _begin(self, x: Tensor) -> Tensor:
        """Returns the branch's first input: positions once more, and times, upon the trunk's."""
        positions = self.embeddings.position_embedding.weight.to(x.dtype)
        times = self.btadapter_time_embed.weight[: x.shape[0], None].to(x.dtype)
        class_token = (x[:, :1] + self.btadapter_cls_token + positions[:1]) / 2
        return torch.cat([class_token, x[:, 1:] + positions[1:] + times], dim=1)


def share_class_token(x: Tensor) -> Tensor:
    """Returns tokens (T, 1 + L, C) whose class tokens are replaced by their mean over T."""
    mean = x[:, :1].mean(dim=0, keepdim=True)
    return torch.cat([mean.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)


def as_the_reference_reads(pixel_values: Tensor) -> Tensor:
    """Returns frames (T, 3, S, S); of exactly three frames, with time and colour swapped.

    The research code tells colours from frames by which axis is three long, and looks at time
    first; its outputs for three frames are reproduced only so. T is compared in a tensor, because
    one traced graph serves every T.
    """
    frames, colours, *sides = pixel_values.shape
    swapped = pixel_values.reshape(colours, frames, *sides).transpose(0, 1)
    length = torch.scalar_tensor(frames, dtype=torch.int64, device=pixel_values.device)
    return torch.where(length == colours, swapped, pixel_values)
