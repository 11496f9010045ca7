"""A looped stream, watched for minutes: questions, drops, and whether memory stays flat.

`python -m benchmarks.live_soak BUNDLE VIDEO --minutes 10`

The video goes round and round by HTTP (or RTSP) on the loopback, 5 frames a second; meanwhile
questions are asked about its last seconds, and the stream is cut off again and again. What ends
with 1 instead of 0: a question without an answer, a drop that was not recovered from, or more
memory in the last quarter of the time than in the second. What sends the stream is another process:
the memory is that of the watcher alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from benchmarks.loopback_streams import Kind
from benchmarks.timing import machine

from ppllava_engines.errors import UnavailableError
from ppllava_runtime import Assistant
from ppllava_runtime.feed import Feed, Frame, Patience
from ppllava_runtime.live import LiveVideo
from ppllava_runtime.newest import Follower
from ppllava_runtime.sources import open_source

_FLAT = 8e6  # bytes that the last quarter may have above the second
_NEW_TOKENS = 16
_QUESTION = "What happens in the video?"
_SECONDS_PER_TURN = 0.5
_SECONDS_PER_LOOK = 0.02
_PATIENCE = Patience(least=0.2, most=1.0)
_RECOVERY_SECONDS = 30.0  # for a drop to be recovered from


@dataclass
class Report:
    """What was found.

    Attributes:
        num_frames: Frames that came.
        num_kept: Of them, those that went into the window.
        num_dropped: And those for which the encoder was too slow.
        num_answers: Questions answered.
        num_drops: Times the stream was cut off.
        num_recovered: Times it came again.
        first_tokens: Milliseconds from each question to its first id.
        samples: Of time, (seconds, resident bytes).
    """

    num_frames: int = 0
    num_kept: int = 0
    num_dropped: int = 0
    num_answers: int = 0
    num_drops: int = 0
    num_recovered: int = 0
    first_tokens: list[float] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Bytes that the last quarter of the time took above the second, in the median."""
        quarter = len(self.samples) // 4
        second, last = (
            statistics.median(size for _, size in part)
            for part in (self.samples[quarter : 2 * quarter], self.samples[-quarter:])
        )
        return last - second

    @property
    def slope(self) -> float:
        """Bytes an hour, of the straight line through all but the first quarter."""
        seconds, sizes = zip(*self.samples[len(self.samples) // 4 :], strict=True)
        return 3600 * statistics.linear_regression(seconds, sizes).slope


def soak(
    bundle: Path,
    video: Path,
    seconds: float,
    num_questions: int = 60,
    num_drops: int = 20,
    fps: float = 5.0,
    kind: Kind = "http",
) -> Report:
    """What comes of watching a video over and over for so many seconds, in turns.

    A machine that is too slow for that takes longer, and makes no less of it: where turns are at
    least as many, so many questions are asked, and drops made if all are recovered from.

    Raises:
        PPLLaVAError: What ended the watching, or a question that was refused.
    """
    assistant = Assistant.open(bundle).load()
    live = LiveVideo(assistant, min(10.0, assistant.max_frames / fps), fps)
    print(live.describe(), file=sys.stderr)
    report = Report()

    def add(frame: Frame) -> None:
        live.add(frame.picture, frame.seconds)

    with ExitStack() as until_the_end:
        enter, pause = until_the_end.enter_context, Event()
        url, cut = enter(_streamed(video, fps, kind))
        feed = enter(Feed(open_source(url), fps, patience=_PATIENCE))
        follower = Follower(feed.frames, add)
        until_the_end.callback(follower.close)
        follower.wait_for(lambda: live.num_seen > 0)
        began = last_cut = time.monotonic()

        def is_back() -> bool:
            until = last_cut + _RECOVERY_SECONDS
            while feed.num_recovered < report.num_drops and time.monotonic() < until:
                pause.wait(_SECONDS_PER_LOOK)
                follower.check()
            return feed.num_recovered >= report.num_drops

        num_turns = max(1, round(seconds / _SECONDS_PER_TURN))
        for turn in range(num_turns):
            report.samples.append((time.monotonic() - began, _resident()))
            if turn >= report.num_answers * num_turns / num_questions:
                answer = live.ask(_QUESTION, max_new_tokens=_NEW_TOKENS)
                report.num_answers += bool(answer.ids)
                report.first_tokens.append(answer.accounting.milliseconds.first_token)
            # Half a drop's turns later; one that follows before the stream is back would be none.
            if turn >= (report.num_drops + 0.5) * num_turns / num_drops and is_back():
                cut()
                last_cut = time.monotonic()
                report.num_drops += 1
            pause.wait(began + (turn + 1) * _SECONDS_PER_TURN - time.monotonic())
            follower.check()
        is_back()
        # In this order, as more frames come meanwhile.
        report.num_kept, report.num_dropped = live.num_seen, feed.num_dropped
        report.num_frames, report.num_recovered = feed.num_seen, feed.num_recovered
    return report


def main(argv: Sequence[str]) -> int:
    """1 if anything was lost or grew, else 0; prints what was found."""
    parser = argparse.ArgumentParser(prog="live_soak", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("video", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--drops", type=int, default=20)
    parser.add_argument("--fps", type=float, default=5.0)
    parser.add_argument("--kind", choices=("http", "rtsp"), default="http")
    options = parser.parse_args(argv)
    seconds = 60 * options.minutes
    told = (options.questions, options.drops, options.fps, options.kind)
    report = soak(options.bundle, options.video, seconds, *told)
    print(machine())
    shown = report.samples[:: max(1, len(report.samples) // 10)]
    for when, size in shown:
        print(f"{when:7.1f} s  {size / 1e6:8.1f} MB")
    print(
        f"{report.num_frames} frames came, {report.num_kept} kept, {report.num_dropped} dropped\n"
        f"{report.num_answers} of {options.questions} questions answered, first token in "
        f"{statistics.median(report.first_tokens):.1f} ms in the median, "
        f"{max(report.first_tokens):.1f} at most\n"
        f"{report.num_recovered} of {options.drops} drops recovered\n"
        f"memory: {report.growth / 1e6:+.1f} MB from the second quarter to the last, "
        f"{report.slope / 1e6:+.1f} MB an hour"
    )
    is_good = (
        report.num_answers == options.questions
        and report.num_recovered == report.num_drops == options.drops
        and report.growth <= _FLAT
    )
    print("verdict: flat, and nothing lost" if is_good else "verdict: NOT GOOD")
    return 0 if is_good else 1


@contextmanager
def _streamed(video: Path, fps: float, kind: Kind) -> Iterator[tuple[str, Callable[[], None]]]:
    """Where the video goes round and round, and what cuts it off; until the block ends."""
    module = "benchmarks.loopback_streams"
    arguments = [sys.executable, "-m", module, video, "--fps", fps, "--kind", kind]
    with subprocess.Popen(
        [str(argument) for argument in arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        commands = process.stdin
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise UnavailableError(f"video {video}: it cannot be streamed, see above")
            yield url, lambda: print("cut", file=commands, flush=True)
        finally:
            process.kill()


def _resident() -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
