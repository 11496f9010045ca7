"""Clips of the world as H.264 files, as a camera would deliver them.

`python -m tiny_world.files SEED FILE` writes one; the committed sample.mp4 is such a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np

from .world import Clip, render, sample_clip

FRAMES_PER_SECOND = 10
_QUALITY = "23"


def write_clip(clip: Clip, file: Path, num_frames: int = 40, size: int = 144) -> None:
    """Writes a clip as an H.264 MP4 file.

    Args:
        clip: What to show.
        file: Replaced if it exists.
        num_frames: Length, at `FRAMES_PER_SECOND`.
        size: Side in pixels, even.
    """
    moments = np.arange(num_frames) / (num_frames - 1)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": _QUALITY, "preset": "veryfast"}
        for picture in render(clip, moments, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Writes the clip of a seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", type=int, default=288)
    arguments = parser.parse_args()
    write_clip(sample_clip(arguments.seed), arguments.file, size=arguments.size)


if __name__ == "__main__":
    main()
