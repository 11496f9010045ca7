"""Stages 2 and 3: instruction tuning, then DPO, over patch tokens that were encoded once.

Both towers stay as stage 1 left them, so every clip's patch tokens are computed once and kept
on disk; a step then costs the projector, the pooling and the decoder only. Several questions
share a clip, as they do at run time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from ppllava_export.modules.config import Window
from ppllava_export.modules.model import PPLLaVA
from ppllava_export.modules.pooling import token_weights

from .contrastive import embed_texts
from .model import FRAME_SIZE, NUM_FRAMES, Vocabulary, normalise
from .questions import PLACE, Question, ask
from .vocabulary import token_id
from .world import render, sample_clip, sampled_moments

CLIPS_PER_STEP = 16
QUESTIONS_PER_CLIP = 6
PROMPT = "USER: <image>\n{question} ASSISTANT: "
_ENCODE_CLIPS = 8
_IGNORE = -100
_CONDITIONING_CLIPS = 300
Pooling = tuple[Window, Window]
_DPO_BETA = 0.1
_PLACE_SHARE = 0.2
# (kernel, stride) that leave 36, 18, 16, 9, 4, 2 and 1 tokens of 8 x 9 x 9
_TO_36: Pooling = ((2, 3, 3), (2, 3, 3))
_TO_18: Pooling = ((4, 3, 3), (4, 3, 3))
_TO_16: Pooling = ((2, 5, 5), (2, 4, 4))
_TO_9: Pooling = ((8, 3, 3), (8, 3, 3))
_TO_4: Pooling = ((2, 9, 9), (2, 9, 9))
_TO_2: Pooling = ((4, 9, 9), (4, 9, 9))
_TO_1: Pooling = ((8, 9, 9), (8, 9, 9))


@dataclass(frozen=True)
class Curriculum:
    """What is asked and at which budgets: relative shares of questions and of steps.

    `average_share` of the steps pool by plain averages, so that the decoder knows such tokens too.
    """

    kinds: dict[str, float]
    poolings: dict[Pooling, float]
    average_share: float

    def draw_kinds(self, rng: np.random.Generator, count: int) -> list[str]:
        """Returns `count` kinds of questions."""
        shares = np.array(list(self.kinds.values()))
        return [str(k) for k in rng.choice(list(self.kinds), count, p=shares / shares.sum())]

    def draw_pooling(self, seed: int) -> tuple[Window, Window, bool]:
        """Returns (kernel, stride, guided) for a step."""
        rng = np.random.default_rng([seed, 6])
        shares = np.array(list(self.poolings.values()))
        drawn = int(rng.choice(len(shares), p=shares / shares.sum()))
        kernel, stride = list(self.poolings)[drawn]
        return kernel, stride, bool(rng.random() >= self.average_share)


# Motion and existence compare two things and take the most practice; four tokens show a motion
# in the shortest prompts.
CURRICULUM = Curriculum(
    {
        "motion": 22,
        "existence": 20,
        PLACE: 16,
        "order": 10,
        "count": 10,
        "description": 8,
        "colour": 7,
        "shape": 7,
    },
    {_TO_36: 36, _TO_18: 8, _TO_16: 7, _TO_9: 2, _TO_4: 41, _TO_2: 4, _TO_1: 2},
    average_share=0.12,
)


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
def encode_clips(model: PPLLaVA, seeds: range, folder: Path) -> NDArray[np.float16]:
    """Returns patch tokens (clips, T, L, C) of every seed, memory-mapped from a file in `folder`.

    The file is made once per tower, which its name tells, and has another name until it is whole.
    """
    tower = model.vision_tower.vision_model
    digest = hashlib.sha256()
    for tensor in tower.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    file = folder / f"tokens-{digest.hexdigest()[:12]}.npy"
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


@torch.no_grad()
def condition_projector(model: PPLLaVA, tokens: NDArray[np.float16]) -> None:
    """Starts the projector from half-whitened tokens, so that the decoder can see all they hold.

    Patch tokens are large (norm 90) and a few directions hold most of their variance: from a plain
    start the visual embeddings became 300 times the words'. This alone did not make motions
    readable, see `place_loss`.

    Args:
        model: Changed in place.
        tokens: Patch tokens (clips, T, L, C).
    """
    projector = model.multi_modal_projector
    sample = torch.from_numpy(tokens[:_CONDITIONING_CLIPS].astype(np.float32)).flatten(0, 2)
    variance, components = torch.linalg.eigh(sample.T.cov())
    width = projector.linear_1.out_features
    scales = variance.clamp(min=1e-3) ** -0.25 * (width / variance.clamp(min=0).sqrt().sum()).sqrt()
    rotation = torch.linalg.qr(torch.randn(width, width))[0][:, : len(scales)]
    projector.linear_1.weight.copy_(rotation @ (components * scales).T)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ sample.mean(0))
    projector.linear_2.weight.normal_(std=0.05)
    projector.linear_2.bias.zero_()


def make_batch(seed: int, tokens: NDArray[np.float16], clips: range) -> Batch:
    """Returns the batch of a seed: clips drawn from those that were encoded."""
    rng = np.random.default_rng([seed, 5])
    picked = rng.integers(len(clips), size=CLIPS_PER_STEP)
    questions, clip_of = [], []
    for c, index in enumerate(picked):
        clip = sample_clip(clips[int(index)])
        for kind in CURRICULUM.draw_kinds(rng, QUESTIONS_PER_CLIP):
            question = ask(clip, kind, rng) or ask(clip, "motion", rng)
            assert question is not None
            questions.append(question)
            clip_of.append(c)
    return Batch(torch.from_numpy(tokens[picked]), questions, torch.tensor(clip_of))


@torch.no_grad()
def relevance_of(model: PPLLaVA, vocabulary: Vocabulary, batch: Batch) -> Tensor:
    """Returns the relevance maps (questions, T, h, w) of a batch."""
    projector = model.multi_modal_projector
    texts = embed_texts(projector, vocabulary, [q.text for q in batch.questions])
    keys = projector.keys(batch.tokens.float())
    relevance = torch.einsum("qtlp,qp->qtl", keys[batch.clip_of], texts)
    return relevance.view(*relevance.shape[:2], *model.config.grid)


def pool_batch(
    model: PPLLaVA,
    batch: Batch,
    relevance: Tensor,
    kernel: Window,
    stride: Window,
    guided: bool,
) -> Tensor:
    """Returns pooled tokens (questions, N, D); without guidance every share is the same.

    The same arithmetic as `Projector.pool`, for many questions of a clip at once.
    """
    projector, grid = model.multi_modal_projector, model.config.grid
    values = projector.hidden(batch.tokens.float()).unflatten(2, grid)
    weights = token_weights(relevance * float(guided), projector.logit_scale.detach())
    for axis in range(3):
        values = values.unfold(-4, kernel[axis], stride[axis])
        weights = weights.unfold(-3, kernel[axis], stride[axis])
    shares = (weights.flatten(-3).flatten(1, 3) / model.config.temperature).softmax(-1)
    windows = values.flatten(-3).flatten(1, 3)  # (clips, N, D, K)
    by_clip = [part @ shares[batch.clip_of == c].permute(1, 2, 0) for c, part in enumerate(windows)]
    pooled = torch.cat([part.permute(2, 0, 1) for part in by_clip])
    finished: Tensor = projector.linear_2(pooled)
    return finished


def place_loss(model: PPLLaVA, batch: Batch, relevance: Tensor, step: int) -> Tensor:
    """Returns how badly the projector keeps the place of the most relevant patch of a frame.

    Patch tokens tell places (R2 0.95) and motions (96 %, both by linear readout of what is
    pooled), but words are learned first, and meanwhile the projector forgets what nobody reads
    (R2 0.3): the decoder never sees a motion. A fixed readout of rows and columns from what the
    decoder's first norm will see keeps it there until it is read.
    """
    questions, frames = relevance.shape[:2]
    generator = torch.Generator().manual_seed(step)
    frame = torch.randint(frames, (questions,), generator=generator)
    patch = relevance[torch.arange(questions), frame].flatten(1).argmax(-1)
    tokens = batch.tokens[batch.clip_of, frame, patch].float()
    projector, (h, w) = model.multi_modal_projector, model.config.grid
    values = projector.linear_2(projector.hidden(tokens))
    values = F.rms_norm(values, values.shape[-1:])
    readout = torch.randn(values.shape[-1], h + w, generator=torch.Generator().manual_seed(0))
    rows, columns = (values @ torch.linalg.qr(readout)[0]).split([h, w], dim=-1)
    return F.cross_entropy(rows, patch // w) + F.cross_entropy(columns, patch % w)


@dataclass(frozen=True)
class Answers:
    """Token ids after the visual tokens: question, then answer; `labels` covers the answer."""

    suffix: Tensor
    labels: Tensor


def encode_answers(vocabulary: Vocabulary, questions: list[str], answers: list[str]) -> Answers:
    """Returns right-padded ids, as the chat template and the tokenizer give them."""
    tokenizer = vocabulary.decoder
    image, end = token_id(tokenizer, "<image>"), token_id(tokenizer, "</s>")
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
    image = token_id(vocabulary.decoder, "<image>")
    ids = vocabulary.decoder.encode(PROMPT.format(question="")).ids
    prefix = torch.tensor(ids[: ids.index(image)]).expand(pooled.shape[0], -1)
    embed = model.language_model.get_input_embeddings()
    prompt = torch.cat([embed(prefix), pooled, embed(answers.suffix)], dim=1)
    states = model.language_model.model(inputs_embeds=prompt, use_cache=False).last_hidden_state
    before = states[:, prefix.shape[1] + pooled.shape[1] - 1 : -1]
    wanted = answers.labels != _IGNORE
    return model.language_model.lm_head(before[wanted]), answers.labels[wanted]


def instruct_loss(
    model: PPLLaVA,
    vocabulary: Vocabulary,
    batch: Batch,
    pooling: tuple[Window, Window, bool],
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """Returns the cross-entropy of the right answers' tokens, with a share of `place_loss`."""
    relevance = relevance_of(model, vocabulary, batch)
    pooled = pool_batch(model, batch, relevance, *pooling)
    texts = [q.text for q in batch.questions]
    answers = encode_answers(vocabulary, texts, [q.answer for q in batch.questions])
    logits, targets = answer_logits(model, vocabulary, pooled, answers)
    right = (logits.argmax(-1) == targets).float().mean()
    answer, place = F.cross_entropy(logits, targets), place_loss(model, batch, relevance, step)
    figures = {"token_accuracy": right.item(), "answer": answer.item(), "place": place.item()}
    return answer + _PLACE_SHARE * place, figures


def _log_likelihood(
    model: PPLLaVA, vocabulary: Vocabulary, pooled: Tensor, answers: Answers
) -> Tensor:
    logits, targets = answer_logits(model, vocabulary, pooled, answers)
    each = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    row = (answers.labels != _IGNORE).nonzero()[:, 0]
    return torch.zeros(pooled.shape[0]).index_add(0, row, each)


def dpo_loss(
    model: PPLLaVA,
    reference: PPLLaVA,
    vocabulary: Vocabulary,
    batch: Batch,
    pooling: tuple[Window, Window, bool],
) -> tuple[Tensor, dict[str, float]]:
    """Returns the DPO loss of right over wrong answers, with a likelihood term for the right.

    -log sigmoid(beta * (margin - reference margin)) (Rafailov et al. 2023, eq. 7). The
    likelihood term keeps answers from becoming less likely while the margin grows.
    """
    texts = [q.text for q in batch.questions]
    right = encode_answers(vocabulary, texts, [q.answer for q in batch.questions])
    wrong = encode_answers(vocabulary, texts, [q.wrong for q in batch.questions])
    with torch.no_grad():
        relevance = relevance_of(reference, vocabulary, batch)
        pooled = pool_batch(reference, batch, relevance, *pooling)
        base = _log_likelihood(reference, vocabulary, pooled, right) - _log_likelihood(
            reference, vocabulary, pooled, wrong
        )
    pooled = pool_batch(model, batch, relevance, *pooling)
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
    relevance = relevance_of(model, vocabulary, batch)
    pooled = pool_batch(model, batch, relevance, kernel, stride, guided)
    texts = [q.text for q in batch.questions]
    answers = encode_answers(vocabulary, texts, [q.answer for q in batch.questions])
    logits, targets = answer_logits(model, vocabulary, pooled, answers)
    row = (answers.labels != _IGNORE).nonzero()[:, 0]
    wrong = torch.zeros(pooled.shape[0]).index_add(0, row, (logits.argmax(-1) != targets).float())
    return (wrong == 0).tolist()
