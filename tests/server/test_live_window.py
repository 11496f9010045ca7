"""Frames on their way into the window of a live session, when the machine is slow or full."""

from __future__ import annotations

import base64
import dataclasses
import io
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from PIL import Image

from ppllava_runtime.leaving import Leaving, Left
from ppllava_runtime.live import LiveVideo
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.live_messages import Config, SentFrame
from ppllava_runtime.server.live_window import LiveWindow, live_video
from ppllava_runtime.server.service import Service
from ppllava_runtime.server.settings import Settings
from tiny_videos import numbered_frames

FRAMES = numbered_frames(30)


@pytest.fixture(scope="module")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that is not served, and its model loaded as it is asked for."""
    settings = Settings(spool=tmp_path_factory.mktemp("spool"))
    found = Service.open(bundle, settings, "cpu", 1, "hidden")
    yield found
    found.threads.shutdown()
    found.sandbox.close()
    found.spool.close()


def frame(number: int) -> SentFrame:
    out = io.BytesIO()
    Image.fromarray(FRAMES[number]).save(out, "PNG")
    data = base64.b64encode(out.getvalue()).decode()
    return SentFrame(type="video.frame", data=data, timestamp=number / 2)


@pytest.fixture
def held(service: Service, monkeypatch: pytest.MonkeyPatch) -> tuple[Event, Event]:
    """Set when the first frame is decoded, which lasts until the other is."""
    decoding, begun, go_on = service.assistant.decoding, Event(), Event()
    still = decoding.still

    def slow(path: Path, leaving: Leaving) -> Any:
        begun.set()
        assert go_on.wait(20)
        return still(path, leaving)

    monkeypatch.setattr(decoding, "still", slow)
    return begun, go_on


def test_drops_what_comes_too_fast(service: Service, held: tuple[Event, Event]) -> None:
    begun, go_on = held
    window = LiveWindow(service, LiveVideo(service.assistant, 4, 2), lambda _: None)
    try:
        window.put(frame(0))
        assert begun.wait(20)
        for number in range(1, 30):
            window.put(frame(number))
        go_on.set()
        window.settle(Leaving())
        counts = window.counts()
    finally:
        go_on.set()
        window.close()
    assert (counts.received, counts.dropped, counts.kept) == (30, 28, 2)


def test_who_asks_may_leave_while_a_frame_is_looked_at(
    service: Service, held: tuple[Event, Event]
) -> None:
    begun, go_on = held
    window, leaving = LiveWindow(service, LiveVideo(service.assistant, 4, 2), print), Leaving()
    try:
        window.put(frame(0))
        assert begun.wait(20)
        with ThreadPoolExecutor(1) as pool:
            settling = pool.submit(window.settle, leaving)
            leaving.leave()
            leaving.end()
            with pytest.raises(Left):
                settling.result(20)
    finally:
        go_on.set()
        window.close()


def test_a_full_disk_costs_frames_and_not_the_session(service: Service) -> None:
    told: list[ApiError] = []
    window = LiveWindow(service, LiveVideo(service.assistant, 4, 2), told.append)
    folder = Path(window._folder.name)
    try:
        shutil.rmtree(folder)
        window.put(frame(0))
        window.settle(Leaving())
        assert [error.code for error in told] == ["internal_error"]
        assert not window.has_ended
        folder.mkdir()
        window.put(frame(1))
        window.settle(Leaving())
        counts = window.counts()
    finally:
        window.close()
    assert (counts.failed, counts.kept) == (1, 1)


def test_says_that_frames_are_looked_at_no_more(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_path: Path, _leaving: Leaving) -> Any:
        raise ValueError("it is broken")

    monkeypatch.setattr(service.assistant.decoding, "still", breaks)
    window = LiveWindow(service, LiveVideo(service.assistant, 4, 2), lambda _: None)
    try:
        window.put(frame(0))
        with pytest.raises(ValueError, match="it is broken"):
            window.settle(Leaving())
        with pytest.raises(ValueError, match="it is broken"):
            window.check()
    finally:
        window.close()
    assert window.has_ended


@pytest.mark.parametrize("fps", [0.5, 2.0, 4.0, 7.3])
def test_a_rate_alone_is_never_refused(service: Service, fps: float) -> None:
    live = live_video(service, Config(type="session.config", fps=fps), "")
    assert live.fps == fps
    assert live.seconds <= service.settings.live_seconds
    assert live.num_rows <= 20


def test_the_line_on_memory_counts_windows_that_the_model_takes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataclasses.replace(service.assistant.model, max_frames=6)
    monkeypatch.setattr(service.assistant, "model", few)
    size = LiveVideo(service.assistant, 3, 2).nbytes
    assert f"2 live windows of {size / (1 << 20):.0f} MiB" in service.describe_memory()
