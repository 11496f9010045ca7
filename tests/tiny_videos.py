"""Small real videos whose frames say which they are, made with PyAV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

_BITS = 10
_IDENTITY = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def numbered_frames(count: int, width: int = 96, height: int = 64) -> NDArray[np.uint8]:
    """(count,height,width,3) uint8 frames: the number in bars on top, a moving scene below."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    bar = width // _BITS
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    for number, frame in enumerate(frames):
        frame[..., 0] = (x * 2 + number * 5) % 256
        frame[..., 1] = (y * 3 + number * 3) % 256
        frame[..., 2] = 128 + 100 * (np.hypot(x - width / 2, y - height / 2) < 5 + number % 20)
        for bit in range(_BITS):
            frame[: height // 2, bit * bar : (bit + 1) * bar] = 255 * (number >> bit & 1)
    return frames


def read_number(frame: NDArray[np.uint8]) -> int:
    """The number that `numbered_frames` wrote into a frame, however it was compressed since."""
    height, width, _ = frame.shape
    bar = width // _BITS
    middle = frame[height // 8 : height // 4].mean(axis=(0, 2))
    bits = [
        middle[bit * bar + bar // 4 : (bit + 1) * bar - bar // 4].mean() for bit in range(_BITS)
    ]
    return sum(1 << bit for bit, value in enumerate(bits) if value > 127)


def write_video(
    path: Path,
    frames: NDArray[np.uint8],
    fps: int | Fraction = 25,
    codec: str = "libx264",
    *,
    format: str | None = None,
    options: Mapping[str, str] | None = None,
    times: Sequence[int] | None = None,
    display_matrix: Sequence[int] = _IDENTITY,
    audio: bool = False,
    container_options: Mapping[str, str] | None = None,
) -> Path:
    """The file `path`, holding `frames` (T,H,W,3).

    Args:
        path: Its suffix says which container, unless `format` does.
        frames: RGB, uint8, even sides.
        fps: Frames per second.
        codec: FFmpeg's name of an encoder.
        options: The encoder's, such as {"g": "250", "bf": "3"}.
        times: Of each frame, in units of 1/fps; by default 0, 1, 2, …
        display_matrix: Nine integers, how a player turns the picture.
        audio: Whether a second of silence goes with it.
        container_options: The muxer's.
    """
    with av.open(str(path), "w", format=format, options=dict(container_options or {})) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=dict(options or {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.codec_context.time_base = 1 / Fraction(fps)
        if tuple(display_matrix) != _IDENTITY:
            stream.set_display_matrix(list(display_matrix))
        if not len(frames):
            container.start_encoding()
        if audio:
            sound: Any = container.add_stream("aac", rate=8000)
            container.mux(sound.encode(_silence()))
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            container.mux(sound.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """The file `path`, a second of silence and no picture."""
    with av.open(str(path), "w") as container:
        sound: Any = container.add_stream("aac", rate=8000)
        container.mux(sound.encode(_silence()))
        container.mux(sound.encode(None))
    return path


def _silence() -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(
        np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
    )
    frame.sample_rate = 8000
    return frame


def decode_all(path: Path) -> list[av.VideoFrame]:
    """Every frame of the file, decoded one after the other."""
    with av.open(str(path)) as container:
        return list(container.decode(video=0))
