"""Frames of a live session on their way into its window, and what becomes of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from ppllava_engines.errors import DataError, MediaError, PPLLaVAError, SandboxError, StorageError
from ppllava_runtime.feed import Pace
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.live import LiveVideo
from ppllava_runtime.newest import Follower, Newest
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.live_messages import Config, SentFrame

if TYPE_CHECKING:
    from ppllava_runtime.server.service import Service


class Counts(BaseModel):
    """What became of the frames of a session.

    Attributes:
        received: Frames that came.
        thinned: Those of them beyond the rate.
        dropped: Those that a newer one took the place of, as the encoder was too slow.
        failed: Those that could not be looked at.
        kept: Those that went into the window.
        encoded: Those that went through the tower: not those that look as another in the window.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    received: int
    thinned: int
    dropped: int
    failed: int
    kept: int
    encoded: int


@dataclass(frozen=True)
class _Sent:
    """A picture's file and when it was to be seen."""

    picture: bytes
    seconds: float


class LiveWindow:
    """A session's frames on their way into its live video; a thread looks at them.

    Args:
        service: Whose sandbox decodes.
        live: Where they go.
        note: Called, in that thread, with what is wrong with one.
    """

    def __init__(self, service: Service, live: LiveVideo, note: Callable[[ApiError], None]) -> None:
        self.live = live
        self._service = service
        self._began = time.monotonic()
        self._last = float("-inf")
        self._pace = Pace(live.fps)
        self._num_received = 0
        self._num_thinned = 0
        self._num_failed = 0
        self._note = note
        self._frames: Newest[_Sent] = Newest()
        # One file for all frames, as they come one after the other.
        self._folder = tempfile.TemporaryDirectory(dir=service.spool.folder)
        self._path = Path(self._folder.name) / "frame"
        self._leaving = Leaving()
        self._is_lost = False  # what decodes
        self._follower = Follower(self._frames, self._look, self._fail)

    def put(self, frame: SentFrame) -> None:
        """Takes a frame; it may be dropped.

        Raises:
            ApiError: Not base64, or not later than the frame before.
        """
        metrics = self._service.metrics
        self._num_received += 1
        metrics.live_frames("received")
        seconds = frame.timestamp
        if seconds is None:
            seconds = time.monotonic() - self._began
        try:
            picture = frame.picture()
            self._check(seconds)
        except ApiError:
            self._num_failed += 1
            raise

        self._last = seconds
        if not self._pace.takes(seconds):
            self._num_thinned += 1
            return
        dropped = self._frames.num_dropped
        self._frames.put(_Sent(picture, seconds))
        if self._frames.num_dropped > dropped:
            metrics.live_frames("dropped")

    @property
    def has_ended(self) -> bool:
        """Whether frames are looked at no more."""
        return self._follower.has_ended

    def check(self) -> None:
        """Nothing, while frames are looked at.

        Raises:
            Exception: What ended that.
        """
        self._follower.check()

    def settle(self, leaving: Leaving) -> None:
        """Returns when all frames that were put here have been looked at or dropped.

        Raises:
            Left: Nobody waits for that any more.
            Exception: Frames are looked at no more.
        """
        with leaving.ending(self._frames.wake):
            self._frames.settle(given_up=lambda: leaving.has_left)
        leaving.check()
        self.check()

    def counts(self) -> Counts:
        """What became of the frames so far."""
        return Counts(
            received=self._num_received,
            thinned=self._num_thinned,
            dropped=self._frames.num_dropped,
            failed=self._num_failed,
            kept=self.live.num_seen,
            encoded=self.live.num_encoded,
        )

    def close(self) -> None:
        """Ends the thread, and what it decodes, and removes the file."""
        self._leaving.leave()
        self._leaving.end()
        self._follower.close()
        self._folder.cleanup()

    def _check(self, seconds: float) -> None:
        if not self._last < seconds:
            raise ApiError(
                400,
                f"message: video.frame.timestamp: it is {seconds}, expected more than "
                f"{self._last} of the frame before",
                code="invalid_value",
                param="video.frame.timestamp",
            )

    def _look(self, sent: _Sent) -> None:
        try:
            self._path.write_bytes(sent.picture)
        except OSError as error:  # a full disk may have room again for the next
            raise StorageError(f"spool {self._path}: it cannot be written: {error}") from error
        found = self._service.assistant.decoding.still(self._path, self._leaving)
        if found is None:
            raise DataError(f"image {self._path}: it moves or is no picture, send JPEG or PNG")
        self._is_lost = False
        before = self.live.num_encoded
        self.live.add(found[0], sent.seconds)
        self._service.metrics.live_frames("encoded", self.live.num_encoded - before)

    def _fail(self, error: PPLLaVAError) -> None:
        self._num_failed += 1
        if isinstance(error, MediaError):
            self._service.metrics.media_failed()
        was_lost, self._is_lost = self._is_lost, isinstance(error, SandboxError)
        if was_lost and self._is_lost:
            return  # it was told and logged, and each frame would tell it again
        told = ApiError.of(error)
        # Where it lay is nobody's business.
        sentence = told.message.replace(str(self._path), "of video.frame")
        self._note(ApiError(told.status, sentence, code=told.code, param="video.frame"))


def live_video(service: Service, config: Config, tenant: str) -> LiveVideo:
    """The window that a client wants, which takes no more memory than the server's own.

    Raises:
        ApiError: It would.
        UsageError: See `LiveVideo`.
    """
    settings = service.settings
    fps = settings.live_fps if config.fps is None else config.fps
    most = round(settings.live_seconds * settings.live_fps)
    # What nobody has asked for is no more than the model takes, and no more than there may be.
    default = min(settings.live_seconds, min(service.assistant.max_frames, most) / fps)
    seconds = default if config.seconds is None else config.seconds
    if round(seconds * fps) > most:
        raise ApiError(
            400,
            f"message: session.config: {seconds:g} s at {fps:g} frames a second are "
            f"{round(seconds * fps)} frames, expected at most {most}",
            code="invalid_value",
            param="session.config.seconds",
        )
    return LiveVideo(service.assistant, seconds, fps, config.system_prompt, tenant)
