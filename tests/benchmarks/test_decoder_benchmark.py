"""Which decoders are compared with which, and when what they are made of is made anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.decoder import Row, Side, is_near, perplexity, verdicts
from benchmarks.llama import Logits, Settings, Tuned
from benchmarks.recipe import exporter, made

OURS_8 = Row("ours 8", 8, True, 100, 50, 20.0)
OURS_4 = Row("ours 4", 4, True, 90, 80, 21.0)
PEER_8 = Row("peer 8", 8, False, 80, 40, 20.5)
PEER_4 = Row("peer 4", 4, False, 95, 60, 21.5)


def test_steps_are_compared_at_equal_bits_with_what_is_no_better() -> None:
    better = Row("better", 4, False, 70, 90, 20.5)
    as_good = Row("as good", 8, False, 60, 45, 19.95)
    assert [*verdicts([OURS_8, OURS_4, PEER_8, PEER_4, better, as_good])] == [
        "prefill: ours 8 (20.000) is 1.05 times as fast as peer 4 (21.500)",
        "steps, 8 bits: ours 8 (20.000) is 1.11 times as fast as as good (19.950)",
        "steps, 4 bits: ours 4 (21.000) is 1.33 times as fast as peer 4 (21.500)",
    ]


def test_where_nothing_can_be_compared_none_is_said() -> None:
    much_better = Row("better", 4, False, 70, 90, 20.0)
    assert [*verdicts([OURS_4, much_better])][2] == "steps, 4 bits: ours 4 (21.000) against none"
    assert [*verdicts([OURS_8, PEER_8, PEER_4])][2] == "steps, 4 bits: none of ours is near fp32"
    assert next(verdicts([PEER_8])) == "prefill: none against peer 8 (20.500)"


def test_random_weights_are_compared_by_bits_alone() -> None:
    rows = [Row("a", 8, True, 30, 20, None), Row("b", 8, False, 10, 10, None)]
    assert [*verdicts(rows)][:2] == [
        "prefill: a is 3.00 times as fast as b",
        "steps, 8 bits: a is 2.00 times as fast as b",
    ]


def test_near_is_at_most_seven_per_cent_above() -> None:
    assert is_near(10.69, 10.0)
    assert not is_near(10.71, 10.0)
    assert is_near(None, None)


@pytest.mark.parametrize("has_two_caches", [False, True])
def test_perplexity_is_of_the_second_half_after_all_before_it(has_two_caches: bool) -> None:
    ids = [3, 1, 4, 1, 5, 2]
    read_at: list[tuple[list[int], int]] = []
    logits = np.log(np.array([0.1, 0.5, 0.1, 0.1, 0.1, 0.1], np.float32))

    def step(part: list[int], length: int) -> Logits:
        read_at.append((part, length))
        return logits

    def read(part: list[int], length: int) -> Logits:
        return step(part, length)

    side = Side("side", 8, True, read if has_two_caches else step, step)
    # Of 1, 5 and 2.
    assert perplexity(side, ids) == pytest.approx((0.5 * 0.1 * 0.1) ** (-1 / 3), rel=1e-6)
    halves = 2 if has_two_caches else 1
    assert read_at == [([3, 1, 4], 0)] * halves + [([1], 3), ([5], 4), ([2], 5)]


def test_settings_are_told_apart_where_they_differ() -> None:
    def run(ids: list[int], length: int) -> Logits:
        return np.zeros(len(ids) + length, np.float32)

    first, second = Settings(True, 512), Settings(False, 1024)
    assert str(Tuned(run, run, first, first)) == "flash_attn on, n_ubatch 512"
    told = "prompts flash_attn on, n_ubatch 512; steps flash_attn off, n_ubatch 1024"
    assert str(Tuned(run, run, first, second)) == told


def test_what_is_made_is_kept_until_its_recipe_changes(tmp_path: Path) -> None:
    folder, count = tmp_path / "deep" / "made", 0

    def make(part: Path) -> None:
        nonlocal count
        count += 1
        part.mkdir()
        (part / "count").write_text(str(count))

    for recipe, expected in (("a", 1), ("a", 1), ("b", 2), ("a", 3)):
        assert made(folder, recipe, make) == folder
        assert (folder / "count").read_text() == str(expected)

    def fail(part: Path) -> None:
        make(part)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        made(folder, "c", fail)
    assert not folder.exists()
    made(folder, "c", make)  # what failed is in nobody's way
    assert [path.name for path in (tmp_path / "deep").iterdir() if path.is_dir()] == ["made"]
    assert exporter() == exporter()
