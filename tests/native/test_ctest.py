"""The ctest program, with its own cases and with the sweep's, also under sanitizers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pool_cases import CASES


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of the sweep, in a file."""
    path = tmp_path_factory.mktemp("table") / "cases"
    with path.open("wb") as file:
        for case in CASES:
            case.write(file)
    return path


@pytest.mark.parametrize("preset", ["strict", "sanitize"])
def test_native_code_by_itself(preset: str, build: Callable[[str], Path], table: Path) -> None:
    program = build(preset) / "ppllava_pool_test"
    for arguments, said in ((), "0 failures"), ((table,), f"{len(CASES)} cases"):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout


def test_sanitizers_are_on(build: Callable[[str], Path]) -> None:
    program = build("sanitize") / "ppllava_pool_test"
    symbols = subprocess.run(["nm", "-D", program], capture_output=True, text=True, check=True)
    assert "__asan_report_load4" in symbols.stdout
    assert "__ubsan_handle_add_overflow_abort" in symbols.stdout


def test_the_tolerance_in_the_file_is_applied(build: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES[0]
    with (tmp_path / "case").open("wb") as file:
        case.write(file)
    content = bytearray((tmp_path / "case").read_bytes())
    # The last eight bytes before the values are the tolerance: a negative one allows nothing.
    hidden, weights = case.arrays()
    end = len(content) - hidden.size * 4 - weights.nbytes
    content[end - 8 : end] = bytes(6) + b"\xf0\xbf"
    (tmp_path / "case").write_bytes(content)
    program = build("strict") / "ppllava_pool_test"
    done = subprocess.run([program, tmp_path / "case"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED case 0" in done.stdout
