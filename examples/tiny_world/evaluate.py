"""Exact answers on held-out clips, by kind of question and by number of visual tokens.

`python -m tiny_world.evaluate [--clips 1000]` measures the committed checkpoint in torch (fp32), on
clips whose seeds are used nowhere in training, and writes accuracy.json and accuracy.png beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.modules.config import Window
from ppllava_export.modules.model import PPLLaVA

from .instruct import Batch, clip_moments, right_answers
from .model import FRAME_SIZE, Vocabulary, normalise
from .questions import KINDS, ask
from .training import keep_memory
from .vocabulary import write_json
from .world import render, sample_clip

HERE = Path(__file__).parent
HELD_OUT = range(90_000_000, 90_010_000)
# 1, 2, 4, 8, 16, 36 and 72 tokens; nothing was trained at 8 and 72
BUDGETS: tuple[tuple[Window, Window], ...] = (
    ((8, 9, 9), (8, 9, 9)),
    ((4, 9, 9), (4, 9, 9)),
    ((2, 9, 9), (2, 9, 9)),
    ((1, 9, 9), (1, 9, 9)),
    ((2, 5, 5), (2, 4, 4)),
    ((2, 3, 3), (2, 3, 3)),
    ((1, 3, 3), (1, 3, 3)),
)
_CLIPS_AT_ONCE = 20


def num_tokens(kernel: Window, stride: Window, size: Window = (8, 9, 9)) -> int:
    """Returns how many visual tokens a pooling leaves of `size` patch tokens."""
    return int(np.prod([(i - k) // s + 1 for i, k, s in zip(size, kernel, stride, strict=True)]))


@torch.no_grad()
def held_out_batches(model: PPLLaVA, clips: int) -> list[Batch]:
    """Returns batches of held-out clips, one question of every kind that a clip has."""
    batches = []
    seeds = HELD_OUT[:clips]
    for i in track(range(0, clips, _CLIPS_AT_ONCE), description="encoding held-out clips"):
        part = seeds[i : i + _CLIPS_AT_ONCE]
        frames = [render(sample_clip(s), clip_moments(s), FRAME_SIZE) for s in part]
        pixels = normalise(torch.from_numpy(np.concatenate(frames)), model.config)
        tokens = model.vision_tower.vision_model(pixels).unflatten(0, (len(part), -1)).half()
        questions, clip_of = [], []
        for c, seed in enumerate(part):
            rng = np.random.default_rng([seed, 7])
            for kind in KINDS:
                question = ask(sample_clip(seed), kind, rng)
                if question is not None:
                    questions.append(question)
                    clip_of.append(c)
        batches.append(Batch(tokens, questions, torch.tensor(clip_of)))
    return batches


def accuracy(
    model: PPLLaVA,
    vocabulary: Vocabulary,
    batches: list[Batch],
    kernel: Window,
    stride: Window,
    guided: bool,
) -> dict[str, float]:
    """Returns the share of exact answers by kind, and over all questions as `all`."""
    marks = defaultdict[str, list[bool]](list)
    for batch in batches:
        rights = right_answers(model, vocabulary, batch, kernel, stride, guided)
        for question, right in zip(batch.questions, rights, strict=True):
            marks[question.kind].append(right)
            marks["all"].append(right)
    return {kind: round(float(np.mean(marks[kind])), 4) for kind in (*KINDS, "all")}


def plot(curves: dict[str, list[float]], tokens: list[int], file: Path) -> None:
    """Writes a picture of accuracy against the number of visual tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {"prompt-guided": ("o-", "#c2410c"), "average": ("s--", "#64748b")}
    for name, values in curves.items():
        style, colour = styles[name]
        axes.plot(tokens, [100 * v for v in values], style, color=colour, label=f"{name} pooling")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.set_xlabel("visual tokens (of 648 patch tokens)")
    axes.set_ylabel("exact answers, %")
    axes.set_title("Tiny world: one checkpoint, pooled to different budgets")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(file, dpi=130)


def main() -> None:
    """Prints both tables, and writes accuracy.json and accuracy.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE, help="holds checkpoint/ and clip/")
    parser.add_argument("--clips", type=int, default=1000)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    keep_memory()
    vocabulary = Vocabulary(folder)
    model = load_checkpoint(folder / "checkpoint").model().float()
    weights = (folder / "checkpoint" / "model.safetensors").read_bytes()
    batches = held_out_batches(model, arguments.clips)
    curves: dict[str, list[float]] = {"prompt-guided": [], "average": []}
    budgets = []
    for kernel, stride in BUDGETS:
        row = {}
        for name, guided in (("prompt-guided", True), ("average", False)):
            row[name] = accuracy(model, vocabulary, batches, kernel, stride, guided)
            curves[name].append(row[name]["all"])
            print(num_tokens(kernel, stride), name, json.dumps(row[name]), flush=True)
        tokens = num_tokens(kernel, stride)
        budgets.append({"tokens": tokens, "kernel": kernel, "stride": stride, **row})
    plot(curves, [num_tokens(*budget) for budget in BUDGETS], folder / "accuracy.png")
    report = {
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "clips": arguments.clips,
        "questions": sum(len(batch.questions) for batch in batches),
        "first_seed": HELD_OUT[0],
        "budgets": budgets,
    }
    write_json(folder / "accuracy.json", report)


if __name__ == "__main__":
    main()
