"""Answers questions about videos from an exported bundle, without torch.

    assistant = Assistant.open("bundle")
    video = assistant.watch("clip.mp4")
    for piece in video.ask("What moves to the left?"):
        print(piece, end="", flush=True)

The way of one video: `video.read_clip` → `preprocess.pixel_values` → `memory.remember`; of one
question: `prompt` → text and pool engines → `decoders` → text. `assistant` ties them together.
"""

from __future__ import annotations

from ppllava_runtime.answer import Accounting, Answer, Milliseconds
from ppllava_runtime.assistant import Assistant, Video

__all__ = ["Accounting", "Answer", "Assistant", "Milliseconds", "Video"]
