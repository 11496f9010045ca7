"""The world that the tiny model was trained on: its answers are true, its training resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ppllava_export.modules.config import Window
from tiny_world.contrastive import patch_cover
from tiny_world.instruct import Batch, pool_batch, relevance_of
from tiny_world.model import FRAME_SIZE, NUM_FRAMES, Vocabulary, fresh_model, model_config
from tiny_world.questions import KINDS, ask
from tiny_world.training import Schedule, train
from tiny_world.vocabulary import decoder_tokenizer, text_tokenizer
from tiny_world.world import COLOURS, masks, render, sample_clip, sampled_moments

SEEDS = range(100)
MOMENTS = sampled_moments(NUM_FRAMES, 40)


def test_a_seed_gives_the_same_frames() -> None:
    first, again = (render(sample_clip(7), MOMENTS, FRAME_SIZE) for _ in range(2))
    assert first.shape == (NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3)
    assert np.array_equal(first, again)


def test_moments_are_those_of_the_runtime() -> None:
    from ppllava_runtime.video import choose_frames

    for length in (24, 40, 89):
        indices = np.array(choose_frames(length, NUM_FRAMES))
        np.testing.assert_allclose(sampled_moments(NUM_FRAMES, length) * (length - 1), indices)


def test_at_most_corners_touch() -> None:
    for seed in SEEDS:
        covered = masks(sample_clip(seed), MOMENTS, FRAME_SIZE)
        shared = np.minimum(covered, covered.sum(axis=0) - covered).sum(axis=(2, 3))
        areas = covered.sum(axis=(2, 3))
        assert (shared <= 0.1 * areas).all(), seed


def test_every_thing_is_seen_in_some_sampled_frame() -> None:
    for seed in SEEDS:
        cover = patch_cover(masks(sample_clip(seed), MOMENTS, FRAME_SIZE))
        assert (cover.max(axis=(1, 2, 3)) > 0.5).all(), seed


def test_what_is_painted_has_the_colour_that_answers_name() -> None:
    for seed in SEEDS:
        clip = sample_clip(seed)
        covered = masks(clip, MOMENTS, FRAME_SIZE)
        frames = render(clip, MOMENTS, FRAME_SIZE).astype(float)
        for thing, mask in zip(clip.things, covered, strict=True):
            seen = frames[mask == 1].mean(axis=0)
            distances = {n: np.abs(seen - rgb).sum() for n, rgb in COLOURS.items()}
            assert min(distances, key=lambda name: distances[name]) == thing.colour


def test_order_and_motion_are_true_of_the_pixels() -> None:
    for seed in SEEDS:
        clip = sample_clip(seed)
        covered = masks(clip, MOMENTS, FRAME_SIZE)
        seen = covered.max(axis=(2, 3)) > 0.5
        for kind in ("order", "motion"):
            question = ask(clip, kind, np.random.default_rng(seed))
            if question is None:
                continue
            right, *other = question.about
            if kind == "order":
                assert question.answer == f"the {clip.things[right].name}"
                ends = "leaves" in question.text or "gone" in question.text
                ends = ends or "disappears" in question.text
                at = np.array([seen[right], seen[other[0]]])
                order = NUM_FRAMES - at[:, ::-1].argmax(1) if ends else at.argmax(1)
                assert order[0] < order[1], question
            else:
                y, x = np.mgrid[0:FRAME_SIZE, 0:FRAME_SIZE]
                first, last = seen[right].nonzero()[0][[0, -1]]
                masses = covered[right][[first, last]]
                dx, dy = ((masses * axis).sum((1, 2)) / masses.sum((1, 2)) for axis in (x, y))
                step = {"left": -np.diff(dx), "right": np.diff(dx), "up": -np.diff(dy)}
                step |= {"down": np.diff(dy)}
                if question.answer == "still":
                    assert abs(np.diff(dx)) < 1
                    assert abs(np.diff(dy)) < 1
                else:
                    assert step[question.answer] > 8, question  # one patch


def test_wrong_answers_are_wrong() -> None:
    for seed in SEEDS:
        for kind in KINDS:
            question = ask(sample_clip(seed), kind, np.random.default_rng(seed))
            assert question is None or question.wrong != question.answer


@pytest.mark.parametrize("text", ["an orange cross, a red circle", "naïve 日本 🎬"])
def test_tokenizers_can_write_anything(text: str) -> None:
    decoder = decoder_tokenizer()
    assert decoder.decode(decoder.encode(text).ids) == text
    words = text_tokenizer()
    pieces = words.encode(text).tokens
    assert pieces[0] == "<|startoftext|>"
    assert pieces[1:].count("<|endoftext|>") == 1  # and so no unknown, which has the same name


@pytest.mark.parametrize(("kernel", "stride"), [((2, 3, 3),) * 2, ((2, 5, 5), (2, 4, 4))])
def test_training_pools_as_the_product_does(kernel: Window, stride: Window, tmp_path: Path) -> None:
    vocabulary = Vocabulary(tmp_path)
    model = fresh_model(model_config(vocabulary), seed=0)
    tokens = torch.randn(2, 4, 81, 128, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    asked = [ask(sample_clip(seed), "shape", rng) for seed in (0, 1, 2)]
    questions = [question for question in asked if question is not None]
    batch = Batch(tokens.half(), questions, torch.tensor([0, 1, 1]))
    projector = model.multi_modal_projector
    with torch.no_grad():
        relevance = relevance_of(model, vocabulary, batch)
        guided = pool_batch(model, batch, relevance, kernel, stride, guided=True)
        average = pool_batch(model, batch, relevance, kernel, stride, guided=False)
        for i, question in enumerate(questions):
            clip = batch.tokens[batch.clip_of[i]].float()
            ids = torch.tensor([vocabulary.text.encode(question.text).ids])
            embed = projector.text_embed(ids)
            keys, hidden = projector.keys(clip), projector.hidden(clip)
            pooled, mapped = projector.pool(keys, hidden, embed, (9, 9), kernel, stride)
            torch.testing.assert_close(relevance[i], mapped, atol=1e-5, rtol=0)
            torch.testing.assert_close(guided[i], pooled, atol=1e-5, rtol=0)
            cube = hidden.view(1, 4, 9, 9, -1).movedim(-1, 1)
            mean = nn.functional.avg_pool3d(cube, kernel, stride).flatten(2)[0].T
            expected = projector.linear_2(mean)
            torch.testing.assert_close(average[i], expected, atol=1e-5, rtol=0)


class _Interrupted(Exception):
    pass


def test_a_resumed_stage_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None) -> Tensor:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = nn.Linear(4, 4)

        def make(seed: int) -> Tensor:
            return torch.from_numpy(np.random.default_rng(seed).standard_normal((8, 4), np.float32))

        def loss_of(batch: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
            if step == stop_at:
                raise _Interrupted
            return (model(batch) - batch.flip(-1)).square().mean(), {}

        train("s", folder, model, [*model.parameters()], Schedule(420, 1e-2), make, loss_of, 5, 0)
        return model.weight.detach().clone()

    whole = run(tmp_path / "whole", None)
    with pytest.raises(_Interrupted):
        run(tmp_path / "broken", 310)
    assert torch.equal(run(tmp_path / "broken", None), whole)
