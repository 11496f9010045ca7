"""The published computation in its own order, in torch and float32: what ours is measured against.

Every frame through the tower at once; the whole projector on every token; the question padded to
all of its positions; windows cut out by unfolding. Its results are those of shared/golden, which
the research code gave. It has the tower's needed layers only and torch's fused attention, both of
which are to its advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.modules.config import Window
from ppllava_export.modules.model import PPLLaVA
from ppllava_export.modules.pooling import strided_weighted_pool, token_weights

Array = NDArray[np.float32]
Results = tuple[NDArray[Any], NDArray[Any]]


class Reference:
    """A checkpoint, computed as the research code does.

    Args:
        model: Its modules, with weights in float32.
    """

    def __init__(self, model: PPLLaVA) -> None:
        self._model = model.eval()
        self._positions = model.config.text.positions

    @staticmethod
    def open(checkpoint: Path) -> Reference:
        """The reference for the checkpoint in a folder, whose weights it widens to float32."""
        model = load_checkpoint(checkpoint).model()
        # Not the decoder's: nothing here reaches it.
        model.vision_tower.float()
        model.multi_modal_projector.float()
        return Reference(model)

    @torch.inference_mode()
    def tokens(self, pixel_values: Array) -> Array:
        """Patch tokens (T,L,C) of frames (T,3,S,S), all in one run."""
        tokens: Tensor = self._model.vision_tower.vision_model(torch.from_numpy(pixel_values))
        return tokens.numpy()

    @torch.inference_mode()
    def align(
        self,
        tokens: Array,
        input_ids: NDArray[np.int64],
        window: tuple[Window, Window] | None = None,
    ) -> tuple[Array, Array]:
        """Pooled tokens (N,D) and the relevance map (T,h,w).

        Args:
            tokens: (T,L,C).
            input_ids: The question's (1,n), which are padded here.
            window: Kernel and stride; the checkpoint's own unless given.
        """
        config, projector = self._model.config, self._model.multi_modal_projector
        seen = torch.from_numpy(tokens)
        grid = (len(seen), *config.grid)
        padding = self._positions - input_ids.shape[1]
        # The end again: what follows the first one is seen by nothing before it.
        ids = F.pad(torch.from_numpy(input_ids), (0, padding), value=int(input_ids[0, -1]))
        values = projector.linear_2(F.gelu(projector.linear_1(seen)))
        keys = F.normalize(projector.aligned_tokens(seen), dim=-1)
        text = F.normalize(projector.aligned_text(ids), dim=-1)
        relevance = (keys @ text[0]).view(grid)
        kernel, stride = window or config.window(len(seen))
        pooled = strided_weighted_pool(
            values.view(*grid, -1),
            token_weights(relevance, projector.logit_scale),
            kernel,
            stride,
            config.temperature,
        )
        return pooled.numpy(), relevance.numpy()


@dataclass(frozen=True)
class Agreement:
    """How close one side's results are to another's.

    Attributes:
        error: The largest difference of pooled tokens, relative to the peak of those expected.
        cosine: Of pooled tokens, in the mean.
        correlation: Of the relevance map's ranks.
    """

    error: float
    cosine: float
    correlation: float

    @staticmethod
    def of(got: Results, expected: Results) -> Agreement:
        """The agreement of two pairs of pooled tokens (N,D) and relevance map (T,h,w).

        Raises:
            ValueError: Their shapes differ, so that they are not results of the same work.
        """
        shapes = [tuple(array.shape for array in side) for side in (got, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"pooled tokens and relevance are {shapes[0]}, expected {shapes[1]}: these two "
                "sides do not compute the same"
            )
        a, b = (pooled.astype(np.float64) for pooled, _ in (got, expected))
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return Agreement(
            float(np.abs(a - b).max() / np.abs(b).max()),
            float(np.mean((a * b).sum(axis=-1) / norms)),
            rank_correlation(got[1], expected[1]),
        )

    def __str__(self) -> str:
        return (
            f"pooled tokens differ by {self.error:.1e} of their peak, cosine {self.cosine:.6f}; "
            f"rank correlation of relevance {self.correlation:.6f}"
        )


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's: the correlation of two arrays' ranks; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, where, counts = np.unique(values.reshape(-1), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts - 1) / 2)[where]
    return ranks
