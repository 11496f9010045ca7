"""Exports that are killed or whose writes fail leave the old bundle, the new one or none."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tiny_bundle import write_bundle
from tiny_checkpoint import write_checkpoint
from under_fire import FAULTS, LAYERS, MAPPINGS, REMOVALS, WRITES, Call, Range, Shot, exporter


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Range]:
    if shutil.which("strace") is None:
        pytest.skip("NOT RUN: strace is not installed: apt-get install strace")
    if subprocess.run(["strace", "-qq", "true"], capture_output=True, check=False).returncode:
        pytest.skip("NOT RUN: strace may not trace here: it needs the ptrace system call")
    folder = tmp_path_factory.mktemp("fire")
    checkpoint = write_checkpoint(folder / "source", text_config={"num_hidden_layers": LAYERS})
    (folder / "range").mkdir()
    with exporter(checkpoint) as export:
        yield Range(export, folder / "range", write_bundle(folder / "old"))


def assert_no_problems(field: Range, shots: list[Shot]) -> None:
    problems = [problem for outcome in field.volley(shots) for problem in outcome.problems]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_every_write_sync_and_rename_may_fail_or_be_the_last(field: Range) -> None:
    """Each once, with faults and what was there before in turn: see under_fire for every pair."""
    plans = {over_old: writes(field.calls(over_old=over_old)) for over_old in (True, False)}
    assert min(map(len, plans.values())) >= 150
    shots = [
        Shot(call, FAULTS[place // 2 % len(FAULTS)], over_old)
        for over_old, calls in plans.items()
        for place, call in enumerate(calls)
        if place % 2 == over_old
    ]
    assert len({(shot.at.name, shot.at.number) for shot in shots}) >= 150
    assert_no_problems(field, shots)


@pytest.mark.slow
def test_a_bundle_that_cannot_be_swapped_in_one_step_is_replaced_as_safely(field: Range) -> None:
    calls = field.calls(over_old=True, exchange=False)
    moves = [call for call in calls if call.name == "rename" and "bundle" in call.file]
    assert len(moves) == 2  # the old away, the new in
    sync = [call for call in calls if call.name == "fsync"][-1]
    shots = [Shot(call, fault, exchange=False) for call in [*moves, sync] for fault in FAULTS]
    assert_no_problems(field, shots)


@pytest.mark.slow
def test_a_failure_while_making_room_or_removing_breaks_nothing(field: Range) -> None:
    others = [call for call in field.calls(over_old=True) if call.name not in (*WRITES, *MAPPINGS)]
    assert {"openat", "mkdir"} < {call.name for call in others}
    assert set(REMOVALS) & {call.name for call in others}
    shots = [Shot(call, FAULTS[place % len(FAULTS)]) for place, call in enumerate(others)]
    assert_no_problems(field, shots)


def test_nothing_is_written_through_a_mapping(field: Range) -> None:
    """A full disk would then kill the process by SIGBUS, or lose what is written unnoticed."""
    maps = [call.text for call in field.calls(over_old=False) if call.name in MAPPINGS]
    assert maps  # the graphs' weights are mapped to be read
    assert not [text for text in maps if "PROT_WRITE" in text and "MAP_SHARED" in text]


def writes(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.name in WRITES]
