"""What a camera shows now: a ring of encoded frames, about which a question is asked at any time.

Frame n goes to row n mod R and once more R rows below, so that the frames of a window, whichever
one is the oldest, are neighbours: a question reads them where they are, and nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.engine import Array
from ppllava_engines.errors import UsageError
from ppllava_runtime.answer import Answer, Stopwatch
from ppllava_runtime.asking import Asker, Options
from ppllava_runtime.assistant import Assistant
from ppllava_runtime.conversation import Cost, Video
from ppllava_runtime.lane import Lane
from ppllava_runtime.memories import Watched
from ppllava_runtime.memory import THUMBNAIL_SIDE, Memory, thumbnails
from ppllava_runtime.preprocess import normalised, squared
from ppllava_runtime.prompt import Prompt
from ppllava_runtime.recorder import Record
from ppllava_runtime.video import ClipInfo

Picture = NDArray[np.uint8]

_FEWEST_FRAMES = 2
_NUM_COLOURS = 3


@dataclass(frozen=True)
class _Shown:
    """What a row of the ring shows.

    Attributes:
        time: When it was to be seen, in seconds.
        digest: Of what the tower gets.
        thumbnail: For people.
    """

    time: float
    digest: bytes
    thumbnail: Picture


class LiveVideo(Asker):
    """The last seconds of something that goes on, at a rate; questions are about those.

    Frames may come from one thread and questions from others. Each frame is encoded once, when it
    comes; but where the tower's frames see each other (BT-Adapter) the frames are kept as they are,
    and each question encodes the whole window.

    Attributes:
        assistant: Who looks.
        seconds: What the window spans.
        fps: Frames a second that are kept of it.
        num_seen: Frames that came.
        num_encoded: How many of them went through the tower: one that looks the same to it as
            another in the ring does not.

    Args:
        assistant, seconds, fps: See above.
        preface: What the decoder reads before each question, see `Video.converse`.
        owner: For whom, see `Video.converse`.

    Raises:
        UsageError: A window of less than 2 frames, or of more than the model takes.
    """

    def __init__(
        self, assistant: Assistant, seconds: float, fps: float, preface: str = "", owner: str = ""
    ) -> None:
        for name, value in (("seconds", seconds), ("fps", fps)):
            if not 0 < value < float("inf"):
                raise UsageError(f"live: {name} is {value}, expected more than 0")
        num_rows = round(seconds * fps)
        if not _FEWEST_FRAMES <= num_rows <= assistant.max_frames:
            raise UsageError(
                f"live: a window of {seconds:g} s at {fps:g} frames a second is {num_rows} frames, "
                f"expected {_FEWEST_FRAMES} to {assistant.max_frames}, as "
                f"{assistant.model.name} takes: choose another window or rate"
            )
        self.assistant = assistant
        self.seconds = seconds
        self.fps = fps
        self.num_seen = 0
        self.num_encoded = 0
        self._preface = preface
        self._owner = owner
        self._num_rows = num_rows
        self._shown: list[_Shown | None] = [None] * num_rows
        # In turn, so that frames that come fast do not keep a question waiting.
        self._turn = Lane()
        self._coupled = assistant.model.frames_coupled
        if self._coupled:
            side = assistant.model.image_size
            self._squares = np.zeros((num_rows, side, side, _NUM_COLOURS), np.uint8)
        else:
            self._recorder = assistant.recorder(2 * num_rows, False)
            self._record = self._recorder.finish()

    @property
    def num_frames(self) -> int:
        """How many frames are in the window now."""
        with self._turn:
            return len(self._rows())

    @property
    def span(self) -> float:
        """Seconds from the first frame in the window to the last."""
        with self._turn:
            times = [one.time for one in self._frames(self._rows())]
        return times[-1] - times[0] if times else 0.0

    @property
    def num_rows(self) -> int:
        """The most frames of a window, R."""
        return self._num_rows

    @property
    def nbytes(self) -> int:
        """Bytes that this takes at most, from its beginning to its end, thumbnails included.

        An answer holds the thumbnails of its window, which others may have left since.
        """
        small = self._num_rows * THUMBNAIL_SIDE**2 * _NUM_COLOURS
        # What the tower gets: of one frame, or of the window for one question at a time.
        values = self.assistant.model.image_size**2 * _NUM_COLOURS * np.dtype(np.float32).itemsize
        if self._coupled:
            encoded = self.assistant.layout.num_bytes(self._num_rows)
            return self._squares.nbytes + self._num_rows * values + encoded + small
        return self._record.nbytes + values + small

    def describe(self) -> str:
        """A sentence about the window and what it takes, for the person who starts it."""
        how = (
            "whose frames see each other, so each question encodes the window again"
            if self._coupled
            else "each frame encoded once"
        )
        return (
            f"live: {self._num_rows} frames, {self.seconds:g} s at {self.fps:g} a second, in at "
            f"most {self.nbytes / 1e6:.1f} MB; {how}"
        )

    def add(self, frame: Picture, time: float) -> None:
        """Takes one more frame, and lets go of the oldest.

        Args:
            frame: (H,W,3) uint8 RGB, upright.
            time: In seconds, from any beginning; later than that of the frame before.

        Raises:
            UsageError: A time that is not later; or outputs too large for float16, see
                `Recorder.encode`.
        """
        square = squared(frame, self.assistant.model.image_size)
        (thumbnail,) = thumbnails([frame])
        if thumbnail.base is not None or thumbnail is frame:
            thumbnail = thumbnail.copy()  # else it could hold much more than itself, or change
        digest = sha256(square.tobytes()).digest()
        with self._turn:
            last = self._shown[(self.num_seen - 1) % self._num_rows]
            if last is not None and not last.time < time:
                raise UsageError(
                    f"live: a frame of {time} s came after that of {last.time} s, expected a later "
                    "one"
                )
            row = self.num_seen % self._num_rows
            self._keep(row, square, digest)
            self._shown[row] = _Shown(time, digest, thumbnail)
            self.num_seen += 1

    def answer(self, question: str | Prompt, options: Options) -> Answer:
        """The answer to a question about the window as it is now; see `ask`.

        The window is pooled before this returns: what comes later has no part in the answer.

        Raises:
            UsageError: See `ask`; or there is no frame yet.
            IncompatibleError, UnavailableError: See `ask`.
        """
        assistant = self.assistant
        # Frames wait while a question has the turn: what may take long is done before.
        _ = assistant.text, assistant.pool, assistant.weigh, assistant.newline, assistant.decoder
        constraint = assistant.constraint(options.json_schema, options.regex)
        with self._turn:
            rows = self._rows()
            if not rows:
                raise UsageError("live: no frame has come yet, ask when one has")
            record, cost = self._seen(rows)
            frames = self._frames(rows)
            times = np.array([one.time for one in frames])
            small = tuple(one.thumbnail for one in frames)
            memory = Memory("video", record, assistant.model.grid, times, small)
            first = self.num_seen - len(rows)
            places = tuple(range(first, self.num_seen))
            info = ClipInfo(times, places, self.num_seen, len(rows), self.fps)
            video = Video(assistant, Watched(memory, info), cost)
            conversation = video.converse(preface=self._preface, owner=self._owner)
            return conversation.answer(question, options, constraint)

    def _rows(self) -> range:
        """The rows of the window: those of its frames that are not too long ago for it."""
        num_rows, end = self._num_rows, self.num_seen
        first = max(0, end - num_rows)
        newest = self._shown[(end - 1) % num_rows]
        if newest is not None:
            # By half a frame more, as frames do not come to the microsecond.
            oldest = newest.time - self.seconds + 0.5 / self.fps
            while (shown := self._shown[first % num_rows]) is None or shown.time < oldest:
                first += 1
        count = end - first
        return range(first % num_rows, first % num_rows + count)

    def _frames(self, rows: range) -> list[_Shown]:
        """What rows of the window show."""
        shown = (self._shown[row % self._num_rows] for row in rows)
        return [one for one in shown if one is not None]

    def _keep(self, row: int, square: Picture, digest: bytes) -> None:
        """Stores what the tower makes of a frame, which may be there already."""
        if self._coupled:
            self._squares[row] = square
            return
        twins = (row, row + self._num_rows)
        same = next((i for i, one in enumerate(self._shown) if one and one.digest == digest), None)
        if same is None:
            # Nothing is at this row while it changes; if that fails, nothing stays there.
            self._shown[row] = None
            model = self.assistant.model
            values = normalised([square], model.image_mean, model.image_std)
            self._recorder.encode([row], values)
            self._recorder.repeat(row, twins[1:])
            self.num_encoded += 1
        elif same != row:
            self._recorder.repeat(same, twins)

    def _seen(self, rows: range) -> tuple[Record, Cost]:
        """What is kept of rows that are neighbours, and what it takes to get it."""
        stopwatch = Stopwatch()
        if not self._coupled:
            return _cut(self._record, rows), Cost(0, 0, stopwatch)
        model = self.assistant.model
        with stopwatch.time("preprocess"):
            squares = [self._squares[row % self._num_rows] for row in rows]
            values = normalised(squares, model.image_mean, model.image_std)
        recorder = self.assistant.recorder(len(rows), True)
        with stopwatch.time("vision"):
            recorder.encode(range(len(rows)), values)
        self.num_encoded += len(rows)
        return recorder.finish(), Cost(0, len(rows), stopwatch)


def _cut(record: Record, rows: range) -> Record:
    """Some rows of a record, where they are."""
    arrays: dict[str, Array] = {
        name: array[rows.start : rows.stop] for name, array in record.arrays.items()
    }
    return Record(record.layout, arrays)
