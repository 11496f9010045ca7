"""From process start to the first piece of an answer.

`python benchmarks/first_token.py BUNDLE VIDEO`

Each run is a new process, as when a device wakes up: interpreter, imports, graphs, video, vision,
prefill. The disk is warm after the first run, which is not counted.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

_PROGRAM = "import sys; from ppllava_runtime.chat import run; sys.exit(run())"


def first_token_seconds(bundle: str, video: str, question: str) -> float:
    """Returns seconds from the start of a process to the first byte of its answer."""
    began = time.perf_counter()
    command = [sys.executable, "-c", _PROGRAM, bundle, video, question]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        elapsed = time.perf_counter() - began
        process.communicate()
    if process.returncode or not first:
        raise SystemExit(f"ppllava-chat failed with exit code {process.returncode}")
    return elapsed


def main() -> None:
    """Prints median and range, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("video")
    parser.add_argument("--question", default="Describe the video.")
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    asked = (arguments.bundle, arguments.video, arguments.question)
    first_token_seconds(*asked)
    seconds = [first_token_seconds(*asked) for _ in range(arguments.runs)]
    print(
        f"process start to first token: median {statistics.median(seconds):.2f} s, "
        f"{min(seconds):.2f} to {max(seconds):.2f} s over {arguments.runs} runs"
    )
    print(
        f"python {platform.python_version()}, onnxruntime {version('onnxruntime')}, "
        f"numpy {version('numpy')}, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
