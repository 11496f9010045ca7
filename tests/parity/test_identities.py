"""The identities that the graphs are built on, each computed in both orders (fp32, 1e-5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ppllava_engines.bundle import Bundle
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.modules.model import PPLLaVA
from ppllava_export.modules.pooling import strided_weighted_pool, token_weights

TOLERANCE = 1e-5
BEGIN, END = 512, 513


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PPLLaVA:
    return load_checkpoint(checkpoint).model()


@pytest.fixture(scope="module")
def tokens(model: PPLLaVA) -> Tensor:
    frames = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    patches: Tensor = model.vision_tower.vision_model(frames)
    return patches


def questions() -> list[Tensor]:
    rng = np.random.default_rng(0)
    return [torch.tensor([[BEGIN, *rng.integers(0, 512, n), END]]) for n in (1, 5, 40)]


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) <= TOLERANCE


@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 3, 4), (4, 1, 1)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (3, 1, 2)])
def test_linear_2_commutes_with_pooling(
    model: PPLLaVA, tokens: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    projector = model.multi_modal_projector
    keys, hidden = projector.keys(tokens), projector.hidden(tokens)
    text_embed = projector.text_embed(questions()[1])
    after, relevance = projector.pool(keys, hidden, text_embed, (4, 4), kernel, stride)
    before = strided_weighted_pool(
        projector.linear_2(hidden).view(4, 4, 4, -1),
        token_weights(relevance, projector.logit_scale),
        kernel,
        stride,
        projector.temperature,
    )
    close(after, before)


@pytest.mark.parametrize("padding", [END, 0, 7])
def test_tokens_after_the_end_change_nothing(model: PPLLaVA, padding: int) -> None:
    for question in questions():
        padded = F.pad(question, (0, 248 - question.shape[1]), value=padding)
        projector = model.multi_modal_projector
        close(projector.text_embed(question), projector.text_embed(padded))


def test_a_question_does_not_change_what_was_seen(bundle: Path, model: PPLLaVA) -> None:
    """Asking with kept keys and hidden equals encoding video and question together."""
    frames = np.random.default_rng(1).standard_normal((4, 3, 32, 32), dtype=np.float32)
    opened = Bundle.open(bundle)
    seen = opened.engine("vision").run({"pixel_values": frames})
    text, pool = opened.engine("text"), opened.engine("pool")
    window = {"kernel": np.array([2, 2, 2]), "stride": np.array([2, 2, 2])}
    for question in questions():
        asked = pool.run(seen | text.run({"input_ids": question.numpy()}) | window)
        whole, relevance = model.pool(*model.encode(torch.from_numpy(frames)), question)
        close(torch.from_numpy(asked["pooled"]), whole)
        close(torch.from_numpy(asked["relevance"]), relevance)


def test_frames_are_encoded_one_by_one_or_together(bundle: Path) -> None:
    frames = np.random.default_rng(2).standard_normal((5, 3, 32, 32), dtype=np.float32)
    engine = Bundle.open(bundle).engine("vision")
    together = engine.run({"pixel_values": frames})
    single = [engine.run({"pixel_values": frames[i : i + 1]}) for i in range(5)]
    for name, value in together.items():
        apart = np.concatenate([output[name] for output in single])
        close(torch.from_numpy(apart), torch.from_numpy(value))


def test_layers_beyond_the_features_do_not_matter(model: PPLLaVA) -> None:
    assert len(model.vision_tower.vision_model.encoder.layers) == 3  # of 4; features are of -2
