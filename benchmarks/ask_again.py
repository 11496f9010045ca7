"""The first question about a video against the second, in time to the first token.

`python benchmarks/ask_again.py BUNDLE VIDEO`

Both sides run in this process, interleaved, on the same video: watching it anew and asking, and
asking again what was watched before. Time runs to the first token.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib.metadata import version

from ppllava_runtime import Assistant


def main() -> None:
    """Prints both medians, their ratio, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("video")
    parser.add_argument("--question", default="Describe the video.")
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    assistant = Assistant.open(arguments.bundle)
    seen = assistant.watch(arguments.video)
    next(iter(seen.ask(arguments.question)))
    first, again = [], []
    for _ in range(arguments.runs):
        began = time.perf_counter()
        next(iter(assistant.watch(arguments.video).ask(arguments.question)))
        first.append(time.perf_counter() - began)
        began = time.perf_counter()
        next(iter(seen.ask(arguments.question)))
        again.append(time.perf_counter() - began)
    a, b = statistics.median(first), statistics.median(again)
    print(f"first question {1000 * a:.1f} ms, second {1000 * b:.1f} ms: {a / b:.1f} times faster")
    print(
        f"python {platform.python_version()}, onnxruntime {version('onnxruntime')}, "
        f"{platform.machine()}"
    )


if __name__ == "__main__":
    main()
