"""A process that decodes may be anybody's: what it says is checked before it is believed."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from socket import SHUT_WR, socket, socketpair
from threading import Thread
from typing import Any

import numpy as np
import pytest

from ppllava_engines.errors import MediaError, SandboxError, UsageError
from ppllava_runtime.choosing import Sample
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.sandbox import Sandbox
from ppllava_runtime.sandbox_process import Run, Tally
from ppllava_runtime.sandbox_wire import Done, Ended, Failed, Frame, Job, Still, packed, send

SIZE, ROWS = 8, 2
LIMITS = MediaLimits(num_pixels=100, num_frames=50, wall_seconds=60)
PIXELS = bytes(SIZE * SIZE * 3)
FRAMES = [Frame((0,), ROWS, 2, 3), Frame((1,), ROWS, 2, 3)]
DONE = Done((0.0, 0.5), (0, 1), 2, 2, 2.0, None)


class Impostor(Sandbox):
    """A sandbox whose process says what a test lets it say.

    Args:
        says: All of it; what it says after that is that it ended by itself.
        ended: How it says that it did, None is not at all.
    """

    def __init__(self, says: bytes, ended: Ended | None = None) -> None:
        super().__init__(LIMITS)
        self._says = says
        self._how = ended
        self.threads: list[Thread] = []

    def begin(self, kind: str, job: Job, leaving: Leaving) -> Run:
        data, its_data = socketpair()
        status, its_status = socketpair()
        thread = Thread(target=self._speak, args=(its_data, its_status))
        thread.start()
        self.threads.append(thread)
        return Run(LIMITS, Tally(), f"{kind} {job.path}", leaving, data, status)

    def _speak(self, data: socket, status: socket) -> None:
        with data, status:
            try:
                data.sendall(self._says)
                data.shutdown(SHUT_WR)
                if self._how:
                    status.send(packed(self._how))
            except OSError:  # nobody listens to such things any longer
                return


def said(*messages: tuple[Any, ...]) -> bytes:
    """What `send` makes of messages with their pixels."""
    ours, theirs = socketpair()
    with ours, theirs:

        def speak() -> None:
            for message in messages:
                send(theirs, *message)
            theirs.shutdown(SHUT_WR)

        speaking = Thread(target=speak)
        speaking.start()
        content = b""
        while part := ours.recv(1 << 16):
            content += part
        speaking.join()
        return content


def raw(value: Any) -> bytes:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(content).to_bytes(4, "big") + content


def shown(frame: Frame) -> tuple[Any, ...]:
    return frame, PIXELS, bytes(max(0, frame.height * frame.width * 3))


def watch(says: bytes, ended: Ended | None = None) -> list[Any]:
    sandbox = Impostor(says, ended)
    try:
        with closing(sandbox.clip(Path("a.mp4"), Sample(ROWS), SIZE, Leaving())) as frames:
            return [*frames, frames.info]
    finally:
        for thread in sandbox.threads:
            thread.join()


def look(says: bytes) -> Any:
    sandbox = Impostor(says)
    try:
        return sandbox.still(Path("a.png"), Leaving())
    finally:
        for thread in sandbox.threads:
            thread.join()


def test_what_is_right_is_believed() -> None:
    *frames, info = watch(said(*map(shown, FRAMES), (DONE,)))
    assert [rows for rows, _, _ in frames] == [(0,), (1,)]
    assert [square.shape for _, square, _ in frames] == [(SIZE, SIZE, 3)] * 2
    assert [thumbnail.shape for _, _, thumbnail in frames] == [(2, 3, 3)] * 2
    assert info.indices == (0, 1)
    found = look(said((Still(2, 2, "a note"), bytes(12))))
    np.testing.assert_array_equal(found[0], np.zeros((2, 2, 3), np.uint8))
    assert found[1] == "a note"
    assert look(said((Still(0, 0, None),))) is None


@pytest.mark.parametrize(
    "frame",
    [
        Frame((0,), 3, 2, 3),
        Frame((0,), 0, 2, 3),
        Frame((0,), -1, 2, 3),
        Frame((0,), 1 << 40, 2, 3),
        Frame((2,), ROWS, 2, 3),
        Frame((-1,), ROWS, 2, 3),
        Frame((), ROWS, 2, 3),
        Frame((0,), ROWS, 0, 3),
        Frame((0,), ROWS, 2, 481),
        Frame((0,), ROWS, 1 << 40, 1 << 40),
        Frame((0,), ROWS, -2, -3),
    ],
    ids=str,
)
def test_a_frame_that_was_not_asked_for_is_refused(frame: Frame) -> None:
    with pytest.raises(MediaError, match=r"video a\.mp4: it broke its decoder \(it announced"):
        watch(said((frame,)))


def test_frames_that_do_not_come_are_missed() -> None:
    for messages in ([(Done((), (), 2, 2, 2.0, None),)], [shown(FRAMES[1])] * 2 + [(DONE,)]):
        with pytest.raises(MediaError, match="what it said of the frames is not about them"):
            watch(said(*messages))


def test_frames_without_end_are_refused() -> None:
    with pytest.raises(MediaError, match="it announced another frame"):
        watch(said(*[shown(FRAMES[0])] * 50))


@pytest.mark.parametrize(
    "done",
    [
        Done((0.0,), (0,), 2, 2, 2.0, None),
        Done((0.0, 0.5), (0,), 2, 2, 2.0, None),
        Done((0.0, 0.5), (0, 2), 2, 2, 2.0, None),
        Done((0.0, 0.5), (-1, 1), 2, 2, 2.0, None),
        Done((0.0, 0.5), (0, 1), 51, 2, 2.0, None),
        Done((0.0, 0.5), (0, 1), 2, 0, 2.0, None),
        Done((0.0, 0.5), (0, 1), 2, 2, 0.0, None),
        Done((0.0, 0.5), (0, 1), 2, 2, math.nan, None),
        Done((0.0, math.inf), (0, 1), 2, 2, 2.0, None),
    ],
    ids=str,
)
def test_what_is_not_about_the_frames_is_refused(done: Done) -> None:
    with pytest.raises(MediaError, match="it broke its decoder"):
        watch(said(*map(shown, FRAMES), (done,)))


@pytest.mark.parametrize(
    "says",
    [
        (1 << 31).to_bytes(4, "big"),
        raw(b"\xff"),
        raw(b"[" * 100_000),
        raw([]),
        raw(["Frame"]),
        raw(["Job", {}]),
        raw(["Frame", {"rows": [0], "num_rows": True, "height": 2, "width": 2}]),
        raw(["Frame", {"rows": [0], "num_rows": 2, "height": 2}]),
        raw([["Frame"], {}]),
        raw({"Frame": 1, "Done": 2}),
        raw(7),
        raw(["Still", {"height": 1, "width": 1, "note": None}]),
        raw(["Done", {}]),
    ],
    ids=range(13),
)
def test_what_is_no_message_is_refused(says: bytes) -> None:
    with pytest.raises(MediaError, match=r"video a\.mp4: it broke its decoder"):
        watch(says)


@pytest.mark.parametrize(
    "still", [Still(11, 10, None), Still(-2, -2, None), Still(1 << 40, 1, None), Still(5, 0, None)]
)
def test_a_picture_that_is_too_large_is_refused(still: Still) -> None:
    with pytest.raises(MediaError, match=r"image a\.png: it broke its decoder \(it announced"):
        look(said((still,)))


def test_less_than_was_announced_is_refused() -> None:
    everything = said(*map(shown, FRAMES), (DONE,))
    for length in range(0, len(everything), 37):
        with pytest.raises(MediaError, match=r"it broke its decoder \(exit code 0\)"):
            watch(everything[:length], Ended(0, 0, 0, 0.0))


def test_no_file_is_blamed_when_nobody_says_how_its_process_ended() -> None:
    with pytest.raises(SandboxError, match=r"video a\.mp4: .* was ended from outside"):
        watch(b"")


def test_a_process_that_says_no_more_and_does_not_end_is_to_blame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ppllava_runtime.sandbox_process._END_SECONDS", 0.01)
    (data, its_data), (status, its_status) = socketpair(), socketpair()
    tally = Tally()
    with its_status, closing(Run(LIMITS, tally, "video a.mp4", Leaving(), data, status)) as run:
        its_data.close()
        with pytest.raises(MediaError, match="it says no more and does not end"):
            run.take(Done)
    assert tally.num_broken == 1


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (Ended(11, 0, 0, 0.0), "it broke its decoder (SIGSEGV)"),
        (Ended(9, 0, 0, 1.0), "it broke its decoder (SIGKILL)"),
        (Ended(24, 0, 0, 1.0), "more than 60 s of a processor's time"),
        (Ended(9, 0, 0, 60.5), "more than 60 s of a processor's time"),
        (Ended(0, 1, 0, 0.0), "it broke its decoder (exit code 1)"),
    ],
    ids=str,
)
def test_how_it_ended_is_told(ended: Ended, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        watch(b"", ended)
    assert reason in str(caught.value)
    assert "video a.mp4: " in str(caught.value)


def test_what_it_complains_of_is_told_on_one_line() -> None:
    with pytest.raises(MediaError) as caught:
        watch(said((Failed("a\nb\x1b[31m" + "c" * 5000),)))
    assert type(caught.value) is MediaError
    assert str(caught.value).startswith("a b [31mccc")
    assert len(str(caught.value)) == 2000
    with pytest.raises(UsageError, match=r"^asked$"):
        watch(said((Failed("asked", asked_wrong=True),)))
