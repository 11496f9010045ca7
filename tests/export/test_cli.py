"""What the command says when an export fails: one line, its exit code, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ppllava_engines.errors import run_command
from ppllava_export import cli
from tiny_checkpoint import edit_json, save_tensors, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
LINEAR = "multi_modal_projector.linear_1.weight"


def miss_a_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    write_json(folder / INDEX, {"weight_map": {LINEAR: SHARD}})


def truncate(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.truncate(200)


def misshape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_tensors(folder, tensors | {LINEAR: np.zeros((2, 3), np.float32)})


FAILURES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "missing config": (lambda folder: (folder / "config.json").unlink(), 66, "config.json"),
    "missing weights": (lambda folder: (folder / WEIGHTS).unlink(), 65, WEIGHTS),
    "missing shard": (miss_a_shard, 65, SHARD),
    "truncated header": (truncate, 65, WEIGHTS),
    "wrong shape": (misshape, 65, f"{LINEAR} (2, 3) instead of (64, 32)"),
    "pooling": (lambda folder: edit_json(folder / "config.json", pooling="avp"), 78, "pooling"),
    "missing branch": (
        lambda folder: edit_json(folder / "config.json", btadapter=True),
        65,
        "btadapter_cls_token (1, 1, 32)",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_export_is_one_line_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / checkpoint.name
    damage, code, named = FAILURES[name]
    damage(copy)
    assert run_command(cli.main, [str(copy), str(tmp_path / "made" / "out")]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.index("\n") == len(err) - 1
    assert named in err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]  # no `made`, no staging in it
