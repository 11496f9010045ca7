"""32 frames out of a long 1080p H.264 file: seconds and memory, against decord and torchcodec.

`python -m benchmarks.long_video [--minutes 12 120] [--runs 5]`

The files are made once, in build/long_video: one piece of 100 seconds, compressed as x264 does by
default (a keyframe every 250 frames at most, frames made from later ones) and joined to itself.
Every frame shows its number within the piece. Each run is a new process, sides take turns. A side
opens the file and has each frame as RGB at full size, one at a time; the time counts from opening
to the last frame, without imports. torchcodec reads a file through for its index of frames (exact),
or goes by what its header says of them (approximate). Memory is the most that the process ever had,
with what it imported. What comes out must be the frames that were asked for, and look alike on all
sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from benchmarks.timing import machine, peak_megabytes
from numpy.typing import NDArray

from ppllava_runtime.video import ChosenFrames, Sample, choose_frames

_FOLDER = Path(__file__).resolve().parents[1] / "build" / "long_video"
_WIDTH, _HEIGHT, _FPS = 1920, 1080, 25
_PIECE = 2503  # frames, a prime: no choice at equal steps meets the same ones again and again
_BITS, _BAR = 16, 96
_MOST_SAID = 100  # characters of an error
_MOST_APART = 4.0  # of 256 levels, mean over a frame: sides turn YUV into RGB in different ways

Frames = Iterable[NDArray[np.uint8]]


def _ours(path: str, indices: Sequence[int], alone: bool = True) -> Frames:
    chosen = ChosenFrames(Path(path), Sample(len(indices)), alone=alone, left=Event())
    for _, frame in chosen:
        yield frame
    if chosen.info.indices != tuple(indices):
        raise SystemExit(f"ours looked at {chosen.info.indices}")


def _ours_on_one_core(path: str, indices: Sequence[int]) -> Frames:
    return _ours(path, indices, alone=False)


def _decord(path: str, indices: Sequence[int]) -> Frames:
    import decord

    reader = decord.VideoReader(path)
    for index in indices:
        yield reader[index].asnumpy()


def _torchcodec(path: str, indices: Sequence[int], seek_mode: str = "exact") -> Frames:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=0, dimension_order="NHWC", seek_mode=seek_mode)
    for index in indices:
        yield decoder.get_frame_at(index).data.numpy()


def _torchcodec_without_scan(path: str, indices: Sequence[int]) -> Frames:
    return _torchcodec(path, indices, "approximate")


_SIDES: dict[str, tuple[Callable[[str, Sequence[int]], Frames], str, str]] = {
    "ours": (_ours, "av", "av"),
    "ours, one core": (_ours_on_one_core, "av", "av"),
    "decord": (_decord, "decord", "decord"),
    "torchcodec, exact": (_torchcodec, "torchcodec.decoders", "torchcodec"),
    "torchcodec, approximate": (_torchcodec_without_scan, "torchcodec.decoders", "torchcodec"),
}


def _one_side(name: str, path: str, num_frames: int) -> None:
    """Prints what one side needed for one file, as JSON."""
    read, module, package = _SIDES[name]
    indices = choose_frames(int(Path(path).stem) * 60 * _FPS // _PIECE * _PIECE, num_frames)
    numbers: list[int] = []
    looks: list[list[float]] = []
    elapsed = 0.0
    try:
        __import__(module)
        before = peak_megabytes()
        began = time.perf_counter()
        for frame in read(path, indices):
            elapsed += time.perf_counter() - began
            numbers.append(_number(frame))
            looks.append(_look(frame))
            began = time.perf_counter()
        elapsed += time.perf_counter() - began
    except (ImportError, OSError, RuntimeError) as error:  # torchcodec loads its own when used
        if numbers or read in (_ours, _ours_on_one_core):
            raise
        print(json.dumps({"failed": f"NOT RUN: {_cause(error, package)}"}))
        return
    if numbers != [index % _PIECE for index in indices]:
        raise SystemExit(f"{name}: {path}: frames {numbers} came instead of {indices}")
    said = {"seconds": elapsed, "peak": peak_megabytes(), "before": before, "looks": looks}
    print(json.dumps(said | {"version": version(package)}))


def _cause(error: BaseException, package: str) -> str:
    """Why a package cannot be loaded, in a few words and without the paths of this machine."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"{package} is not installed"
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    said = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
    words = " ".join(Path(word).name for word in said.split())
    return f"{package} cannot be loaded: {words[:_MOST_SAID]}"


def _number(frame: NDArray[np.uint8]) -> int:
    bars = frame[: _BAR // 2].mean(axis=(0, 2)).reshape(_BITS, -1).mean(axis=1)
    return sum(1 << bit for bit, level in enumerate(bars) if level > 127)


def _look(frame: NDArray[np.uint8]) -> list[float]:
    """Mean colours of 12×16 parts."""
    means = frame.reshape(12, _HEIGHT // 12, 16, _WIDTH // 16, 3).mean(axis=(1, 3))
    return [float(value) for value in means.ravel().round(2)]


def made(minutes: int) -> Path:
    """A file of so many minutes, rounded down to whole pieces; made if it is not there."""
    path = _FOLDER / f"{minutes}.mp4"
    if not path.exists():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        piece = _FOLDER / "piece.mp4"
        if not piece.exists():
            _write_whole(piece, _write_piece)
        repeats = minutes * 60 * _FPS // _PIECE
        if repeats < 1:
            raise SystemExit(f"--minutes is {minutes}, expected 2 or more")
        _write_whole(path, lambda part: _join(piece, part, repeats))
    return path


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """What is there under its name is whole."""
    part = path.with_name(f"part-{path.name}")
    write(part)
    part.replace(path)


def _write_piece(path: Path) -> None:
    import av

    print(f"compressing {_PIECE} frames, once", file=sys.stderr)
    random = np.random.default_rng(0)
    y, x = np.mgrid[:_HEIGHT, :_WIDTH]
    ground = ((x // 3 + y // 2) % 200 + 28 + random.integers(0, 9, x.shape)).astype(np.uint8)
    patch = random.integers(0, 255, (240, 320), np.uint8)
    grey = np.full((_HEIGHT // 2, _WIDTH), 128, np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            "libx264", rate=_FPS, options={"preset": "veryfast", "crf": "34"}
        )
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for number in range(_PIECE):
            luma = np.roll(ground, number % _WIDTH, axis=1)
            top = int(400 + 300 * np.sin(number / 40))
            left = int(800 + 700 * np.cos(number / 55))
            luma[top : top + 240, left : left + 320] = patch
            bar = _WIDTH // _BITS
            for bit in range(_BITS):
                luma[:_BAR, bit * bar : (bit + 1) * bar] = 235 * (number >> bit & 1)
            frame = av.VideoFrame.from_ndarray(np.concatenate([luma, grey]), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, _FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _join(piece: Path, path: Path, repeats: int) -> None:
    """The piece so many times over, without compressing anything again."""
    import av

    with av.open(str(piece)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        assert stream.time_base is not None
        step = int(1 / (stream.time_base * _FPS))
        joined: Any = target.add_stream_from_template(stream)
        for repeat in range(repeats):
            for packet in packets:
                assert packet.pts is not None
                assert packet.dts is not None
                copy = av.Packet(bytes(packet))
                copy.pts = packet.pts + repeat * len(packets) * step
                copy.dts = packet.dts + repeat * len(packets) * step
                copy.duration, copy.time_base = step, stream.time_base
                copy.is_keyframe = packet.is_keyframe
                copy.stream = joined
                target.mux(copy)


def _measure(path: Path, num_frames: int, runs: int) -> None:
    """Prints a table for one file."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in _SIDES}
    failed: dict[str, str] = {}
    for _ in range(runs):
        for name in _SIDES:
            if name in failed:
                continue
            command = [sys.executable, "-m", "benchmarks.long_video", "--side", name]
            command += ["--file", str(path), "--frames", str(num_frames)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            said = json.loads(run.stdout.splitlines()[-1])
            if "failed" in said:
                failed[name] = said["failed"]
            else:
                found[name].append(said)
    ours = found["ours"]
    base = statistics.median(run["seconds"] for run in ours)
    megabytes = path.stat().st_size / 1e6
    print(f"\n{num_frames} frames of {path.stem} minutes of {_WIDTH}×{_HEIGHT}, {megabytes:.0f} MB")
    print("| side | seconds | range | × ours | peak MB | before opening |\n" + "|---" * 6 + "|")
    for name, results in found.items():
        if not results:
            print(f"| {name} | {failed[name]} | | | | |")
            continue
        apart = np.abs(np.subtract([run["looks"] for run in results], ours[0]["looks"]))
        if apart.mean(axis=-1).max() > _MOST_APART:
            raise SystemExit(f"{name}: {path}: frames look different from ours")
        seconds = [run["seconds"] for run in results]
        median = statistics.median(seconds)
        peak, before = (max(run[key] for run in results) for key in ("peak", "before"))
        print(
            f"| {name} {results[0]['version']} | {median:.2f} | {min(seconds):.2f} to "
            f"{max(seconds):.2f} | {median / base:.2f} | {peak:.0f} | {before:.0f} |",
            flush=True,
        )


def main() -> None:
    """Prints a table per length, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, nargs="+", default=[12, 120])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--side", choices=list(_SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        _one_side(arguments.side, arguments.file, arguments.frames)
        return
    print(machine("av", "numpy"))
    for minutes in arguments.minutes:
        _measure(made(minutes), arguments.frames, arguments.runs)


if __name__ == "__main__":
    main()
