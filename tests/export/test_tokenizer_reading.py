"""Tokenizers that break the library which reads them: one sentence, and no trace of its own."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest

from ppllava_engines.errors import DataError, UnavailableError
from ppllava_export.checkpoint import load_config
from ppllava_export.config_files import CheckpointFiles
from ppllava_export.tokenizer_files import read_tokenizers
from ppllava_export.tokenizer_reading import reading


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return tmp_path / "copy" / checkpoint.name


def read(checkpoint: Path) -> None:
    files = CheckpointFiles(checkpoint, checkpoint.parent / "clip", 8)
    read_tokenizers(load_config(checkpoint), files)


def edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(value), encoding="utf-8")


def precompiled(charsmap: bytes) -> dict[str, str]:
    text = base64.b64encode(charsmap).decode()
    return {"type": "Precompiled", "precompiled_charsmap": text}


MERGING = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
PANICS: dict[str, dict[str, object]] = {
    "a prefix longer than what it begins": {
        "model": MERGING | {"continuing_subword_prefix": "####"}
    },
    "characters that are no map": {"normalizer": precompiled(b"\xff" * 4)},
    "a map that leads out of itself": {"normalizer": precompiled(b"\4\0\0\0\1\2\3\4")},
    "a template of tokens that it does not list": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("which", ["checkpoint", "clip"])
@pytest.mark.parametrize("name", PANICS)
def test_one_that_makes_the_library_panic_is_refused_in_silence(
    copied: Path, which: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(copied.parent / which / "tokenizer.json", **PANICS[name])
    with pytest.raises(DataError, match=which):
        read(copied)
    assert capfd.readouterr() == ("", "")
    os.write(2, b"heard")  # afterwards, the process's stderr is its own again
    assert capfd.readouterr().err == "heard"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, UnavailableError])
def test_what_is_not_the_files_fault_passes(kind: type[BaseException]) -> None:
    with pytest.raises(kind), reading("never said"):
        raise kind
    with pytest.raises(DataError, match=r"^this failed: so$"), reading("this failed"):
        raise BaseException("so")


@pytest.mark.parametrize("which", ["checkpoint", "clip"])
def test_one_that_is_too_large_or_links_to_nothing_is_refused(copied: Path, which: str) -> None:
    path = copied.parent / which / "tokenizer.json"
    os.truncate(path, (1 << 30) + 1)
    with pytest.raises(DataError, match=r"json: 1073741825 bytes, expected at most 1073741824$"):
        read(copied)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(DataError, match="a link to what is not there"):
        read(copied)
