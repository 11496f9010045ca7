"""How soon the command line begins to answer."""

from __future__ import annotations

import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_videos import numbered_frames, write_video

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("engines", "runtime"))
CHAT = "import sys; from ppllava_runtime.chat import run; sys.exit(run())"
# The 21st id waits for a line of input: whatever is read before that is sent was streamed.
SLOW_CHAT = """
import sys
from ppllava_runtime.chat import run
from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder
generate = OnnxRuntimeDecoder.generate
def slowly(*arguments):
    for number, token in enumerate(generate(*arguments)):
        if number == 20:
            sys.stdin.readline()
        yield token
OnnxRuntimeDecoder.generate = slowly
sys.exit(run())
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return write_video(path, numbered_frames(40), options={"g": "10"})


def test_streams_into_a_pipe(bundle: Path, clip: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_CHAT, bundle, clip, "What moves?", "--max-new-tokens", "40"],
        env=os.environ | {"PYTHONPATH": PATHS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        try:
            readable, _, _ = select.select([process.stdout], [], [], 120)
            assert readable
            assert process.stdout.read(1)
            assert process.poll() is None
            rest, _ = process.communicate(b"\n", timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0
    assert rest.endswith(b"\n")


def cpu_seconds(run: Callable[[], object]) -> float:
    """Of the processor in the processes that `run` starts; not of the clock, others are busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_begins_to_answer_soon(bundle: Path, clip: Path) -> None:
    def python(*arguments: str | Path) -> None:
        command = [sys.executable, "-c", *arguments]
        environment = os.environ | {"PYTHONPATH": PATHS}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

    def answer() -> None:
        python(CHAT, bundle, clip, "What moves?", "--max-new-tokens", "1", "--threads", "1")

    def load() -> None:
        python("import numpy, onnxruntime, av, tokenizers")

    # The least of some is what the work costs; the first brings the files into memory. Half of an
    # answer's time is to load the libraries; what is done with them may become twice as much.
    spent, bare = (min(cpu_seconds(run) for _ in range(4)) for run in (answer, load))
    assert spent < 3 * bare, (spent, bare)
