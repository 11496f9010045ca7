"""Videos and pictures as a stranger could send them: sound ones with something done to their bytes.

Each is made of a seed, which is all that it takes to make it again:
`python tests/mutations.py --seed 7 --count 20000` decodes so many others.
"""

from __future__ import annotations

import argparse
import io
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ppllava_engines.errors import MediaError
from ppllava_runtime.choosing import Sample
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.sandbox import Sandbox
from tiny_videos import numbered_frames, write_video

SIZE = 56
NUM_FRAMES = 4
_FRAMES = numbered_frames(14, 64, 48)
# Suffix → encoder and what else `write_video` needs.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264.mp4": ("libx264", {"options": {"bf": "2", "g": "6"}, "audio": True}),
    "fragments.mp4": (
        "libx264",
        {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "5"}},
    ),
    "hevc.mp4": ("libx265", {"options": {"x265-params": "log-level=none:pools=none"}}),
    "mjpeg.mov": ("mjpeg", {}),
    "h264.mkv": ("libx264", {"options": {"g": "6"}, "audio": True}),
    "vp9.webm": ("libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    "vp8.webm": ("libvpx", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    "mpeg4.avi": ("mpeg4", {}),
    "mpeg2.ts": ("mpeg2video", {}),
    "h264.ts": ("libx264", {"options": {"bf": "2", "g": "6"}, "audio": True}),
    "mpeg1.mpg": ("mpeg1video", {}),
    "flv1.flv": ("flv", {}),
    "moving.gif": ("gif", {}),
}
_PICTURES = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")
_NUMBERS = (0, 1, 7, 8, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_BOX = re.compile(rb"[a-z][a-zA-Z0-9]{3}")

Change = Callable[[random.Random, bytearray, bytes], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a file: "frames" or "MediaError", and how long it took."""

    name: str
    result: str
    seconds: float


def sound_videos(folder: Path) -> dict[str, bytes]:
    """The content of a small video of every kind, by its name."""
    found = {}
    for name, (codec, others) in _KINDS.items():
        path = write_video(folder / name, _FRAMES, codec=codec, **others)
        found[name] = path.read_bytes()
    return found


def sound_pictures() -> dict[str, bytes]:
    """The content of a small picture of every format, by its name."""
    found = {}
    for format in _PICTURES:
        stream = io.BytesIO()
        Image.fromarray(_FRAMES[3]).save(stream, format)
        found[f"picture.{format.lower()}"] = stream.getvalue()
    return found


def mutated(sound: Mapping[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """A name, with the suffix of the sound one that it was, and the bytes."""
    chance = random.Random(f"{seed} {number}")
    names = sorted(sound)
    name = names[number % len(names)]
    content, other = bytearray(sound[name]), sound[chance.choice(names)]
    for _ in range(chance.choice((1, 1, 2, 4))):
        chance.choice(_CHANGES)(chance, content, other)
    return f"{number}_{name}", bytes(content)


def decode_all(
    sandbox: Sandbox, sound: Mapping[str, bytes], seed: int, count: int, folder: Path
) -> list[Outcome]:
    """What becomes of so many mutated files, two at a time.

    Raises whatever is no MediaError: no file may cause that.
    """

    def decode(number: int) -> Outcome:
        name, content = mutated(sound, seed, number)
        path = folder / name
        path.write_bytes(content)
        began = time.monotonic()
        result = outcome_of(sandbox, path)
        path.unlink()
        return Outcome(name, result, time.monotonic() - began)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(decode, range(count)))


def outcome_of(sandbox: Sandbox, path: Path) -> str:
    """What the sandbox makes of a file, see `Outcome`."""
    try:
        if (found := sandbox.still(path, Leaving())) is not None:
            assert found[0].size, f"{path}: a picture without a pixel"
            return "frames"
        frames = sandbox.clip(path, Sample(NUM_FRAMES), SIZE, Leaving())
        try:
            rows = {row for rows, _, _ in frames for row in rows}
        finally:
            frames.close()
        assert rows == set(range(NUM_FRAMES)), f"{path}: {rows}"
        assert len(frames.info.indices) == NUM_FRAMES, f"{path}: {frames.info}"
        return "frames"
    except MediaError:
        return "MediaError"


def _flip(chance: random.Random, content: bytearray, _: bytes) -> None:
    for _number in range(chance.choice((1, 4, 16, 64))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _overwrite(chance: random.Random, content: bytearray, _: bytes) -> None:
    first, length = _span(chance, content)
    filling = (bytes(length), b"\xff" * length, chance.randbytes(length))
    content[first : first + length] = chance.choice(filling)


def _truncate(chance: random.Random, content: bytearray, _: bytes) -> None:
    del content[chance.randrange(1, len(content)) :]


def _cut_out(chance: random.Random, content: bytearray, _: bytes) -> None:
    first, length = _span(chance, content)
    del content[first : first + min(length, len(content) - 1)]


def _repeat(chance: random.Random, content: bytearray, _: bytes) -> None:
    first, length = _span(chance, content)
    place = chance.randrange(len(content))
    content[place:place] = content[first : first + length] * chance.choice((1, 3))


def _splice(chance: random.Random, content: bytearray, other: bytes) -> None:
    first, length = _span(chance, other)
    place = chance.randrange(len(content))
    content[place : place + chance.choice((0, length))] = other[first : first + length]


def _set_number(chance: random.Random, content: bytearray, _: bytes) -> None:
    edge = min(len(content), chance.choice((64, 512, len(content))))
    place = chance.choice((0, len(content) - edge)) + chance.randrange(edge)
    width = chance.choice((1, 2, 4))
    number = chance.choice(_NUMBERS) & (1 << 8 * width) - 1
    order: Literal["big", "little"] = chance.choice(("big", "little"))
    content[place : place + width] = number.to_bytes(width, order)


def _resize_box(chance: random.Random, content: bytearray, other: bytes) -> None:
    boxes = [match.start() for match in _BOX.finditer(content) if match.start() >= 4]
    if not boxes:
        _set_number(chance, content, other)
        return
    place = chance.choice(boxes)
    size = int.from_bytes(content[place - 4 : place], "big")
    near = [max(0, size + difference) for difference in (-8, -1, 1, 8, 1 << 16)]
    number = chance.choice([*_NUMBERS, *near]) & 0xFFFFFFFF
    # Of a table the number of its entries, else the size.
    place += chance.choice((-4, -4, 8))
    content[place : place + 4] = number.to_bytes(4, "big")


_CHANGES: tuple[Change, ...] = (
    _flip, _overwrite, _truncate, _cut_out, _repeat, _splice, _set_number, _resize_box, _resize_box,
)  # fmt: skip


def _span(chance: random.Random, content: bytes | bytearray) -> tuple[int, int]:
    first = chance.randrange(len(content))
    return first, chance.choice((1, 8, 100, len(content) // 4 + 1))


def main() -> int:
    """Decodes as many as it is told; 1 says that one of them did what none may."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--count", type=int, default=5000)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.count} files", flush=True)
    with tempfile.TemporaryDirectory() as name, Sandbox() as sandbox:
        folder = Path(name)
        sound = sound_videos(folder) | sound_pictures()
        outcomes = decode_all(sandbox, sound, arguments.seed, arguments.count, folder)
        slowest = max(outcomes, key=lambda outcome: outcome.seconds)
        print(dict(Counter(outcome.result for outcome in outcomes)))
        print(f"slowest: {slowest.name}, {slowest.seconds:.1f} s")
        print(f"broke their process: {sandbox.num_broken}")
        print(f"most memory of one: {sandbox.peak_bytes >> 20} MiB")
    return int(sandbox.peak_bytes > 512 << 20)


if __name__ == "__main__":
    sys.exit(main())
