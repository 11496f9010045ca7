"""A server for many minutes: does its memory grow, and does it still answer as it did at first?

`PYTHONPATH=tests python -m benchmarks.soak BUNDLE VIDEO [--minutes 20]`

Clients ask about the video anew and again, alone and after some turns, about pictures that come
once, about damaged files and wrong requests; some hang up; and a live session goes on beside them.
Every ten seconds the resident memory of the server and of the process from which its decoders are
forked is read; not theirs, of which now there are some and now there are none. The slope is that of
a straight line through the second half, when caches are full; a server whose slope is below 1 MiB a
minute is called flat. The exit code is 0 for a flat one that answered everything as it should have.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.timing import machine
from websockets.asyncio.client import connect

from load import Client, Reply, picture, question
from server_process import Served, served

_CLIENTS = 8
_SAMPLE_SECONDS = 10.0
_FLAT_BYTES = 1 << 20  # a minute
_PATIENCE_SECONDS = 0.05  # of those who hang up
_FLAGS = ("--cache-size", "32M", "--queued", 4)
_FRAME_SECONDS = 0.2  # of the live session
_FRAMES_PER_QUESTION = 25


class Soak:
    """Clients of one server until their time is over.

    Args:
        server: Which.
        video: What they ask about.
        seconds: How long.
    """

    def __init__(self, server: Served, video: bytes, seconds: float) -> None:
        self._server = server
        self._video = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
        damaged = bytearray(video)
        damaged[len(video) // 3 : len(video) // 2] = bytes(len(video) // 2 - len(video) // 3)
        self._damaged = f"data:video/mp4;base64,{base64.b64encode(damaged).decode()}"
        self._end = time.monotonic() + seconds
        self._began = time.monotonic()
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.answers: set[bytes] = set()
        self.samples: list[tuple[float, int]] = []

    async def run(self) -> None:
        """Asks and samples until the time is over."""
        clients = [self._ask(seed) for seed in range(_CLIENTS)]
        await asyncio.gather(self._sample(), self._live(), *clients)

    @property
    def slope(self) -> float:
        """Bytes a minute, over the second half."""
        half = self.samples[len(self.samples) // 2 :]
        minutes, sizes = np.array(half, np.float64).T
        return float(np.polyfit(minutes, sizes, 1)[0]) if len(half) > 1 else 0.0

    @property
    def is_right(self) -> bool:
        """Whether nothing was answered with what it must not be."""
        allowed = {kind: {200, 429} for kind in ("same", "later", "new", "live")}
        allowed |= {"damaged": {200, 400, 429}, "wrong": {400}, "left": {0, 200, 429}}
        wrong = [key for key in self.statuses if key[1] not in allowed[key[0]]]
        return not wrong and len(self.answers) == 1

    async def _sample(self) -> None:
        while (now := time.monotonic()) < self._end:
            self.samples.append(((now - self._began) / 60, _resident(self._server)))
            print(f"{self.samples[-1][0]:6.1f} min {self.samples[-1][1] / 2**20:8.1f} MiB",
                  flush=True)  # fmt: skip
            await asyncio.sleep(min(_SAMPLE_SECONDS, max(0.1, self._end - now)))

    async def _ask(self, seed: int) -> None:
        chance, client = random.Random(seed), Client(self._server.port)
        while time.monotonic() < self._end:
            kind = chance.choice(
                ("same", "same", "later", "new", "new", "damaged", "wrong", "left")
            )
            fields = self._fields(kind, chance)
            if kind == "left":
                reply = await self._leave(fields)
            else:
                reply = await client.post(fields)
            self.statuses[kind, reply.status] += 1
            if kind == "same" and reply.status == 200:
                # What is said to the same question; times and names differ.
                text = reply.body.partition(b'"content":')[2].partition(b'"finish_reason"')[0]
                self.answers.add(text)
        await client.close()

    def _fields(self, kind: str, chance: random.Random) -> Mapping[str, Any]:
        model = self._server.model
        if kind == "new":
            return question(model, chance.randrange(1 << 16))
        if kind == "wrong":
            return question(model) | {"nonsense": 1}
        url = self._damaged if kind == "damaged" else self._video
        text = "What happens?" if kind == "same" else f"What is number {chance.random()}?"
        content = [
            {"type": "text", "text": text},
            {"type": "video_url", "video_url": {"url": url}},
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if kind == "later":
            for turn in range(chance.randrange(1, 4)):
                messages.append({"role": "assistant", "content": f"Answer {turn}."})
                messages.append({"role": "user", "content": "And then?"})
        return {"model": model, "messages": messages, "max_tokens": 16}

    async def _live(self) -> None:
        """Sends frames to a session until the time is over, and asks about them now and then."""
        url = f"ws://127.0.0.1:{self._server.port}/v1/video/chat/stream"
        async with connect(url) as session:

            async def say(kind: str, **fields: Any) -> None:
                await session.send(json.dumps({"type": kind, **fields}))

            async def listen() -> None:
                async for message in session:
                    told = json.loads(message)
                    if told["type"] == "response.text.done":
                        self.statuses["live", 200] += 1
                    elif told["type"] == "error":
                        busy = told["code"] == "server_busy"
                        self.statuses["live", 429 if busy else 400] += 1

            await say("session.config", model=self._server.model, seconds=4, fps=1)
            listening = asyncio.create_task(listen())
            number = 0
            while time.monotonic() < self._end:
                number += 1
                data = base64.b64encode(picture(number)).decode()
                await say("video.frame", data=data, timestamp=number * _FRAME_SECONDS)
                if number % _FRAMES_PER_QUESTION == 0:
                    await say("video.query", text="What is it?", max_tokens=8)
                await asyncio.sleep(_FRAME_SECONDS)
            await say("video.done")
            await listening

    async def _leave(self, fields: Mapping[str, Any]) -> Reply:
        client = Client(self._server.port)
        try:
            return await asyncio.wait_for(client.post(fields), _PATIENCE_SECONDS)
        except asyncio.TimeoutError:
            return Reply(0, _PATIENCE_SECONDS)
        finally:
            await client.close()


def _resident(server: Served) -> int:
    """Bytes of the server and of its children, without theirs."""
    total = server.rss_bytes()
    for path in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
        for child in path.read_text().split():
            pages = Path(f"/proc/{child}/statm").read_text().split()[1]
            total += int(pages) * resource.getpagesize()
    return total


def main() -> int:
    """Prints samples and a verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("video", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    options = parser.parse_args()
    print(machine())
    with (
        tempfile.TemporaryDirectory() as folder,
        served(options.bundle, Path(folder), *_FLAGS) as server,
    ):
        print(server.memory)
        soak = Soak(server, options.video.read_bytes(), 60 * options.minutes)
        asyncio.run(soak.run())
        log, exit_code = server.log.read_text(), server.stop()
    for (kind, status), count in sorted(soak.statuses.items()):
        print(f"{kind:>8} {status:>4} {count:>7}")
    is_flat = soak.slope < _FLAT_BYTES
    print(f"slope {soak.slope / 2**20:+.3f} MiB a minute: {'flat' if is_flat else 'it grows'}")
    print(f"{len(soak.answers)} answers to one question, exit code {exit_code}")
    print(log, end="")
    return 0 if is_flat and soak.is_right and exit_code == 0 and not log else 1


if __name__ == "__main__":
    sys.exit(main())
