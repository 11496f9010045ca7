"""What grows when the work grows: frames, visual tokens, turns of a conversation, videos.

`PYTHONPATH=examples python -m benchmarks.growth [--bundle BUNDLE] [--plot FILE.png]`

A tower of DINOv2-S's size with random weights and SmolLM2 behind it, in int8, whose bundle is made
on the first run; clips of examples/tiny_world. Time against amount is a straight line in two
logarithms, and its slope the exponent: 1 is linear, 0 does not grow. Beside the slope over all
points stands the one over the last doubling, which a fixed cost hides least; what is called linear
is so by both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Literal

import numpy as np
from benchmarks.timing import machine

from benchmarks import models
from ppllava_runtime import Assistant
from ppllava_runtime.conversation import Video
from ppllava_runtime.memories import MemoryStore
from tiny_world.files import write_clip
from tiny_world.world import sample_clip

_FRAMES = (8, 16, 32, 64, 128)
_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
_TURNS = 20
_VIDEOS = (1, 2, 5, 10, 20, 50, 100)
_CLIP_FRAMES = 256
_FRAMES_OF_TOKENS = 64
_FRAMES_OF_TURNS, _TOKENS_OF_TURNS = 8, 256
_FRAMES_OF_VIDEOS = 2
_RUNS = 25  # at most, where they are short
_NEW_TOKENS = 16
# In turns, because a prompt that was there before is not computed again.
_QUESTIONS = cycle(("What happens in the video?", "Which way does the circle move?"))
# Measured times scatter: noise of a fourteenth makes such a slope of a line's last doubling.
_LINEAR = 1.1


@dataclass
class Curve:
    """One quantity as the work grows.

    Attributes:
        name: What it is, with its unit.
        amounts, values: The points.
    """

    name: str
    amounts: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, amount: float, value: float) -> None:
        """Adds a point."""
        self.amounts.append(amount)
        self.values.append(value)

    @property
    def exponent(self) -> float:
        """The slope over all points in two logarithms."""
        return float(np.polyfit(np.log(self.amounts), np.log(self.values), 1)[0])

    @property
    def last_step(self) -> float:
        """The slope over the last doubling: two points, or as many as lie there."""
        amounts, values = np.array(self.amounts), np.array(self.values)
        last = amounts >= min(amounts[-1] / 2, amounts[-2])
        return float(np.polyfit(np.log(amounts[last]), np.log(values[last]), 1)[0])

    @property
    def linear(self) -> bool:
        """Whether it is linear or better, over all points and over the last doubling."""
        return max(self.exponent, self.last_step) <= _LINEAR

    def __str__(self) -> str:
        ends = " | ".join(f"{self.values[at]:.4g} at {self.amounts[at]:g}" for at in (0, -1))
        verdict = "yes" if self.linear else "NO"
        return f"| {self.name} | {ends} | {self.exponent:.2f} | {self.last_step:.2f} | {verdict} |"


def frames(assistant: Assistant, clip: Path, amounts: Sequence[int], seconds: float) -> list[Curve]:
    """Watching, what is remembered, and a second question, by frames of one clip."""
    watch, kept = Curve("watching, s"), Curve("remembered, MB")
    again = Curve("second question to the decoder's input, s")
    for amount in amounts:
        began = time.perf_counter()
        video = assistant.watch(clip, amount)
        watch.add(amount, time.perf_counter() - began)
        kept.add(amount, video.memory.nbytes / 1e6)
        again.add(amount, _median(partial(_to_input, video), seconds))
    return [watch, kept, again]


def tokens(video: Video, amounts: Sequence[int], seconds: float) -> list[Curve]:
    """A question, by visual tokens in its prompt."""
    to_input = Curve("to the decoder's input, s")
    to_first = Curve("to the first id, s (quadratic in the decoder's attention)")
    for amount in amounts:
        asked = video.ask(next(_QUESTIONS), num_tokens=amount, max_new_tokens=1)
        asked.close()
        actual = asked.accounting.num_tokens_after
        to_input.add(actual, _median(partial(_to_input, video, amount), seconds))
        to_first.add(actual, _median(partial(_to_first, video, amount), seconds))
    return [to_input, to_first]


def turns(video: Video, count: int, num_tokens: int) -> list[Curve]:
    """Each turn but the first, which reads all, up to its first id, by its number."""
    curves = []
    modes: tuple[Literal["re-pool", "keep"], ...] = ("re-pool", "keep")
    for mode in modes:
        curve, conversation = Curve(f"a turn to its first id, {mode}, s"), video.converse(mode)
        for turn in range(count):
            began = time.perf_counter()
            answer = conversation.ask(
                next(_QUESTIONS), num_tokens=num_tokens, max_new_tokens=_NEW_TOKENS
            )
            next(iter(answer), "")
            elapsed = time.perf_counter() - began
            if turn:
                curve.add(turn + 1, elapsed)
            _ = answer.ids
        curves.append(curve)
    return curves


def videos(bundle: Path, clip: Path, amounts: Sequence[int], seconds: float) -> list[Curve]:
    """Remembering videos, and asking about the first of them again, by their number."""
    store = MemoryStore(1 << 40)
    assistant = Assistant.open(bundle, store=store)
    watched, asked = Curve("watching all, s"), Curve("the first one, found and asked again, s")
    content, spent, seen = clip.read_bytes(), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{at}.mp4") for at in range(amounts[-1])]
        for at, file in enumerate(files):
            # An empty box, which the container may end with, makes it another file.
            file.write_bytes(content + (16).to_bytes(4, "big") + b"free" + at.to_bytes(8, "big"))
        _to_input(assistant.watch(clip, _FRAMES_OF_VIDEOS))  # opens the graphs
        for amount in amounts:
            began = time.perf_counter()
            for file in files[seen:amount]:
                assistant.watch(file, _FRAMES_OF_VIDEOS)
            spent, seen = spent + time.perf_counter() - began, amount
            watched.add(amount, spent)
            asked.add(
                amount,
                _median(lambda: _to_input(assistant.watch(files[0], _FRAMES_OF_VIDEOS)), seconds),
            )
    return [watched, asked]


def _to_input(video: Video, num_tokens: int | None = None) -> None:
    video.ask(next(_QUESTIONS), num_tokens=num_tokens, max_new_tokens=1).close()


def _to_first(video: Video, num_tokens: int) -> None:
    _ = video.ask(next(_QUESTIONS), num_tokens=num_tokens, max_new_tokens=1).ids


def _median(run: Callable[[], None], seconds: float) -> float:
    """Seconds of a run, of as many as there is time for, but two at least."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < _RUNS and sum(times) < seconds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def plot(panels: dict[str, list[Curve]], file: Path) -> None:
    """Draws a panel per amount, both axes in logarithms, with a line of exponent 1 beside each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for panel, (amount, curves) in zip(axes.flat, panels.items(), strict=True):
        for curve in curves:
            name = f"{curve.name}: exponent {curve.exponent:.2f}"
            (line,) = panel.loglog(curve.amounts, curve.values, "o-", label=name, markersize=3)
            ends = np.array([curve.amounts[0], curve.amounts[-1]])
            linear = curve.values[0] * ends / ends[0]
            panel.loglog(ends, linear, ":", color=line.get_color(), linewidth=1)
        panel.set_xlabel(f"{amount} (dotted: linear)")
        panel.legend(fontsize=7)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main() -> None:
    """Prints every curve's ends and exponents, versions and device; draws them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seconds", type=float, default=3, help="per point (default: %(default)s)")
    arguments = parser.parse_args()
    bundle = arguments.bundle or models.bundle(
        "vit-s-smollm2", vision="int8", decoder="int8", prefill="int8"
    )
    seconds = arguments.seconds
    assistant = Assistant.open(bundle).load()
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(sample_clip(0), clip, num_frames=_CLIP_FRAMES)
        _to_input(assistant.watch(clip, _FRAMES[0]))
        panels = {"frames": frames(assistant, clip, _FRAMES, seconds)}
        video = assistant.watch(clip, _FRAMES_OF_TOKENS)
        panels["visual tokens"] = tokens(video, _TOKENS, seconds)
        video = assistant.watch(clip, _FRAMES_OF_TURNS)
        panels["turn"] = turns(video, _TURNS, _TOKENS_OF_TURNS)
        panels["videos"] = videos(bundle, clip, _VIDEOS, seconds)
    print("| what | first | last | exponent | of the last doubling | linear or better |")
    print("|---|---:|---:|---:|---:|---|")
    for amount, curves in panels.items():
        for curve in curves:
            print(f"| by {amount}: {str(curve).removeprefix('| ')}")
    print(f"\n{bundle.name}; {machine('onnxruntime', 'numpy')}")
    if arguments.plot:
        plot(panels, arguments.plot)


if __name__ == "__main__":
    main()
