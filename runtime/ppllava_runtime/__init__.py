"""Answers questions about videos from an exported bundle, without torch.

    assistant = Assistant.open("bundle")
    video = assistant.watch("clip.mp4")
    for piece in video.ask("What moves to the left?"):
        print(piece, end="", flush=True)

`Assistant.look` takes several pictures, and `Assistant.ask` questions about no video at all. A
bundle without tokenizers is asked with a `Prompt` of ids, and `Answer.ids` are what it answers.

The way of one video: `video.read_clip` → `preprocess.pixel_values` → `memory.encode`; of one
question: `prompt` → text and pool engines → `decoders` → text. `assistant` ties them together.
"""

from __future__ import annotations

from ppllava_runtime.answer import Accounting, Answer, Milliseconds
from ppllava_runtime.assistant import Assistant, Video
from ppllava_runtime.prompt import Prompt

__all__ = ["Accounting", "Answer", "Assistant", "Milliseconds", "Prompt", "Video"]
