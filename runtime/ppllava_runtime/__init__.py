"""Answers questions about videos from an exported bundle, without torch.

    assistant = Assistant.open("bundle")
    video = assistant.watch("clip.mp4")
    for piece in video.ask("What moves to the left?"):
        print(piece, end="", flush=True)

`Assistant.look` takes several pictures, and `Assistant.ask` questions about no video at all. A
bundle without tokenizers is asked with a `Prompt` of ids, and `Answer.ids` are what it answers.

`Video.converse` asks one question behind the other. An `Assistant` keeps of a video what its
`memory` says, and in a `MemoryStore` those that may come again. Several threads may use one: its
`lane` lets them to the device in turn.

The way of one video: a `watching.Opener`, in this process that of `local` → `watching.watch_clip`
→ `recorder.Recorder` → `memory.Memory`; of one question: `asking` → `prompt` → text and pool
engines → `decoders` → text. `conversation` ties these together, `assistant` both.
"""

from __future__ import annotations

from ppllava_runtime.answer import Accounting, Answer, Milliseconds
from ppllava_runtime.assistant import Assistant
from ppllava_runtime.conversation import Conversation, Video
from ppllava_runtime.memories import MemoryStore
from ppllava_runtime.prompt import Prompt

__all__ = [
    "Accounting",
    "Answer",
    "Assistant",
    "Conversation",
    "MemoryStore",
    "Milliseconds",
    "Prompt",
    "Video",
]
