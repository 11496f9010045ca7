"""Stage 1: contrastive training of the CLIP pair, patch by patch.

Whole-frame captions leave patches unaligned, and then the question guides nothing. Here the
generator knows what every patch shows, so the loss is taken where the guidance will be used:

* thing -> text: the mean of a thing's patches, its outline included, names it. Shape is in the
  outline, so this is where shape is learned first;
* patch -> text: a patch names its thing, its colour, its shape and its place among all names;
* text -> patch: of all patches of a clip, a question finds those of the things it is about.
  This softmax over all tokens is the very one that weights the pooling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ppllava_export.modules.alignment import Projector
from ppllava_export.modules.model import PPLLaVA

from .model import FRAME_SIZE, NUM_FRAMES, PATCH_SIZE, Vocabulary, normalise
from .questions import KINDS, ask
from .world import COLOURS, SHAPES, masks, render, sample_clip, sampled_moments

CLIPS_PER_STEP = 16
FRAMES_PER_CLIP = 3
QUESTIONS_PER_CLIP = 6
_SIDE = FRAME_SIZE // PATCH_SIZE
_TEMPLATES = ("a {}", "the {}", "{}", "a {} in a video", "there is a {}", "this is a {}")
_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
_PLACES = tuple(
    f"at the {row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "centre", "right")
)
_IGNORE = -100
_WHITENED = 96
_NOISE_VARIANCE = 0.02


@dataclass(frozen=True)
class Batch:
    """Frames of several clips with what each patch shows and what is asked of it."""

    frames: Tensor  # (clips * frames, S, S, 3) uint8
    labels: Tensor  # (clips * frames, L): thing name, len(_NAMES) for background, or ignored
    outlines: Tensor  # (things, clips * frames * L), each summing to one
    outline_labels: Tensor  # (things,)
    questions: list[str]
    clip_of: Tensor  # (questions,)
    targets: Tensor  # (questions, frames * L), each summing to one


def patch_cover(covered: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the share of each patch that each thing covers, (things, T, h, w)."""
    things, frames = covered.shape[:2]
    cells = covered.reshape(things, frames, _SIDE, PATCH_SIZE, _SIDE, PATCH_SIZE)
    shares: NDArray[np.float32] = cells.mean(axis=(3, 5))
    return shares


def make_batch(seed: int) -> Batch:
    """Returns the batch of a seed."""
    rng = np.random.default_rng([seed, 2])
    frames, labels, questions, clip_of, targets = [], [], [], [], []
    outlines, outline_labels = [], []
    for c in range(CLIPS_PER_STEP):
        clip = sample_clip(int(rng.integers(1 << 40)))
        moments = sampled_moments(NUM_FRAMES, int(rng.integers(24, 90)))
        moments = np.sort(rng.choice(moments, FRAMES_PER_CLIP, replace=False))
        covered = masks(clip, moments, FRAME_SIZE)
        frames.append(render(clip, moments, FRAME_SIZE, covered))
        cover = patch_cover(covered).reshape(len(clip.things), FRAMES_PER_CLIP, -1)
        label = np.full(cover.shape[1:], _IGNORE)
        label[cover.sum(0) < 0.02] = len(_NAMES)
        for thing, share in zip(clip.things, cover, strict=True):
            label[share > 0.25] = _NAMES.index(thing.name)
            for f in range(FRAMES_PER_CLIP):
                touched = share[f] > 0.02
                if touched.any():
                    outline = np.zeros((CLIPS_PER_STEP, FRAMES_PER_CLIP, _SIDE**2), np.float32)
                    outline[c, f] = touched / touched.sum()
                    outlines.append(outline.reshape(-1))
                    outline_labels.append(_NAMES.index(thing.name))
        labels.append(label)
        for kind in rng.permutation(KINDS)[:QUESTIONS_PER_CLIP]:
            question = ask(clip, str(kind), rng)
            if question is None or not question.about:
                continue
            target = cover[list(question.about)].sum(0)
            target[target < 0.15] = 0
            if target.sum() > 0:
                questions.append(question.text)
                clip_of.append(c)
                targets.append((target / target.sum()).reshape(-1))
    return Batch(
        torch.from_numpy(np.concatenate(frames)),
        torch.from_numpy(np.concatenate(labels)),
        torch.from_numpy(np.stack(outlines)),
        torch.tensor(outline_labels),
        questions,
        torch.tensor(clip_of),
        torch.from_numpy(np.stack(targets)),
    )


@torch.no_grad()
def whiten_patches(model: PPLLaVA, frames: Tensor) -> None:
    """Starts the patch embedding from whitened principal components of real patches.

    Flat colour is most of the patches' variance: with random filters shape stayed near chance for
    the 400 steps that were tried, with these it left chance at step 250.

    Args:
        model: Changed in place.
        frames: uint8 (n, S, S, 3).
    """
    weight = model.vision_tower.vision_model.embeddings.patch_embedding.weight
    pixels = normalise(frames, model.config)
    patches = F.unfold(pixels, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    variance, components = torch.linalg.eigh(patches.T.cov())
    kept = slice(-_WHITENED, None)
    filters = (components[:, kept] / (variance[kept] + _NOISE_VARIANCE).sqrt()).T
    rotation = torch.linalg.qr(torch.randn(weight.shape[0], weight.shape[0]))[0]
    weight.copy_((0.7 * rotation[:, :_WHITENED] @ filters).view_as(weight))


def embed_texts(projector: Projector, vocabulary: Vocabulary, texts: list[str]) -> Tensor:
    """Returns unit embeddings (texts, P); rows are padded, which a causal tower ignores."""
    encoded = [vocabulary.text.encode(text).ids for text in texts]
    longest = max(map(len, encoded))
    ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in encoded])
    return projector.text_embed(ids)


def _named(rng: np.random.Generator, words: tuple[str, ...], suffix: str = "") -> list[str]:
    templates = rng.choice(_TEMPLATES, len(words))
    return [str(t).format(word + suffix) for t, word in zip(templates, words, strict=True)]


def contrastive_loss(
    model: PPLLaVA, vocabulary: Vocabulary, batch: Batch, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """Returns the loss of a batch and what it is made of."""
    rng = np.random.default_rng([seed, 3])
    projector = model.multi_modal_projector
    tokens = model.vision_tower.vision_model(normalise(batch.frames, model.config))
    keys = projector.keys(tokens)
    banks = [
        [*_named(rng, _NAMES), "the background"],
        [*_named(rng, tuple(COLOURS), " object"), "the background"],
        [*_named(rng, SHAPES), "the background"],
        [f"an object {place}" for place in _PLACES],
    ]
    texts = [text for bank in banks for text in bank] + batch.questions
    embeds = embed_texts(projector, vocabulary, texts)
    scale = projector.logit_scale.clamp(max=np.log(100)).exp()
    parts = embeds.split([*map(len, banks), len(batch.questions)])

    names = batch.labels
    known = (names != _IGNORE) & (names != len(_NAMES))
    background = names == len(_NAMES)
    picked = known | (background & (torch.rand(names.shape) < 0.15))
    row = torch.arange(_SIDE).repeat_interleave(_SIDE) * 3 // _SIDE
    column = torch.arange(_SIDE).repeat(_SIDE) * 3 // _SIDE
    labels = [
        names,
        torch.where(known, names // len(SHAPES), len(COLOURS)),
        torch.where(known, names % len(SHAPES), len(SHAPES)),
    ]
    losses = {
        name: F.cross_entropy(keys[picked] @ part.T * scale, label[picked])
        for name, part, label in zip(("name", "colour", "shape"), parts[:3], labels, strict=True)
    }
    things = F.normalize(batch.outlines @ keys.flatten(0, 1), dim=-1)
    losses["thing"] = F.cross_entropy(things @ parts[0].T[:, :-1] * scale, batch.outline_labels)
    place = (row * 3 + column).expand_as(names)
    losses["place"] = F.cross_entropy(keys[known] @ parts[3].T * scale, place[known])
    by_clip = keys.view(CLIPS_PER_STEP, -1, keys.shape[-1])[batch.clip_of]
    found = torch.einsum("qlp,qp->ql", by_clip, parts[4]) * scale
    losses["question"] = -(batch.targets * found.log_softmax(-1)).sum(-1).mean()
    total = losses["name"] + losses["question"] + 0.5 * losses["colour"] + losses["shape"]
    total = total + 0.3 * losses["place"] + losses["thing"]
    with torch.no_grad():
        right = (things @ parts[0].T).argmax(-1) == batch.outline_labels
    figures = {name: loss.item() for name, loss in losses.items()}
    return total, figures | {"name_accuracy": float(right.float().mean())}
