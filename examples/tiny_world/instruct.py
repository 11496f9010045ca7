"""Stages 2 and 3: instruction tuning, then DPO, over patch tokens that were encoded once.

Both towers stay as stage 1 left them, so every clip's patch tokens are computed once and kept
on disk; a step then costs the projector, the pooling and the decoder only. Several questions
share a clip, as they do at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from ppllava_export.modules.config import Window
from ppllava_export.modules.model import PPLLaVA
from ppllava_export.modules.pooling import token_weights
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from .contrastive import embed_texts
from .model import FRAME_SIZE, NUM_FRAMES, Vocabulary, normalise
from .questions import KINDS, Question, ask
from .world import render, sample_clip, sampled_moments

CLIPS_PER_STEP = 16
QUESTIONS_PER_CLIP = 6
PROMPT = "USER: <image>\n{question} ASSISTANT: "
_ENCODE_CLIPS = 8
_IGNORE = -100
# (kernel, stride) -> share of steps; 36, 18, 16, 9, 4, 2 and 1 tokens of 8 x 9 x 9
BUDGETS: dict[tuple[Window, Window], float] = {
    ((2, 3, 3), (2, 3, 3)): 0.46,
    ((4, 3, 3), (4, 3, 3)): 0.14,
    ((2, 5, 5), (2, 4, 4)): 0.14,
    ((8, 3, 3), (8, 3, 3)): 0.06,
    ((2, 9, 9), (2, 9, 9)): 0.10,
    ((4, 9, 9), (4, 9, 9)): 0.05,
    ((8, 9, 9), (8, 9, 9)): 0.05,
}
# A share of steps pools by plain averages, so that comparing with them is fair.
_AVERAGE_SHARE = 0.2
_DPO_BETA = 0.1


@dataclass(frozen=True)
class Batch:
    """Questions about clips: `clip_of` says which clip's tokens each question is about."""

    tokens: Tensor  # (clips, T, L, C) fp16
    questions: list[Question]
    clip_of: Tensor  # (questions,)


def clip_moments(seed: int) -> NDArray[np.float64]:
    """Returns the moments at which the clip of a seed is sampled, for a length of its own."""
    length = int(np.random.default_rng([seed, 4]).integers(24, 90))
    return sampled_moments(NUM_FRAMES, length)


@torch.no_grad()
def encode_clips(model: PPLLaVA, seeds: range, file: Path) -> NDArray[np.float16]:
    """Returns patch tokens (clips, T, L, C) of every seed, memory-mapped from `file`.

    The file is made once, under another name until it is whole.
    """
    tower = model.vision_tower.vision_model
    h, w = model.config.grid
    shape = (len(seeds), NUM_FRAMES, h * w, model.config.vision.encoder.hidden_size)
    if not file.exists():
        partial = file.with_suffix(".partial")
        kept = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
        for i in track(range(0, len(seeds), _ENCODE_CLIPS), description="encoding clips"):
            part = seeds[i : i + _ENCODE_CLIPS]
            frames = [render(sample_clip(s), clip_moments(s), FRAME_SIZE) for s in part]
            pixels = normalise(torch.from_numpy(np.concatenate(frames)), model.config)
            kept[i : i + len(part)] = tower(pixels).view(len(part), *shape[1:]).half().numpy()
        kept.flush()
        partial.replace(file)
    tokens: NDArray[np.float16] = np.load(file, mmap_mode="r")
    return tokens


def make_batch(seed: int, tokens: NDArray[np.float16], clips: range) -> Batch:
    """Returns the batch of a seed: clips drawn from those that were encoded."""
    rng = np.random.default_rng([seed, 5])
    picked = rng.integers(len(clips), size=CLIPS_PER_STEP)
    questions, clip_of = [], []
    for c, index in enumerate(picked):
        clip = sample_clip(clips[int(index)])
        for kind in rng.permutation(KINDS)[:QUESTIONS_PER_CLIP]:
            question = ask(clip, str(kind), rng) or ask(clip, "motion", rng)
            assert question is not None
            questions.append(question)
            clip_of.append(c)
    return Batch(torch.from_numpy(tokens[picked]), questions, torch.tensor(clip_of))


def draw_pooling(seed: int) -> tuple[Window, Window, bool]:
    """Returns (kernel, stride, guided) for a step."""
    rng = np.random.default_rng([seed, 6])
    shares = np.array(list(BUDGETS.values()))
    kernel, stride = list(BUDGETS)[int(rng.choice(len(BUDGETS), p=shares / shares.sum()))]
    return kernel, stride, bool(rng.random() >= _AVERAGE_SHARE)


def pool_batch(
    model: PPLLaVA,
    vocabulary: Vocabulary,
    batch: Batch,
    kernel: Window,
    stride: Window,
    guided: bool,
) -> Tensor:
    """Returns pooled tokens (questions, N, D); without guidance every share is the same.

    The same arithmetic as `Projector.pool`, for many questions of a clip at once.
    """
    projector, grid = model.multi_modal_projector, model.config.grid
    tokens = batch.tokens.float()
    clips, frames = tokens.shape[:2]
    values = projector.hidden(tokens).unflatten(2, grid)
    with torch.no_grad():
        texts = embed_texts(projector, vocabulary, [q.text for q in batch.questions])
        keys = projector.keys(tokens).flatten(1, 2)
        relevance = torch.einsum("qlp,qp->ql", keys[batch.clip_of], texts)
        relevance = relevance.view(-1, frames, *grid) * float(guided)
        weights = token_weights(relevance, projector.logit_scale)
    for axis in range(3):
        values = values.unfold(-4, kernel[axis], stride[axis])
        weights = weights.unfold(-3, kernel[axis], stride[axis])
    shares = (weights.flatten(-3).flatten(1, 3) / model.config.temperature).softmax(-1)
    windows = values.flatten(-3).flatten(1, 3)  # (clips, N, D, K)
    by_clip = [windows[c] @ shares[batch.clip_of == c].permute(1, 2, 0) for c in range(clips)]
    pooled = torch.cat([part.permute(2, 0, 1) for part in by_clip])
    return projector.linear_2(pooled)


@dataclass(frozen=True)
class Answers:
    """Token ids after the visual tokens: question, then answer; `labels` covers the answer."""

    suffix: Tensor
    labels: Tensor


def encode_answers(vocabulary: Vocabulary, questions: list[str], answers: list[str]) -> Answers:
    """Returns right-padded ids, as the chat template and the tokenizer give them."""
    tokenizer = vocabulary.decoder
    image, end = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("</s>")
    rows, labels = [], []
    for question, answer in zip(questions, answers, strict=True):
        ids = tokenizer.encode(PROMPT.format(question=question)).ids
        ids = ids[ids.index(image) + 1 :]
        reply = [*tokenizer.encode(answer, add_special_tokens=False).ids, end]
        rows.append(ids + reply)
        labels.append([_IGNORE] * len(ids) + reply)
    longest = max(map(len, rows))
    return Answers(
        torch.tensor([row + [end] * (longest - len(row)) for row in rows]),
        torch.tensor([label + [_IGNORE] * (longest - len(label)) for label in labels]),
    )


def answer_logits(
    model: PPLLaVA, vocabulary: Vocabulary, pooled: Tensor, answers: Answers
) -> tuple[Tensor, Tensor]:
    """Returns (logits, targets) at every answer token, in the order of `answers.labels`.

    Padding is on the right and attention causal, so no mask is needed.
    """
    image = vocabulary.decoder.token_to_id("<image>")
    ids = vocabulary.decoder.encode(PROMPT.format(question="")).ids
    prefix = torch.tensor(ids[: ids.index(image)]).expand(pooled.shape[0], -1)
    embed = model.language_model.get_input_embeddings()
    prompt = torch.cat([embed(prefix), pooled, embed(answers.suffix)], dim=1)
    states = model.language_model.model(inputs_embeds=prompt, use_cache=False).last_hidden_state
    before = states[:, prefix.shape[1] + pooled.shape[1] - 1 : -1]
    wanted = answers.labels != _IGNORE
    return model.language_model.lm_head(before[wanted]), answers.labels[wanted]


def instruct_loss(
    model: PPLLaVA, vocabulary: Vocabulary, batch: Batch, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Returns the cross-entropy of the right answers' tokens."""
    pooled = pool_batch(model, vocabulary, batch, *draw_pooling(step))
    texts = [q.text for q in batch.questions]
    answers = encode_answers(vocabulary, texts, [q.answer for q in batch.questions])
    logits, targets = answer_logits(model, vocabulary, pooled, answers)
    right = (logits.argmax(-1) == targets).float().mean()
    return F.cross_entropy(logits, targets), {"token_accuracy": right.item()}


def _log_likelihood(
    model: PPLLaVA, vocabulary: Vocabulary, pooled: Tensor, answers: Answers
) -> Tensor:
    logits, targets = answer_logits(model, vocabulary, pooled, answers)
    each = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    row = (answers.labels != _IGNORE).nonzero()[:, 0]
    return torch.zeros(pooled.shape[0]).index_add(0, row, each)


def dpo_loss(
    model: PPLLaVA, reference: PPLLaVA, vocabulary: Vocabulary, batch: Batch, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Returns the DPO loss of right over wrong answers, with a likelihood term for the right.

    -log sigmoid(beta * (margin - reference margin)) (Rafailov et al. 2023, eq. 7). The
    likelihood term keeps answers from becoming less likely while the margin grows.
    """
    pooling = draw_pooling(step)
    texts = [q.text for q in batch.questions]
    right = encode_answers(vocabulary, texts, [q.answer for q in batch.questions])
    wrong = encode_answers(vocabulary, texts, [q.wrong for q in batch.questions])
    with torch.no_grad():
        pooled = pool_batch(reference, vocabulary, batch, *pooling)
        base = _log_likelihood(reference, vocabulary, pooled, right) - _log_likelihood(
            reference, vocabulary, pooled, wrong
        )
    pooled = pool_batch(model, vocabulary, batch, *pooling)
    chosen = _log_likelihood(model, vocabulary, pooled, right)
    margin = chosen - _log_likelihood(model, vocabulary, pooled, wrong)
    loss = -F.logsigmoid(_DPO_BETA * (margin - base)).mean() - chosen.mean()
    return loss, {"margin": margin.mean().item(), "preferred": (margin > 0).float().mean().item()}


@torch.no_grad()
def right_answers(
    model: PPLLaVA,
    vocabulary: Vocabulary,
    batch: Batch,
    kernel: Window,
    stride: Window,
    guided: bool,
) -> list[bool]:
    """Returns, for each question, whether the greedy answer is exactly the right one.

    Greedy decoding gives the right answer if and only if every one of its tokens, the end
    included, is the most likely one after those before it: one pass shows it.
    """
    pooled = pool_batch(model, vocabulary, batch, kernel, stride, guided)
    texts = [q.text for q in batch.questions]
    answers = encode_answers(vocabulary, texts, [q.answer for q in batch.questions])
    logits, targets = answer_logits(model, vocabulary, pooled, answers)
    row = (answers.labels != _IGNORE).nonzero()[:, 0]
    wrong = torch.zeros(pooled.shape[0]).index_add(0, row, (logits.argmax(-1) != targets).float())
    return (wrong == 0).tolist()
