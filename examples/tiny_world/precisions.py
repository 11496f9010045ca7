"""What each precision costs: `python -m tiny_world.precisions [--clips 100]`.

The committed checkpoint is exported once for each precision. Every bundle answers one question
about each of the same held-out clips; torch answers them in fp32. Static int8 vision is calibrated
on clips of seeds that nothing else uses. What is printed is the table in README.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.progress import track

from ppllava_engines.parity import STAGES, Parity
from ppllava_export import export_bundle
from ppllava_runtime import Assistant
from ppllava_runtime.preprocess import pixel_values
from ppllava_runtime.video import read_clip

from .agreement import SEEDS, TorchAssistant, one_question
from .files import write_clip
from .world import sample_clip

HERE = Path(__file__).parent
CALIBRATION = range(80_000_000, 80_000_008)
_MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Order:
    """One precision."""

    dtype: Literal["fp32", "fp16"]
    vision: Literal["int8", "int8-static"] | None = None
    decoder: Literal["int8", "int4"] | None = None
    prefill: Literal["int8"] | None = None

    def __str__(self) -> str:
        parts = {"vision": self.vision, "decoder": self.decoder, "prefill": self.prefill}
        return ", ".join([self.dtype, *(f"{part} {to}" for part, to in parts.items() if to)])


ORDERS = (
    Order("fp32"),
    Order("fp16"),
    Order("fp32", vision="int8"),
    Order("fp32", vision="int8-static"),
    Order("fp16", vision="int8-static"),
    Order("fp16", decoder="int8"),
    Order("fp16", decoder="int4"),
    Order("fp32", vision="int8", decoder="int8", prefill="int8"),
    Order("fp16", vision="int8-static", decoder="int8"),
)


@dataclass
class Row:
    """What was measured of one bundle.

    Attributes:
        name: Its precision.
        num_bytes: Of all its files.
        cosines: With torch, by stage, as its parity report has them.
        answers: One for each clip.
    """

    name: str
    num_bytes: int
    cosines: dict[str, float]
    answers: list[str] = field(default_factory=list)


def export_all(
    checkpoint: Path, folder: Path, orders: Sequence[Order] = ORDERS
) -> list[tuple[Row, Path]]:
    """Returns each precision's row, still without answers, and its bundle below `folder`."""
    videos = [folder / f"{seed}.mp4" for seed in CALIBRATION]
    for seed, video in zip(CALIBRATION, videos, strict=True):
        write_clip(sample_clip(seed), video)
    rows = []
    for order in track(orders, description="exporting"):
        bundle = folder / str(order).replace(", ", "-").replace(" ", "-")
        export_bundle(
            checkpoint,
            bundle,
            order.dtype,
            vision="int8" if order.vision else None,
            decoder=order.decoder,
            prefill=order.prefill,
            calibration=videos if order.vision == "int8-static" else (),
        )
        num_bytes = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        cosines = {stage.name: stage.cosine for stage in Parity.read(bundle).stages}
        rows.append((Row(str(order), num_bytes, cosines), bundle))
    return rows


def answer_all(
    rows: Sequence[tuple[Row, Path]], checkpoint: Path, clips: int
) -> tuple[list[str], list[str]]:
    """Adds every bundle's answers to its row; returns torch's answers and the right ones."""
    assistants = [(row, Assistant.open(bundle)) for row, bundle in rows]
    model, reference = assistants[0][1].model, TorchAssistant(checkpoint)
    expected, right = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        for seed in track(SEEDS[:clips], description="asking all"):
            clip = sample_clip(seed)
            write_clip(clip, file)
            question = one_question(clip)
            for row, assistant in assistants:
                answer = assistant.watch(file).ask(question.text, max_new_tokens=_MAX_NEW_TOKENS)
                row.answers.append(answer.text)
            frames = read_clip(file, model.default_frames).frames
            pixels = pixel_values(frames, model.image_size, model.image_mean, model.image_std)
            expected.append(reference.answer(pixels, question.text))
            right.append(question.answer)
    return expected, right


def table(rows: Sequence[Row], expected: Sequence[str], right: Sequence[str]) -> str:
    """Returns the measurements in Markdown; a stage's number is its cosine with torch."""
    lines = [
        f"| precision | MB | {' | '.join(STAGES)} | as torch | right |",
        f"|---|{'---:|' * (len(STAGES) + 3)}",
    ]
    for row in rows:
        cosines = " | ".join(f"{row.cosines[stage]:.5f}" for stage in STAGES)
        same, correct = (
            sum(a == b for a, b in zip(row.answers, answers, strict=True))
            for answers in (expected, right)
        )
        lines.append(f"| {row.name} | {row.num_bytes / 1e6:.1f} | {cosines} | {same} | {correct} |")
    correct = sum(a == b for a, b in zip(expected, right, strict=True))
    lines.append(f"| torch, fp32 |{' |' * (len(STAGES) + 1)} {len(expected)} | {correct} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--clips", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = export_all(arguments.checkpoint, Path(name))
        expected, right = answer_all(rows, arguments.checkpoint, arguments.clips)
    print(table([row for row, _ in rows], expected, right))


if __name__ == "__main__":
    main()
