"""Files read in this process: one thread decodes and shrinks, who watches encodes meanwhile.

The thread stops when it is a few frames ahead.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

from ppllava_runtime.leaving import Leaving
from ppllava_runtime.memory import thumbnails
from ppllava_runtime.pictures import read_picture
from ppllava_runtime.preprocess import squared
from ppllava_runtime.video import ChosenFrames, ClipInfo, Sample
from ppllava_runtime.watching import ClipFrames, Opener, Picture, Shown

Item = TypeVar("Item")

# Some more than one run of the tower takes.
_FRAMES_AHEAD = 8


class Local:
    """An Opener that reads in this process, videos in a thread of their own.

    For files that one trusts: what a decoder does with others is anybody's guess.
    """

    def still(self, path: Path, leaving: Leaving) -> tuple[Picture, str | None] | None:
        """The picture in a file; see `pictures.read_picture`. Nothing ends it before."""
        leaving.check()
        return read_picture(path)

    def clip(self, path: Path, sample: Sample, size: int, leaving: Leaving) -> ClipFrames:
        """The frames of a video as `video.ChosenFrames` gives them."""
        return _LocalFrames(path, sample, size, leaving)


class _LocalFrames:
    def __init__(self, path: Path, sample: Sample, size: int, leaving: Leaving) -> None:
        left = Event()
        self._leaving = leaving
        self._chosen = ChosenFrames(path, sample, alone=False, left=left)
        self._ahead = ahead(self._shrunk(size), _FRAMES_AHEAD, left)

    @property
    def num_rows(self) -> int:
        return self._chosen.num_rows

    @property
    def info(self) -> ClipInfo:
        return self._chosen.info

    def __iter__(self) -> Iterator[Shown]:
        return self._ahead

    def close(self) -> None:
        self._ahead.close()

    def _shrunk(self, size: int) -> Generator[Shown, None, None]:
        for rows, frame in self._chosen:
            self._leaving.check()
            (thumbnail,) = thumbnails([frame])
            yield rows, squared(frame, size), thumbnail


def ahead(
    items: Generator[Item, None, None], depth: int, left: Event
) -> Generator[Item, None, None]:
    """Yields what a thread takes from `items` meanwhile, of which `depth` may wait here.

    Closing it sets `left`, by which `items` shall end soon, and returns when the thread has ended.
    What `items` raises is raised here.
    """
    waiting: Queue[tuple[Item] | BaseException | None] = Queue(depth)

    def work() -> None:
        last: BaseException | None = None
        try:
            with closing(items):  # here, where its file is being read
                for item in items:
                    waiting.put((item,))
                    if left.is_set():
                        break
        except BaseException as error:
            last = error
        waiting.put(last)

    thread = Thread(target=work, name="ppllava-decode", daemon=True)
    thread.start()
    try:
        while True:
            found = waiting.get()
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found[0]
    finally:
        left.set()
        while thread.is_alive():
            try:  # makes room for one that waits to put something down
                waiting.get(timeout=0.01)
            except Empty:
                continue
        thread.join()


LOCAL: Opener = Local()
