"""What a sandbox and its processes say to each other: a line of JSON, and the pixels it announces.

Each side reads strictly: a process that decodes a file from a stranger may be the stranger's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from socket import socket
from typing import Literal

from ppllava_runtime.choosing import Sample
from ppllava_runtime.limits import MediaLimits

# Descriptors of a process that decodes; it can open no other.
DATA, FILE = 3, 4
NUM_DESCRIPTORS = 5

HEADER_BYTES = 1 << 20  # at most; times and places of some thousand frames
JOB_BYTES = 1 << 16  # at most; a path and some numbers
READY = b"ready"

LENGTH_BYTES = 4
ENDED_BYTES = 4096


@dataclass(frozen=True)
class Job:
    """One file to decode.

    Attributes:
        path: What it is called.
        task: "still" is `Opener.still`, "clip" is `Opener.clip`.
        sample: Which frames of a clip.
        size: Side of the squares of a clip, S.
        limits: What it may be and take.
    """

    path: str
    task: Literal["still", "clip"]
    sample: Sample
    size: int
    limits: MediaLimits


@dataclass(frozen=True)
class Still:
    """Announces a picture (H,W,3); no height says that it is none."""

    height: int
    width: int
    note: str | None


@dataclass(frozen=True)
class Frame:
    """Announces a square (S,S,3) and a thumbnail (height,width,3), shown at `rows` of so many."""

    rows: tuple[int, ...]
    num_rows: int
    height: int
    width: int


@dataclass(frozen=True)
class Done:
    """The last frame was there; see `ClipInfo`."""

    timestamps: tuple[float, ...]
    indices: tuple[int, ...]
    num_frames: int
    num_decoded: int
    fps: float
    damage: str | None


@dataclass(frozen=True)
class Failed:
    """What is wrong with the file, or else with what was asked of it."""

    message: str
    asked_wrong: bool = False


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        signal: By which, or 0.
        code: With which, or 0.
        peak_bytes: The most memory that it used at once.
        cpu_seconds: Processor time that it took.
    """

    signal: int
    code: int
    peak_bytes: int
    cpu_seconds: float


Message = Still | Frame | Done | Failed


def packed(message: Job | Ended) -> bytes:
    """A message that goes as one datagram."""
    return json.dumps(asdict(message)).encode()


def send(wire: socket, message: Message, *pixels: memoryview | bytes) -> None:
    """Sends a message, and the pixels that it announces.

    Raises:
        OSError: Nobody reads any more.
    """
    content = json.dumps([type(message).__name__, asdict(message)]).encode()
    wire.sendall(len(content).to_bytes(LENGTH_BYTES, "big") + content)
    for part in pixels:
        wire.sendall(part)
