"""The names of what was shown, of which there may be many, each for many pictures."""

from __future__ import annotations

import tracemalloc

from ppllava_runtime.server.asked import Item
from ppllava_runtime.server.media import Remembered, Uuids

MOST = 100
NAME_BYTES = 4096


def named(name: object) -> list[Item]:
    return [Item("image", None, str(name), "messages[0].content[0]")]


def remembered(num_pictures: int, damage: str | None = None) -> Remembered:
    # Strings and bytes of its own, as those of a request are.
    key, digests = f"{num_pictures:064}", bytes(32 * num_pictures)
    return Remembered(key, digests, (damage and f"{damage}.",) * num_pictures)


def test_names_are_bounded_by_what_they_take() -> None:
    for num_pictures, damage in ((1, None), (64, None), (256, None), (64, "x" * 20_000)):
        uuids = Uuids(MOST)
        tracemalloc.start()
        try:
            for number in range(3 * MOST):
                uuids.put("tenant", named(number), remembered(num_pictures, damage))
            num_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert num_bytes < MOST * NAME_BYTES, (num_pictures, damage)
        # The last ones, all of them where each is within its share.
        kept = [number for number in range(3 * MOST) if uuids.get("tenant", named(number))]
        assert kept == list(range(3 * MOST - len(kept), 3 * MOST))
        assert (len(kept) == MOST) == (num_pictures <= 64 and damage is None)
        assert kept


def test_who_names_much_loses_names_and_nobody_else() -> None:
    uuids = Uuids(MOST)
    for number in range(MOST // 2):
        uuids.put("quiet", named(number), remembered(1))
    for number in range(MOST):  # fewer names than those of the other, which take more
        uuids.put("loud", named(number), remembered(256))
    assert all(uuids.get("quiet", named(number)) for number in range(MOST // 2))
    num_loud = sum(uuids.get("loud", named(number)) is not None for number in range(MOST))
    assert 0 < num_loud < MOST // 2


def test_a_name_that_is_given_again_counts_once() -> None:
    uuids = Uuids(MOST)
    uuids.put("tenant", named("first"), remembered(1))
    for _ in range(MOST):
        uuids.put("tenant", named("again"), remembered(256))
    assert uuids.get("tenant", named("first")) is not None
