"""Files from strangers are decoded in processes that may open nothing, take little and die alone.

One process (the zygote, see `sandbox_worker`) waits and forks another for every file, which takes
milliseconds. To it goes the file's descriptor, from it come pictures: of a length that was agreed,
since what decodes a file from a stranger may be the stranger's by then. Where it breaks a limit, or
breaks, the file is to blame and nothing else notices.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Lock

import numpy as np

from ppllava_engines.errors import (
    DataError,
    MediaError,
    NotFoundError,
    SandboxError,
    StorageError,
    UsageError,
)
from ppllava_runtime.choosing import Sample
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.local import ahead
from ppllava_runtime.memory import THUMBNAIL_SIDE
from ppllava_runtime.sandbox_process import Run, Tally, Zygote, plain
from ppllava_runtime.sandbox_wire import Done, Frame, Job, Still
from ppllava_runtime.video import ClipInfo
from ppllava_runtime.watching import ClipFrames, Picture, Shown

_FRAMES_AHEAD = 8  # as many as `local` has
_MOST_READINGS = 3  # of a file that breaks its word, see `video`


class Sandbox:
    """An Opener for files from strangers; several at once from any thread.

    It starts with the first file, or with `start`, and is to be closed.

    Args:
        limits: What one file may be and take.

    Attributes:
        limits: The same.
    """

    def __init__(self, limits: MediaLimits | None = None) -> None:
        self.limits = limits or MediaLimits()
        self._tally = Tally()
        self._lock = Lock()
        self._zygote: Zygote | None = None
        self._closed = False

    def start(self) -> Sandbox:
        """This sandbox, ready to decode.

        Raises:
            SandboxError: Its first process does not start.
            UsageError: It was closed.
        """
        with self._lock:
            self._started()
        return self

    def close(self) -> None:
        """Ends all of its processes; what is being decoded fails."""
        with self._lock:
            self._closed = True
            self._stop()

    @property
    def num_broken(self) -> int:
        """How many files broke the process that decoded them, or made it break a limit of time."""
        return self._tally.num_broken

    @property
    def peak_bytes(self) -> int:
        """The most memory that any process which decoded a file had in use."""
        return self._tally.peak_bytes

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def still(self, path: Path, leaving: Leaving) -> tuple[Picture, str | None] | None:
        """The picture in a file, see `pictures.read_picture`.

        Raises:
            MediaError: Whatever is wrong with what is in it: damage, more than the limits, what
                broke the process that decoded it.
            DataError, NotFoundError, StorageError: It is no file, not there, or may not be read.
            SandboxError: What decodes is gone, or does not start.
            UsageError: See `start`.
            Left: Nobody waits for it any more.
        """
        job = Job(str(path), "still", Sample(), 0, self.limits)
        with closing(self.begin("image", job, leaving)) as run, leaving.ending(run.kill):
            found = run.take(Still)
            if found.height == 0:
                run.finish()
                return None
            if not 0 < found.height * found.width <= self.limits.num_pixels or found.width < 0:
                raise run.broken(f"it announced a picture of {found.width}×{found.height}")
            picture = run.pixels(found.height, found.width)
            run.finish()
            return picture, found.note and plain(found.note)

    def clip(self, path: Path, sample: Sample, size: int, leaving: Leaving) -> ClipFrames:
        """The frames of a video as `video.ChosenFrames` gives them.

        Iterating raises what `still` does, for videos.
        """
        return _SandboxFrames(self, path, sample, size, leaving)

    def begin(self, kind: str, job: Job, leaving: Leaving) -> Run:
        """A process that decodes a file; see `still` for what it raises."""
        with closing(_Opened(kind, Path(job.path), self.limits.num_bytes)) as file, self._lock:
            try:
                wires = self._started().begin(job, file.descriptor)
            except OSError:  # it died since it was looked at
                self._stop()
                try:
                    wires = self._started().begin(job, file.descriptor)
                except OSError as error:
                    raise SandboxError(
                        f"sandbox: what decodes dies as soon as it has started ({error}): see the "
                        "system's log for who ends it"
                    ) from error
        return Run(self.limits, self._tally, f"{kind} {job.path}", leaving, *wires)

    def _started(self) -> Zygote:
        if self._closed:
            raise UsageError("the sandbox was closed: make another")
        if self._zygote is None or not self._zygote.lives:
            self._stop()
            self._zygote = Zygote()
        return self._zygote

    def _stop(self) -> None:
        if self._zygote:
            self._zygote.close()
            self._zygote = None


class _SandboxFrames:
    """The frames of one video; a thread takes them from the process, which waits for it."""

    info: ClipInfo

    def __init__(
        self, sandbox: Sandbox, path: Path, sample: Sample, size: int, leaving: Leaving
    ) -> None:
        self.num_rows = 0
        self._sandbox = sandbox
        self._path = path
        self._sample = sample
        self._size = size
        self._leaving = leaving
        self._run: Run | None = None
        self._left = Event()
        self._ahead = ahead(self._received(), _FRAMES_AHEAD, self._left)

    def __iter__(self) -> Iterator[Shown]:
        return self._ahead

    def close(self) -> None:
        self._left.set()
        if self._run:
            self._run.kill()  # else the thread would wait for what it says
        self._ahead.close()

    def _received(self) -> Generator[Shown, None, None]:
        size, sandbox = self._size, self._sandbox
        job = Job(str(self._path), "clip", _in_plain_numbers(self._sample), size, sandbox.limits)
        leaving = self._leaving
        with closing(sandbox.begin("video", job, leaving)) as run, leaving.ending(run.kill):
            self._run = run
            if self._left.is_set():
                return
            there: set[int] = set()
            count = 0
            while not isinstance(found := run.take(Frame, Done), Done):
                if count == 0:
                    self._fix(run, found.num_rows)
                count += 1
                self._check(run, found, count)
                there.update(found.rows)
                square = run.pixels(size, size)
                yield found.rows, square, run.pixels(found.height, found.width)
            self.info = self._checked(run, found, len(there))
            run.finish()

    def _fix(self, run: Run, num_rows: int) -> None:
        bounds = [self._sample.num_frames, self._sample.most, self._sandbox.limits.num_frames]
        if not 0 < num_rows <= min(count for count in bounds if count is not None):
            raise run.broken(f"it announced {num_rows} frames")
        self.num_rows = num_rows

    def _check(self, run: Run, frame: Frame, count: int) -> None:
        fits = 0 < frame.height <= THUMBNAIL_SIDE and 0 < frame.width <= THUMBNAIL_SIDE
        inside = frame.rows and all(0 <= row < self.num_rows for row in frame.rows)
        known = frame.num_rows == self.num_rows and count <= _MOST_READINGS * self.num_rows
        if not fits or not inside or not known:
            raise run.broken("it announced another frame than was asked for")

    def _checked(self, run: Run, done: Done, num_there: int) -> ClipInfo:
        lengths = {self.num_rows, num_there, len(done.timestamps), len(done.indices)}
        inside = all(0 <= place < done.num_frames for place in done.indices)
        counts = 0 < done.num_frames <= self._sandbox.limits.num_frames and done.num_decoded > 0
        if lengths != {max(1, num_there)} or not inside or not counts or not done.fps > 0:
            raise run.broken("what it said of the frames is not about them")
        return ClipInfo(
            timestamps=np.array(done.timestamps, np.float64),
            indices=done.indices,
            num_frames=done.num_frames,
            num_decoded=done.num_decoded,
            fps=done.fps,
            damage=done.damage and plain(done.damage),
        )


def _in_plain_numbers(sample: Sample) -> Sample:
    """The same; NumPy's numbers are numbers too, but not in JSON."""
    counts = (sample.num_frames, sample.most)
    num_frames, most = (None if count is None else int(count) for count in counts)
    rest = (sample.fps, sample.start, sample.end)
    fps, start, end = (None if number is None else float(number) for number in rest)
    return Sample(num_frames, fps, start, end, most)


class _Opened:
    """A file that is there and not too large, by its descriptor."""

    def __init__(self, kind: str, path: Path, num_bytes: int) -> None:
        try:
            # Not to wait for who writes into a pipe.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFoundError(f"{kind} {path}: no such file") from error
        except PermissionError as error:
            raise StorageError(f"{kind} {path}: no permission to read it") from error
        except (OSError, ValueError) as error:
            raise StorageError(f"{kind} {path}: it cannot be opened ({error})") from error
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise DataError(f"{kind} {path}: not a file")
        if status.st_size > num_bytes:
            self.close()
            raise MediaError(
                f"{kind} {path}: it has {status.st_size} bytes, expected at most {num_bytes}: "
                "make it smaller"
            )

    def close(self) -> None:
        os.close(self.descriptor)
