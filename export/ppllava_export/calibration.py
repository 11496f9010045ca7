"""Frames of given videos → what the vision graph's linear layers are fed.

The frames come through the runtime's own reading and preprocessing, so that what is measured is
what the runtime will feed: the one place where the exporter knows the runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppllava_runtime.preprocess import pixel_values
from ppllava_runtime.video import read_clip

from .checkpoint import Checkpoint
from .mapped import streamed_fp32
from .modules.config import ModelConfig
from .vision_int8 import Channels

_FRAMES_PER_VIDEO = 8
_NO_PRODUCTS = (nn.LayerNorm, nn.Conv2d, nn.Embedding)


class Encoder(Protocol):
    """What is looked at while it encodes frames, e.g. a PPLLaVA."""

    def encode(self, pixel_values: Tensor) -> object:
        """Runs the linear layers that are looked at on frames (T, 3, S, S)."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module below it by name."""


def calibrate(checkpoint: Checkpoint, videos: Sequence[Path]) -> dict[str, Channels]:
    """Returns what each linear layer of the vision graph is fed, by module name.

    Memory does not grow with the number of videos: one is looked at after the other, 8 frames of
    each, and of what a layer is fed two numbers per channel are kept.

    Args:
        checkpoint: Its weights are widened to fp32 a module at a time.
        videos: Files like those that the model will see.

    Raises:
        DataError, NotFoundError, StorageError, UnavailableError: A video; see
            `ppllava_runtime.video.read_clip`.
    """
    model = checkpoint.model()
    with torch.no_grad(), streamed_fp32(model, checkpoint.weights.release):
        return observe(model, (read_frames(video, checkpoint.config) for video in videos))


def read_frames(video: Path, config: ModelConfig) -> NDArray[np.float32]:
    """Returns pixel_values (T, 3, S, S) of a few frames spread over a video.

    Raises:
        DataError, NotFoundError, StorageError, UnavailableError: As `read_clip`.
    """
    frames = read_clip(video, min(_FRAMES_PER_VIDEO, config.max_frames)).frames
    return pixel_values(frames, config.vision.image_size, config.image_mean, config.image_std)


def observe(model: Encoder, clips: Iterable[NDArray[np.float32]]) -> dict[str, Channels]:
    """Returns what each linear layer is fed while the model encodes pixel_values of clips."""
    totals: dict[str, _Total] = {}
    with _watched(model, totals):
        for pixels in clips:
            model.encode(torch.from_numpy(pixels))
    return {name: total.channels() for name, total in totals.items()}


class _Total:
    """Sums over all inputs of a layer."""

    def __init__(self, width: int) -> None:
        self._peaks = torch.zeros(width)
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._count = 0

    def add(self, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        self._peaks = torch.maximum(self._peaks, rows.abs().amax(dim=0))
        self._squares += rows.square().sum(dim=0)
        self._count += len(rows)

    def channels(self) -> Channels:
        powers = (self._squares / self._count).float()
        return Channels(self._peaks.numpy(), powers.numpy())


@contextmanager
def _watched(model: Encoder, totals: dict[str, _Total]) -> Iterator[None]:
    """Adds what linear layers are fed to `totals` in the block."""

    def watch(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            totals.setdefault(name, _Total(args[0].shape[-1])).add(args[0])

        return add

    # The text tower and linear_2 are looked at as well, but do not run.
    hooks = [
        part.register_forward_pre_hook(watch(name))
        for name, part in model.named_modules()
        if _is_linear(part)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_linear(part: nn.Module) -> bool:
    """Whether a module is one product with a weight, a part of a packed one included."""
    leaf = not any(True for _ in part.children())
    return (
        leaf and any(p.ndim == 2 for p in part.parameters()) and not isinstance(part, _NO_PRODUCTS)
    )
