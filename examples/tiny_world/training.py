"""What the three stages share: steps, schedule, logs, and states to resume from."""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

_LOG_EVERY = 50
_SAVE_EVERY = 200
_WARM_UP = 100
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage learns: warm-up, then a cosine to zero."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.05

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        warm = min((step + 1) / _WARM_UP, 1.0)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def keep_memory() -> None:
    """Makes glibc keep freed memory: activations are big, and faulting pages in costs 3x."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in (
            (_M_MMAP_THRESHOLD, 1 << 30),
            (_M_TRIM_THRESHOLD, (1 << 31) - 1),
            (_M_TOP_PAD, 1 << 28),
        ):
            libc.mallopt(option, value)


class _Seeded(Dataset[BatchT]):
    """Batch i is a pure function of seed + i, so that a resumed stage sees what it would have."""

    def __init__(self, make: Callable[[int], BatchT], seed: int, first: int, steps: int) -> None:
        self._make, self._seed, self._first, self._steps = make, seed, first, steps

    def __len__(self) -> int:
        return self._steps - self._first

    def __getitem__(self, index: int) -> BatchT:
        return self._make(self._seed + self._first + index)


def _batches(
    make: Callable[[int], BatchT], seed: int, first: int, steps: int, workers: int
) -> Iterator[BatchT]:
    data = _Seeded(make, seed, first, steps)
    yield from DataLoader(
        data,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )


def train(
    stage: str,
    folder: Path,
    model: nn.Module,
    learned: list[nn.Parameter],
    schedule: Schedule,
    make: Callable[[int], BatchT],
    loss_of: Callable[[BatchT, int], tuple[Tensor, dict[str, float]]],
    seed: int,
    workers: int = 1,
) -> None:
    """Trains one stage to its end, from its last saved state if there is one.

    Writes `folder`/STAGE.pt (state, replaced atomically) and appends to `folder`/STAGE.jsonl
    (figures, one object per line).

    Args:
        stage: Name of the files.
        folder: Where runs are kept.
        model: Saved whole.
        learned: Parameters that change.
        schedule: Steps and learning rate.
        make: Seed -> batch; runs in `workers` processes beside the training.
        loss_of: (batch, step) -> loss and figures to log.
        seed: Seed of the stage's first batch.
        workers: Processes that make batches, 0 for none.
    """
    optimiser = torch.optim.AdamW(
        learned, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay
    )
    state_file, log_file = folder / f"{stage}.pt", folder / f"{stage}.jsonl"
    first, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, seconds = state["step"], state["seconds"]
        print(f"{stage}: resumed at step {first} of {schedule.steps}", flush=True)
    begun, logged, sums = time.monotonic() - seconds, first, dict[str, float]()
    for step, batch in enumerate(_batches(make, seed, first, schedule.steps, workers), first):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        loss, figures = loss_of(batch, step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        for name, value in {"loss": loss.item(), **figures}.items():
            sums[name] = sums.get(name, 0.0) + value
        done = step + 1
        if done % _LOG_EVERY == 0 or done == schedule.steps:
            means = {name: round(value / (done - logged), 4) for name, value in sums.items()}
            line = {"step": done, "seconds": round(time.monotonic() - begun), **means}
            with log_file.open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(f"{stage} {json.dumps(line)}", flush=True)
            logged, sums = done, {}
        if done % _SAVE_EVERY == 0 or done == schedule.steps:
            partial = state_file.with_suffix(".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": done,
                    "seconds": time.monotonic() - begun,
                },
                partial,
            )
            partial.replace(state_file)
