"""ppllava-chat --video-input: questions about what a camera, a stream or a file shows now."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from ppllava_runtime.answer import Answer
from ppllava_runtime.asking import Asker, Options
from ppllava_runtime.assistant import Assistant
from ppllava_runtime.feed import Feed, Frame, Patience
from ppllava_runtime.live import LiveVideo
from ppllava_runtime.newest import Follower
from ppllava_runtime.prompt import Prompt
from ppllava_runtime.sources import open_source
from ppllava_runtime.video import ClipInfo

_DEFAULT_SECONDS, _DEFAULT_FPS = 10.0, 2.0


class LiveChat(Asker):
    """A source that is watched from now on, and asked about; entered by `with`.

    Args:
        assistant: Who looks.
        source: See `sources.open_source`.
        seconds: What the window spans; None is 10, or what the model takes.
        fps: Frames a second of it; None is 2.
        patience: How long to wait for the source.

    Raises:
        NotFoundError, UsageError: See `sources.open_source` and `LiveVideo`.
    """

    def __init__(
        self,
        assistant: Assistant,
        source: str,
        seconds: float | None = None,
        fps: float | None = None,
        patience: Patience | None = None,
    ) -> None:
        fps = _DEFAULT_FPS if fps is None else fps
        if seconds is None:
            most = assistant.max_frames / fps if fps > 0 else _DEFAULT_SECONDS
            seconds = min(_DEFAULT_SECONDS, most)
        self.live = LiveVideo(assistant, seconds, fps)
        found = open_source(source)
        _tell(self.live.describe())
        self._feed = Feed(found, fps, patience=patience, tell=_warn)
        self._follower = Follower(self._feed.frames, self._add)

    def __enter__(self) -> LiveChat:
        return self

    def __exit__(self, *_: object) -> None:
        self._feed.close()
        self._follower.close()

    def answer(self, question: str | Prompt, options: Options) -> Answer:
        """The answer about the window as it is now, which has a frame at least.

        Raises:
            PPLLaVAError: What ended the watching; else see `LiveVideo.answer`.
        """
        self._follower.wait_for(lambda: self.live.num_seen > 0)
        return self.live.answer(question, options)

    def check(self) -> None:
        """Nothing, while the source is watched or has come to its end.

        Raises:
            PPLLaVAError: What ended the watching.
        """
        self._follower.check()

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Returns when the window is full, or the source has ended.

        Args:
            progress: Called with the number of frames in the window and of all.

        Raises:
            PPLLaVAError: What ended the watching.
        """
        live = self.live

        def is_full() -> bool:
            if progress:
                progress(live.num_frames, live.num_rows)
            # Where frames come more slowly than at the rate, the window never holds as many.
            return live.num_frames >= live.num_rows or live.span >= live.seconds - 1 / live.fps

        self._follower.wait_for(is_full)
        if progress:
            progress(live.num_rows, live.num_rows)

    def info(self, answer: Answer) -> ClipInfo:
        """What is known of the frames that an answer looked at."""
        times = np.asarray(answer.timestamps)
        return ClipInfo(times, tuple(range(len(times))), self.live.num_seen, 0, self.live.fps)

    def counts(self) -> dict[str, int]:
        """Pictures so far, by what became of them, and how often the source came back."""
        return {
            "seen": self._feed.num_seen,
            "dropped": self._feed.num_dropped,
            "kept": self.live.num_seen,
            "encoded": self.live.num_encoded,
            "lost": self._feed.num_lost,
            "recovered": self._feed.num_recovered,
        }

    def _add(self, frame: Frame) -> None:
        self.live.add(frame.picture, frame.seconds)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _warn(sentence: str) -> None:
    _tell(f"warning: {sentence}")
