"""What a server does with more than it can do: answers, refusals, their times, and its memory.

`PYTHONPATH=tests python -m benchmarks.serve_load BUNDLE [--clients 100] [--requests 2000]`

The server is ppllava-serve as it is installed, with 4 requests running and 16 waiting. Every client
asks about small pictures, and comes back a twentieth of a second after a refusal. Another server,
with one slot, is left by clients that had begun to read. Both is measured once more while a client
sends requests of 48 MB, one after the other. What is measured stands beside its limit; the exit
code is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
from benchmarks.timing import machine

from load import BUSY, Client, endless, head, many, percentile, question
from server_process import Served, served

_FLAGS = ("--running", 4, "--queued", 16, "--cache-size", "16M")
_WARM_UP = 400
_LEAVERS = 20
_UPLOAD_BYTES = 48_000_000
_REFUSED_MS, _FREED_MS, _GROWTH_MIB = 200.0, 250.0, 64.0


class Verdict:
    """What was measured, beside what it may be."""

    def __init__(self) -> None:
        self.is_good = True

    def say(self, what: str, got: float, limit: float, unit: str) -> None:
        """Prints one line."""
        is_met = got <= limit
        self.is_good &= is_met
        print(f"{what:<52} {got:>8.1f} {unit}, at most {limit:g}: {'met' if is_met else 'MISSED'}")


@asynccontextmanager
async def _uploading(server: Served, *, really: bool) -> AsyncIterator[None]:
    """Where it is really so, a client sends large requests for the time of the block."""
    if not really:
        yield
        return
    # Wrong in a field, so that they take no slot, but only after all of them has been read.
    url = "data:video/mp4;base64," + "A" * _UPLOAD_BYTES
    fields = question(server.model, url=url) | {"nonsense": 1}
    statuses = Counter[int]()

    async def send() -> None:
        client = Client(server.port)
        try:
            while True:
                statuses[(await client.post(fields)).status] += 1
        finally:
            await client.close()

    sending = asyncio.create_task(send())
    try:
        yield
    finally:
        sending.cancel()
        await asyncio.wait([sending])
        print(f"uploads by status: {dict(statuses)}")


async def _leave(server: Served) -> list[float]:
    """Seconds from a client's end to a slot that is free, for some clients one after the other."""
    body, freed = json.dumps(endless(server.model)).encode(), list[float]()
    async with httpx2.AsyncClient(base_url=server.url) as client:
        while len(freed) < _LEAVERS:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head(len(body)) + body)
            status = (await reader.readuntil(b"data: "))[9:12]
            writer.close()
            began = time.perf_counter()
            while True:
                counts = (await client.get("/metrics")).text
                if re.search(r"^ppllava_requests_running 0\.0$", counts, re.MULTILINE):
                    break
            assert status == b"200"
            freed.append(time.perf_counter() - began)
    return freed


async def _flood(server: Served, options: argparse.Namespace, verdict: Verdict) -> None:
    for uploads in (False, True):
        beside = " while 48 MB come in" if uploads else ""
        await many(server.port, server.model, options.clients, _WARM_UP)
        before = server.rss_bytes()
        async with _uploading(server, really=uploads):
            replies = await many(server.port, server.model, options.clients, options.requests)
        grown = server.rss_bytes() - before
        print(f"\n{'status':>6} {'count':>6} {'p50 ms':>8} {'p99 ms':>8} {'most ms':>8}{beside}")
        for status, count in sorted(Counter(reply.status for reply in replies).items()):
            seconds = [reply.seconds for reply in replies if reply.status == status]
            shown = [percentile(seconds, 0.5), percentile(seconds, 0.99), max(seconds)]
            print(f"{status:>6} {count:>6} " + " ".join(f"{1000 * s:>8.1f}" for s in shown))
        refused = [reply.seconds for reply in replies if reply.status == BUSY]
        p99 = 1000 * percentile(refused, 0.99) if refused else 0.0
        verdict.say(f"refusals, 99th percentile{beside}", p99, _REFUSED_MS, "ms")
        others = sum(reply.status not in (200, BUSY) or not reply.is_whole for reply in replies)
        verdict.say(f"neither answered nor refused{beside}", others, 0, "")
        if not uploads:  # a body of 48 MB is memory, for as long as it is read
            verdict.say("memory, grown by", grown / 2**20, _GROWTH_MIB, "MiB")


def main() -> int:
    """Prints what was measured, and a verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    verdict = Verdict()
    print(machine())
    with (
        tempfile.TemporaryDirectory() as folder,
        served(options.bundle, Path(folder), *_FLAGS) as server,
    ):
        print(server.memory)
        asyncio.run(_flood(server, options, verdict))
        verdict.say("exit code after SIGTERM", server.stop(), 0, "")

    async def leave(server: Served) -> None:
        for uploads in (False, True):
            async with _uploading(server, really=uploads):
                freed = await _leave(server)
            beside = " while 48 MB come in" if uploads else ""
            verdict.say(f"slot free after hang-up, longest of {_LEAVERS}{beside}",
                        1000 * max(freed), _FREED_MS, "ms")  # fmt: skip

    with (
        tempfile.TemporaryDirectory() as folder,
        served(options.bundle, Path(folder), "--running", 1, "--queued", 0) as server,
    ):
        print()
        asyncio.run(leave(server))
    print("all limits met" if verdict.is_good else "a limit was missed")
    return 0 if verdict.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
