"""What a server does with more than it can do: answers, refusals, their times, and its memory.

`PYTHONPATH=tests python -m benchmarks.serve_load BUNDLE [--clients 100] [--requests 2000]`

The server is ppllava-serve as it is installed, with 4 requests running and 16 waiting. Every client
asks about small pictures, and comes back a twentieth of a second after a refusal.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.timing import machine

from load import many, percentile
from server_process import served

_FLAGS = ("--running", 4, "--queued", 16, "--cache-size", "16M")
_WARM_UP = 400


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    print(machine())
    with (
        tempfile.TemporaryDirectory() as folder,
        served(options.bundle, Path(folder), *_FLAGS) as server,
    ):
        print(server.memory)
        asyncio.run(many(server.port, server.model, options.clients, _WARM_UP))
        before = server.rss_bytes()
        replies = asyncio.run(many(server.port, server.model, options.clients, options.requests))
        grown = server.rss_bytes() - before
        print(f"{'status':>6} {'count':>6} {'p50 ms':>8} {'p99 ms':>8} {'most ms':>8}")
        for status, count in sorted(Counter(reply.status for reply in replies).items()):
            seconds = [reply.seconds for reply in replies if reply.status == status]
            shown = [percentile(seconds, 0.5), percentile(seconds, 0.99), max(seconds)]
            print(f"{status:>6} {count:>6} " + " ".join(f"{1000 * s:>8.1f}" for s in shown))
        print(f"memory: {before / 2**20:.0f} MiB, grown by {grown / 2**20:.1f} MiB")
        print(f"exit code after SIGTERM: {server.stop()}")


if __name__ == "__main__":
    main()
