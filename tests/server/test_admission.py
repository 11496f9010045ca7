"""Slots: in order, never more than there are, and none is lost."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from ppllava_runtime.server.admission import Admission
from ppllava_runtime.server.errors import ApiError
from server_process import Serve


async def settle() -> None:
    """Lets every task run as far as it can: a hand-over takes a few turns of the loop."""
    for _ in range(10):
        await asyncio.sleep(0)


class Holder:
    """One who asks for a slot, and keeps it until told otherwise."""

    def __init__(self, admission: Admission, name: int, order: list[int]) -> None:
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._hold(admission, name, order))

    async def _hold(self, admission: Admission, name: int, order: list[int]) -> None:
        async with admission.slot():
            order.append(name)
            await self.leave.wait()


def test_slots_are_given_in_the_order_of_asking() -> None:
    async def run() -> None:
        admission, order = Admission(2, 5), list[int]()
        holders = [Holder(admission, name, order) for name in range(7)]
        await settle()
        assert (order, admission.num_held, admission.num_queued) == ([0, 1], 2, 5)
        with pytest.raises(ApiError, match=r"2 requests are running and 5 wait") as refused:
            async with admission.slot():
                pass
        assert refused.value.status == 429
        assert int(refused.value.headers["retry-after"]) >= 1
        for name in range(7):
            holders[name].leave.set()
            await settle()
            assert order == list(range(min(7, name + 3)))
        assert (admission.num_held, admission.num_queued) == (0, 0)

    asyncio.run(run())


def test_who_gives_up_leaves_no_hole() -> None:
    async def run() -> None:
        admission, order = Admission(1, 3), list[int]()
        first, second, third = (Holder(admission, name, order) for name in range(3))
        await settle()
        second.task.cancel()  # while it waits
        await settle()
        assert admission.num_queued == 1
        first.leave.set()
        await settle()
        assert order == [0, 2]
        fourth, fifth = (Holder(admission, name, order) for name in (3, 4))
        await settle()
        third.leave.set()
        await asyncio.sleep(0)  # the slot is the fourth's, which does not know of it yet
        fourth.task.cancel()
        await settle()
        assert order == [0, 2, 4]
        fifth.leave.set()
        await settle()
        assert (admission.num_held, admission.num_queued) == (0, 0)

    asyncio.run(run())


def test_a_block_that_fails_gives_its_slot_back() -> None:
    async def run() -> None:
        admission = Admission(1, 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with admission.slot():
                    raise ZeroDivisionError
        assert admission.num_held == 0

    asyncio.run(run())


def test_how_long_to_stay_away_follows_the_service_times() -> None:
    async def run(seconds: float) -> float:
        now = 0.0
        admission = Admission(2, 0, clock=lambda: now)
        for _ in range(40):
            async with admission.slot():
                now += seconds
        async with admission.slot(), admission.slot():
            with pytest.raises(ApiError) as refused:
                async with admission.slot():
                    pass
        assert refused.value.retry_after is not None
        return refused.value.retry_after

    assert asyncio.run(run(0.01)) == 1.0
    assert asyncio.run(run(20.0)) == pytest.approx(10.0, rel=0.01)
    assert asyncio.run(run(1e6)) == 60.0


def test_no_slots_are_a_refusal_that_no_repetition_changes() -> None:
    async def run() -> ApiError:
        with pytest.raises(ApiError, match="live sessions are switched off") as refused:
            async with Admission(0, 0, "live sessions").slot():
                pass
        return refused.value

    told = asyncio.run(run())
    assert (told.status, told.code, told.headers) == (403, "switched_off", {})


def test_a_server_without_live_sessions_says_so(serve: Serve) -> None:
    server = serve("--live", 0)
    with connect(f"ws://127.0.0.1:{server.port}/v1/video/chat/stream") as socket:
        told = json.loads(socket.recv(20))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(20)
    assert (told["type"], told["code"]) == ("error", "switched_off")
    assert "live sessions are switched off on this server" in told["message"]
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert httpx2.get(f"{server.url}/v1/models").status_code == 200
    assert server.log.read_text() == ""


@pytest.mark.parametrize("seed", range(5))
def test_slots_balance_whatever_happens(seed: int) -> None:
    """Many come, go and give up in any order: never more at once, and in the end all are free."""

    async def run() -> None:
        chance, admission, most = random.Random(seed), Admission(3, 8), 0
        tasks: list[asyncio.Task[None]] = []

        async def visit() -> None:
            nonlocal most
            with suppress(ApiError):  # of one too many
                async with admission.slot():
                    most = max(most, admission.num_held)
                    for _ in range(chance.randrange(6)):
                        await asyncio.sleep(0)

        for _ in range(300):
            tasks.append(asyncio.create_task(visit()))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
            if chance.random() < 0.5:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 3
        assert (admission.num_held, admission.num_queued) == (0, 0)

    asyncio.run(run())
