"""More than a server can do: the rest is refused, memory stays, and nothing accepted is lost.

How quickly is of benchmarks/serve_load.py.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable

import httpx2
import pytest

from load import Reply, Withheld, alone, endless, head, many, question
from server_process import Serve, Served

NUM_CLIENTS, NUM_REQUESTS, NUM_WARM_UP = 100, 2000, 200
GROWTH_BYTES = 64 << 20


def counted(server: Served, name: str) -> float:
    """The sum of all metrics of which the line begins so."""
    text = httpx2.get(f"{server.url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{name}.*? (\S+)$", text, re.MULTILINE))


@pytest.mark.slow
def test_what_is_too_much_is_refused(serve: Serve) -> None:
    server = serve("--running", 4, "--queued", 16, "--cache-size", "4M")
    asyncio.run(many(server.port, server.model, NUM_CLIENTS, NUM_WARM_UP))
    before = server.rss_bytes()
    replies = asyncio.run(many(server.port, server.model, NUM_CLIENTS, NUM_REQUESTS))
    grown = server.rss_bytes() - before
    assert len(replies) == NUM_REQUESTS
    statuses = Counter(reply.status for reply in replies)
    assert set(statuses) == {200, 429}, statuses
    assert all(reply.is_whole for reply in replies)
    assert statuses[200] >= 20  # all that were refused did not keep these from being answered
    assert statuses[429] >= NUM_CLIENTS - 20  # of the first wave, all but those who get a place
    assert grown <= GROWTH_BYTES
    assert counted(server, "ppllava_requests_running") == 0
    assert counted(server, "ppllava_requests_queued") == 0
    assert server.log.read_text() == ""


def test_who_hangs_up_frees_the_slot(serve: Serve) -> None:
    """While it is answered, and while its media are fetched."""
    with Withheld() as media:
        server = serve("--running", 1, "--queued", 0, "--private-host", media.host)
        url = f"{server.url}/v1/chat/completions"
        body = json.dumps(question(server.model, url=media.url)).encode()
        for number in range(3):
            with httpx2.stream("POST", url, json=endless(server.model)) as answer:
                next(answer.iter_raw(1))
            wait_until_free(server)
            with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
                connection.sendall(head(len(body)) + body)
                media.wait_for(1)
                assert counted(server, "ppllava_requests_running") == 1
            wait_until_free(server)
            answer = httpx2.post(url, json=question(server.model, number), timeout=30)
            assert answer.status_code == 200
        assert counted(server, "ppllava_spool_bytes") == 0


def test_sigterm_under_load_loses_no_accepted_answer(serve: Serve) -> None:
    with Withheld() as media:
        server = serve("--running", 2, "--queued", 6, "--private-host", media.host)

        async def run() -> tuple[list[Reply], list[Reply]]:
            accepted = [
                asyncio.create_task(alone(server.port, question(server.model, url=media.url)))
                for _ in range(8)
            ]
            await asyncio.to_thread(media.wait_for, 2)
            await until(lambda: counted(server, "ppllava_requests_queued") == 6)
            others = asyncio.create_task(many(server.port, server.model, 20, 400))
            await until(lambda: counted(server, 'ppllava_requests_total{.*status="429"') > 0)
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: is_closed(server.port))
            assert server.process.poll() is None  # it still owes eight answers
            media.release()
            return await asyncio.gather(*accepted), await others

        accepted, others = asyncio.run(run())
        assert server.process.wait(20) == 0
    assert [reply.status for reply in accepted] == [200] * 8
    assert all(reply.is_whole for reply in accepted)
    assert all(json.loads(reply.body)["x_ppllava"]["media"] for reply in accepted)
    # Others were refused, or found nobody there any more; nothing else, and nothing half.
    assert {reply.status for reply in others} <= {429, 503, 0}
    assert all(reply.is_whole for reply in others if reply.status)
    assert server.log.read_text() == ""


def wait_until_free(server: Served) -> None:
    """Returns once nothing runs."""
    end = time.monotonic() + 20
    while counted(server, "ppllava_requests_running"):
        assert time.monotonic() < end


async def until(is_so: Callable[[], bool]) -> None:
    """Returns once it is so; fails after a while."""
    end = time.monotonic() + 20
    while not await asyncio.to_thread(is_so):
        assert time.monotonic() < end


def is_closed(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False
