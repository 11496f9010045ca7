"""Live streams of numbered frames on the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.loopback_streams import Kind, LiveServer

from tiny_videos import numbered_frames, write_video

NUM_NUMBERS = 20  # of the frames that are sent over and over


@contextmanager
def live_server(
    folder: Path, kind: Kind = "http", fps: float = 25, password: str = "", distance: int = 1
) -> Iterator[LiveServer]:
    """A server whose frames are numbered from 0 to NUM_NUMBERS, and so far is it to a keyframe."""
    path = folder / f"live{distance}.ts"
    if not path.exists():
        options = {"g": str(distance), "tune": "zerolatency", "preset": "ultrafast"}
        write_video(path, numbered_frames(NUM_NUMBERS), options=options)
    server = LiveServer(kind, path.read_bytes(), fps, password)
    try:
        yield server
    finally:
        server.close()
