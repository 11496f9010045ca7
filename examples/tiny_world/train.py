"""Trains the tiny model: `python -m tiny_world.train STAGE --out FOLDER`, three stages in order.

Every stage resumes from its last saved state when it is started again; `publish` writes what
the last finished stage learned in the layout of published checkpoints.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ppllava_export.modules.model import PPLLaVA

from . import contrastive, instruct
from .model import Vocabulary, fresh_model, model_config, save_checkpoint
from .training import Schedule, keep_memory, train

STAGES = ("contrastive", "instruct", "dpo")
FIRST_SEED = {"contrastive": 10_000_000, "instruct": 20_000_000, "dpo": 30_000_000}
SCHEDULES = {
    "contrastive": Schedule(steps=1700, learning_rate=1e-3),
    "instruct": Schedule(steps=3000, learning_rate=1.5e-3),
    "dpo": Schedule(steps=150, learning_rate=1e-4),
}
TRAIN_CLIPS = range(40_000_000, 40_000_000 + 14_000)


def load_stage(folder: Path, stage: str) -> PPLLaVA:
    """Returns the model as the last saved state of a stage left it.

    Raises:
        SystemExit: The stage has not been run in this folder.
    """
    file = folder / f"{stage}.pt"
    if not file.exists():
        raise SystemExit(f"{file} is missing: run the stage {stage!r} first")
    model = fresh_model(model_config(Vocabulary(folder)), seed=0)
    model.load_state_dict(torch.load(file, weights_only=True)["model"])
    return model


def run_contrastive(folder: Path, schedule: Schedule) -> None:
    """Writes contrastive.pt: towers that know which words belong to which patches (stage 1)."""
    vocabulary = Vocabulary(folder)
    model = fresh_model(model_config(vocabulary), seed=0)
    first = [contrastive.make_batch(FIRST_SEED["contrastive"] - 1 - i).frames for i in range(16)]
    contrastive.whiten_patches(model, torch.cat(first))
    projector = model.multi_modal_projector
    learned = [
        *model.vision_tower.parameters(),
        *(p for name, p in projector.named_parameters() if not name.startswith("linear_")),
    ]
    train(
        "contrastive",
        folder,
        model,
        learned,
        schedule,
        contrastive.make_batch,
        lambda batch, step: contrastive.contrastive_loss(model, vocabulary, batch, step),
        FIRST_SEED["contrastive"],
    )


def run_over_tokens(stage: str, before: str, folder: Path, schedule: Schedule) -> None:
    """Writes STAGE.pt: a projector and decoder that answer (stages 2 and 3), towers as before."""
    vocabulary = Vocabulary(folder)
    model = load_stage(folder, before)
    tokens = instruct.encode_clips(model, TRAIN_CLIPS, folder)
    if stage == "instruct":
        instruct.condition_projector(model, tokens)
    projector = model.multi_modal_projector
    learned = [
        *projector.linear_1.parameters(),
        *projector.linear_2.parameters(),
        *model.language_model.parameters(),
    ]
    reference = copy.deepcopy(model).requires_grad_(False) if stage == "dpo" else None

    def loss_of(batch: instruct.Batch, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        pooling = instruct.CURRICULUM.draw_pooling(step)
        if reference is None:
            return instruct.instruct_loss(model, vocabulary, batch, pooling, step)
        return instruct.dpo_loss(model, reference, vocabulary, batch, pooling)

    make = partial(instruct.make_batch, tokens=tokens, clips=TRAIN_CLIPS)
    train(stage, folder, model, learned, schedule, make, loss_of, FIRST_SEED[stage])


def main() -> None:
    """Runs one stage, or publishes the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "publish"])
    parser.add_argument("--out", type=Path, required=True, help="folder of states and logs")
    parser.add_argument("--steps", type=int, help="steps of the stage, default as published")
    parser.add_argument("--of", choices=STAGES, default="dpo", help="stage to publish")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    keep_memory()
    if arguments.stage == "publish":
        save_checkpoint(load_stage(folder, arguments.of), folder)
        return
    default = SCHEDULES[arguments.stage]
    schedule = replace(default, steps=arguments.steps or default.steps)
    if arguments.stage == "contrastive":
        run_contrastive(folder, schedule)
    else:
        before = STAGES[STAGES.index(arguments.stage) - 1]
        run_over_tokens(arguments.stage, before, folder, schedule)


if __name__ == "__main__":
    main()
