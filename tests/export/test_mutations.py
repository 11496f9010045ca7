"""Checkpoints that are broken or hostile: refused in one sentence, and nothing of them is run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import broken_configs as configs
import broken_pickles as pickles
import broken_weights as weights
from broken_checkpoint import CANARY, Breaking
from ppllava_engines.errors import run_command
from ppllava_export.cli import main

EXIT_DATA = 65
SECONDS = 60  # far more than a refusal takes; waiting for a pipe would take for ever
KINDS = (
    weights.headers, weights.offsets, weights.values, weights.tensors, weights.shards,
    weights.indices, pickles.pickles, pickles.archives, configs.configs, configs.texts,
    configs.neighbours, configs.tokenizers, configs.not_files,
)  # fmt: skip
MUTATIONS = {f"{kind.__name__}: {name}": breaking for kind in KINDS for name, breaking in kind()}
# One of each kind, through the real command.
COMMANDS = (
    "headers: cut to 100 bytes",
    "pickles: os.system, protocol 2",
    "not_files: config.json is a pipe",
)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint.parent, tmp_path / "source")
    return tmp_path / "source" / checkpoint.name


@pytest.fixture
def alarm() -> Iterator[None]:
    """Fails a test that waits for ever, instead of waiting with it."""

    def give_up(*_: object) -> None:
        raise RuntimeError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def assert_refused(code: int, stderr: str, copy: Path, out: Path) -> None:
    assert (code, stderr.count("\n"), stderr[:7]) == (EXIT_DATA, 1, "error: "), (code, stderr)
    assert not out.parent.exists()
    assert not (copy.parent / CANARY).exists()


def test_there_are_enough() -> None:
    assert len(MUTATIONS) >= 200
    assert len(MUTATIONS) == sum(1 for kind in KINDS for _ in kind())  # each has its name


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("breaking", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_broken_checkpoint_is_refused(
    breaking: Breaking, copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    breaking(copy)
    out = tmp_path / "home" / "bundle"
    code = run_command(main, [str(copy), str(out)])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert_refused(code, captured.err, copy, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_refuses_it(name: str, copy: Path, tmp_path: Path) -> None:
    MUTATIONS[name](copy)
    out = tmp_path / "home" / "bundle"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "ppllava_export.cli", str(copy), str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.stdout == ""
    assert_refused(done.returncode, done.stderr, copy, out)
