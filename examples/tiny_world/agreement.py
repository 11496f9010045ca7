"""Whether the runtime gives torch's answers: `python -m tiny_world.agreement BUNDLE [--clips 500]`.

Held-out clips are encoded to H.264 files. The runtime answers from the exported bundle; torch
answers from the checkpoint in fp32, greedily, through transformers' own generation, about the very
frames that the runtime's decoder gave.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from tokenizers import Tokenizer

from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.modules.model import PPLLaVA
from ppllava_runtime import Assistant
from ppllava_runtime.preprocess import pixel_values
from ppllava_runtime.video import read_clip

from .evaluate import HELD_OUT
from .files import write_clip
from .instruct import PROMPT
from .questions import KINDS, Question, ask
from .world import Clip, sample_clip

HERE = Path(__file__).parent
# Apart from the clips of `evaluate`, so that the two measurements are independent.
SEEDS = HELD_OUT[5000:]
_MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Outcome:
    """One question: the right answer, torch's and the runtime's."""

    question: Question
    torch: str
    runtime: str


class TorchAssistant:
    """The checkpoint, answering in torch."""

    def __init__(self, checkpoint: Path) -> None:
        self._model: PPLLaVA = load_checkpoint(checkpoint).model().float()
        self._decoder = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._text = Tokenizer.from_file(str(checkpoint.parent / "clip" / "tokenizer.json"))

    @torch.no_grad()
    def answer(self, pixels: np.ndarray[tuple[int, ...], np.dtype[np.float32]], text: str) -> str:
        """Returns the greedy answer to a question about pixel_values (T, 3, S, S)."""
        model = self._model
        keys, hidden = model.encode(torch.from_numpy(pixels))
        pooled, _ = model.pool(keys, hidden, torch.tensor([self._text.encode(text).ids]))
        prompt = torch.tensor([self._decoder.encode(PROMPT.format(question=text)).ids])
        # its stubs want a class that its own models are not of
        ids = model.language_model.generate(  # type: ignore[misc]
            inputs_embeds=model.splice(prompt, pooled),
            max_new_tokens=_MAX_NEW_TOKENS,
            do_sample=False,
        )
        return str(self._decoder.decode(ids[0].tolist())).strip()


def one_question(clip: Clip) -> Question:
    """Returns a question about a clip, of a kind that its seed decides."""
    rng = np.random.default_rng([clip.seed, 8])
    for kind in rng.permutation(KINDS):
        question = ask(clip, str(kind), rng)
        if question is not None:
            return question
    raise AssertionError("every clip can be described")


def compare(bundle: Path, checkpoint: Path, clips: int) -> list[Outcome]:
    """Returns what both sides answered about `clips` held-out clips, one question each."""
    assistant, reference = Assistant.open(bundle), TorchAssistant(checkpoint)
    model, outcomes = assistant.model, []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        for seed in track(SEEDS[:clips], description="asking both"):
            clip = sample_clip(seed)
            write_clip(clip, file)
            question = one_question(clip)
            answer = assistant.watch(file).ask(question.text, max_new_tokens=_MAX_NEW_TOKENS)
            frames = read_clip(file, model.default_frames).frames
            pixels = pixel_values(frames, model.image_size, model.image_mean, model.image_std)
            expected = reference.answer(pixels, question.text)
            outcomes.append(Outcome(question, expected, answer.text))
    return outcomes


def main() -> None:
    """Prints how often the runtime and torch agree, and how often each is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--clips", type=int, default=500)
    arguments = parser.parse_args()
    outcomes = compare(arguments.bundle, arguments.checkpoint, arguments.clips)
    same = sum(outcome.torch == outcome.runtime for outcome in outcomes)
    right = sum(outcome.runtime == outcome.question.answer for outcome in outcomes)
    print(f"runtime equals torch: {same} of {len(outcomes)} ({same / len(outcomes):.1%})")
    print(f"runtime is right:     {right} of {len(outcomes)} ({right / len(outcomes):.1%})")
    for outcome in outcomes:
        if outcome.torch != outcome.runtime:
            print(f"  {outcome.question.text} torch {outcome.torch!r} runtime {outcome.runtime!r}")


if __name__ == "__main__":
    main()
