"""Where a bundle's two tokenizers come from, and what is said when there is none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ppllava_engines.errors import DataError, NotFoundError, UnavailableError
from ppllava_export import tokenizer_files
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.tokenizer_files import Tokenizers, read_tokenizers
from tiny_checkpoint import edit_json, text_tokenizer

TEXT = "A red square, twice: über 2 Kästen!"


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return tmp_path / "copy" / checkpoint.name


def read(checkpoint: Path) -> Tokenizers:
    loaded = load_checkpoint(checkpoint)
    return read_tokenizers(loaded.config, loaded.files)


def test_both_are_read_and_written(copied: Path, tmp_path: Path) -> None:
    tokenizers = read(copied)
    (tmp_path / "out").mkdir()
    paths = tokenizers.write(tmp_path / "out")
    assert paths == {"decoder": "tokenizers/decoder.json", "text": "tokenizers/text.json"}
    ids = tokenizers.text.encode(TEXT).ids
    assert (ids[0], ids[-1]) == (512, 513)
    ids = tokenizers.decoder.encode(f"USER: <image>\n{TEXT}").ids
    assert ids[0] == 1
    assert ids.count(3) == 1
    assert tokenizers.decoder.decode(ids).endswith(TEXT)


def test_text_tokenizer_from_vocabulary_and_merges(copied: Path) -> None:
    clip = copied.parent / "clip"
    (clip / "tokenizer.json").unlink()
    vocabulary = text_tokenizer().get_vocab()
    (clip / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(NotFoundError, match=r"merges\.txt"):
        read(copied)
    (clip / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    ids = read(copied).text.encode("two Words!").ids
    expected = ["t", "w", "o</w>", "w", "o", "r", "d", "s</w>", "!</w>"]
    assert ids == [512, *(vocabulary[token] for token in expected), 513]


@pytest.mark.parametrize("which", ["checkpoint", "clip"])
def test_a_missing_one_names_the_way_out(copied: Path, which: str) -> None:
    (copied.parent / which / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match="--skip-tokenizer") as caught:
        read(copied)
    assert caught.value.exit_code == 66
    assert f"/{which}:" in str(caught.value)


@pytest.mark.parametrize("name", [None, "openai/clip-vit-large-patch14-336"])
def test_clip_known_only_by_name_names_the_folder_to_make(copied: Path, name: str | None) -> None:
    loaded = load_checkpoint(copied)
    files = replace(loaded.files, clip=copied / name if name else None)
    place = copied / name if name else "a folder and name it by clip_weight"
    with pytest.raises(NotFoundError, match=r"clip_weight .* --skip-tokenizer") as caught:
        read_tokenizers(loaded.config, files)
    assert f"vocab.json and merges.txt into {place}, or" in str(caught.value)


def test_tokenizer_model_names_the_package_it_needs(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "tokenizer.json").rename(copied / "tokenizer.model")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="pip install sentencepiece"):
        read(copied)


@pytest.mark.parametrize("which", ["checkpoint", "clip"])
def test_a_broken_one_is_refused(copied: Path, which: str) -> None:
    (copied.parent / which / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=which):
        read(copied)


def test_ids_beyond_the_model_are_refused(copied: Path) -> None:
    path = copied / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["model"]["vocab"]["extra"] = 384
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(DataError, match="up to 384"):
        read(copied)


def test_two_image_tokens_are_refused(copied: Path) -> None:
    edit_json(copied / "config.json", image_token_index=4)
    with pytest.raises(DataError, match="<image> is 3"):
        read(copied)
