"""The first question about a video against the second, and against the published computation.

`python benchmarks/ask_again.py BUNDLE VIDEO`
`PYTHONPATH=examples python -m benchmarks.ask_again BUNDLE VIDEO --checkpoint CHECKPOINT`

All sides run in this process, interleaved, on the same video: watching it anew and asking, asking
again what was watched before, and, with the checkpoint, what the research code does (tower,
projector on every token, padded text, unfolded windows) in torch and float32, from the same pixels.
Ours is timed up to the decoder's input, the prompt of embeddings, and up to the first id; the
reference up to the pooled tokens, which go into it. Its last results are compared with ours, and
where they are not of the same shape there are no figures at all.

The full size is ViT-L/14-336 and D = 4,096 with random weights: `python -m benchmarks.models
vit-l-4096 --vision int8` prints the bundle, and its checkpoint is beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from ppllava_runtime import Assistant
from ppllava_runtime.answer import Stopwatch
from ppllava_runtime.conversation import Video, pooled

if TYPE_CHECKING:  # what needs torch, and the repository's root on the path
    from benchmarks.reference import Agreement, Results

_QUESTIONS = ("Describe the video.", "What is it that moves?")
_AGAIN = 5  # second questions per first one: they take so much less
_RUNS, _RUNS_OF_REFERENCE = 15, 1  # of which one takes minutes
_PUBLISHED = "published computation in torch fp32, pixels to pooled tokens"
_FIRST, _SECOND = "first question, pixels to the decoder's input", "second, to the decoder's input"
_FIRST_ID, _SECOND_ID = "first question, file to the first id", "second, to the first id"


class Sides:
    """What is timed.

    Attributes:
        seconds: By name.
        expected: What the reference gave last.

    Args:
        assistant: Ours.
        video: The file.
        num_frames: Frames to look at.
        questions: Asked in turns, because a prompt that was there before is not computed again.
    """

    def __init__(
        self, assistant: Assistant, video: str, num_frames: int | None, questions: Sequence[str]
    ) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.expected: Results | None = None
        self._assistant = assistant
        self._video = video
        self._num_frames = num_frames
        self._questions = cycle(questions)

    def watch(self) -> Video:
        """What was seen, by watching the video anew."""
        return self._assistant.watch(self._video, self._num_frames)

    def first(self) -> None:
        """Watches anew and asks; the frames' way from the file to the tower counts apart."""
        began = time.perf_counter()
        answer = self.watch().ask(next(self._questions), max_new_tokens=1)
        asked = time.perf_counter()
        _ = answer.ids
        spent = answer.accounting.milliseconds
        reading = (spent.decode + spent.preprocess) / 1000
        self._add(_FIRST, asked - began - reading)
        self._add(_FIRST_ID, time.perf_counter() - began)

    def again(self, seen: Video) -> None:
        """Asks about what was seen."""
        began = time.perf_counter()
        answer = seen.ask(next(self._questions), max_new_tokens=1)
        self._add(_SECOND, time.perf_counter() - began)
        _ = answer.ids
        self._add(_SECOND_ID, time.perf_counter() - began)

    def published(self, side: Callable[[], Results]) -> None:
        """Runs the reference."""
        began = time.perf_counter()
        self.expected = side()
        self._add(_PUBLISHED, time.perf_counter() - began)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)


def reference(
    assistant: Assistant, checkpoint: Path, video: str, num_frames: int, question: str
) -> Callable[[], Results]:
    """What the research code does, from the pixels to the pooled tokens and the relevance."""
    import torch
    from benchmarks.reference import Reference

    from ppllava_runtime.preprocess import pixel_values
    from ppllava_runtime.video import read_clip

    torch.set_num_threads(assistant.threads or len(os.sched_getaffinity(0)))
    model, whole = assistant.model, Reference.open(checkpoint)
    frames = read_clip(video, num_frames).frames
    pixels = pixel_values(frames, model.image_size, model.image_mean, model.image_std)
    ids = assistant.prompts.build(question).text_ids
    return lambda: whole.align(whole.tokens(pixels), ids)


def agreement(seen: Video, question: str, expected: Results) -> Agreement:
    """How close what is spliced into the prompt is to what the reference gave.

    Raises:
        ValueError: It has another shape.
    """
    from benchmarks.reference import Agreement

    assistant, memory = seen.assistant, seen.memory
    window = memory.window(assistant.model)
    prompt = assistant.prompts.build(question, memory.num_places(window))
    (splice,), relevance = pooled(assistant, memory, question, prompt, window, Stopwatch())
    return Agreement.of((splice, relevance), expected)


def main() -> None:
    """Prints all medians, their ratios, versions and device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("video")
    parser.add_argument("--questions", nargs="+", default=_QUESTIONS)
    parser.add_argument("--frames", type=int, help="default: the model's own number")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--memory", default="hidden", help="what is kept (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="what the bundle was made of")
    arguments = parser.parse_args()
    assistant = Assistant.open(arguments.bundle, memory=arguments.memory).load()
    video, questions = arguments.video, arguments.questions
    sides = Sides(assistant, video, arguments.frames, questions)
    seen = sides.watch()
    num_frames = seen.memory.size[0]
    _ = seen.ask(questions[0], max_new_tokens=1).ids
    other = None
    if arguments.checkpoint:
        other = reference(assistant, arguments.checkpoint, video, num_frames, questions[0])
    for _ in range(arguments.runs or (_RUNS_OF_REFERENCE if other else _RUNS)):
        if other:
            sides.published(other)
        sides.first()
        for _ in range(_AGAIN):
            sides.again(seen)
    if sides.expected is not None:
        try:
            print(f"ours against the reference: {agreement(seen, questions[0], sides.expected)}")
        except ValueError as error:
            sys.exit(str(error))
    medians = {name: statistics.median(times) for name, times in sides.seconds.items()}
    for name, times in sides.seconds.items():
        low, high = 1000 * min(times), 1000 * max(times)
        print(f"{name}: {1000 * medians[name]:.1f} ms ({low:.1f} to {high:.1f})")
    for slow, fast in ((_PUBLISHED, _SECOND), (_FIRST, _SECOND), (_FIRST_ID, _SECOND_ID)):
        if slow in medians:
            print(f"{medians[slow] / medians[fast]:.1f} times as fast: {fast}, than {slow}")
    print(
        f"{num_frames} frames, {assistant.bundle.manifest.precision}, memory {arguments.memory}; "
        f"python {platform.python_version()}, onnxruntime {version('onnxruntime')}, "
        f"{platform.machine()}, {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
