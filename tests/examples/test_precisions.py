"""The table of precisions; the measurement itself takes minutes and is in the README."""

from __future__ import annotations

from ppllava_engines.parity import STAGES
from tiny_world.agreement import SEEDS
from tiny_world.precisions import CALIBRATION, ORDERS, Row, table


def test_table_counts_answers_as_torchs_and_as_right() -> None:
    cosines = dict.fromkeys(STAGES, 0.5)
    rows = [Row("fp16, vision int8", 1_250_000, cosines, ["red", "two", "left"])]
    lines = table(rows, expected=["red", "two", "up"], right=["blue", "two", "up"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert cells[2] == ["fp16, vision int8", "1.2", *["0.50000"] * len(STAGES), "2", "1"]
    assert cells[3] == ["torch, fp32", *[""] * (len(STAGES) + 1), "3", "2"]


def test_calibration_sees_nothing_that_is_asked_about() -> None:
    assert not set(CALIBRATION) & set(SEEDS)
    assert len({str(order) for order in ORDERS}) == len(ORDERS)
