"""Files beside the weights that are damaged, endless or not there, whatever they would say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ppllava_engines.errors import DataError, NotFoundError, PPLLaVAError
from ppllava_export.checkpoint import load_config
from refusals import refuses
from tiny_checkpoint import edit_json


@pytest.fixture
def clip(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the CLIP family's checkpoint that a test may break."""
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return tmp_path / "copy" / checkpoint.name


def fails(folder: Path, kind: type[PPLLaVAError], exit_code: int, *names: str) -> None:
    refuses(load_config, folder, kind, exit_code, *names)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', "\xff"])
def test_malformed_config_is_refused(clip: Path, text: str) -> None:
    (clip / "config.json").write_bytes(text.encode("latin-1"))
    fails(clip, DataError, 65, "config.json")


def test_config_that_cannot_be_read_is_refused(clip: Path) -> None:
    (clip / "config.json").unlink()
    fails(clip, NotFoundError, 66, "config.json")
    (clip / "config.json").mkdir()
    fails(clip, DataError, 65, "config.json", "not a file")


NEIGHBOURS = ("generation_config.json", "preprocessor_config.json", "../clip/config.json")


@pytest.mark.parametrize("name", ["config.json", *NEIGHBOURS])
def test_links_to_nothing_and_files_too_large_are_refused(clip: Path, name: str) -> None:
    path = clip / name
    os.truncate(path, 3 << 30)  # it takes no room
    fails(clip, DataError, 65, f"{name}: 3221225472 bytes")
    path.unlink()
    path.symlink_to("nowhere")
    fails(clip, DataError, 65, f"{name}: a link to what is not there")


def test_a_clip_weight_that_links_to_nothing_is_refused(clip: Path) -> None:
    (clip / "openai").symlink_to("nowhere")
    edit_json(clip / "config.json", clip_weight="openai")
    fails(clip, DataError, 65, "clip_weight is 'openai'", "links to what is not there")


def test_keys_given_twice_are_named_soon_and_few(clip: Path) -> None:
    keys = ", ".join(f'"key {i}": {i // 2}' for i in range(20000))
    (clip / "config.json").write_text(f"{{{keys}, {keys}}}")
    fails(clip, DataError, 65, "key 'key 0', 'key 1', 'key 10' and 19997 more is given more than")
