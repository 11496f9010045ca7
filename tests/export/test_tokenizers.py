"""Where a bundle's two tokenizers come from, the decoder's above all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from ppllava_engines.errors import DataError, UnavailableError
from ppllava_export import text_tokenizer
from ppllava_export.checkpoint import load_config
from ppllava_export.config_files import CheckpointFiles
from ppllava_export.tokenizer_files import (
    Tokenizers,
    chat_template,
    end_token_ids,
    read_tokenizers,
)
from tiny_checkpoint import decoder_tokenizer, edit_json
from tiny_text import sentences

TEXT = "A red square, twice: über 2 Kästen!"
CHATML = "<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"
VICUNA = "USER: <image>\n{question} ASSISTANT: "

needs_sentencepiece = pytest.mark.skipif(
    find_spec("sentencepiece") is None, reason="sentencepiece, which makes the file, is missing"
)


def files(checkpoint: Path) -> CheckpointFiles:
    return CheckpointFiles(checkpoint, checkpoint.parent / "clip", 8)


def read(checkpoint: Path, **changes: Any) -> Tokenizers:
    return read_tokenizers(replace(load_config(checkpoint), **changes), files(checkpoint))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def token(content: str, special: bool = True) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special, **flags}


def test_both_are_read_and_written(clip: Path, tmp_path: Path) -> None:
    tokenizers = read(clip)
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
def test_a_missing_one_names_the_way_out(clip: Path, which: str) -> None:
    (clip.parent / which / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="--skip-tokenizer") as caught:
        read(clip)
    assert caught.value.exit_code == 65
    assert str(clip.parent / which) in str(caught.value).replace("checkpoint/../", "")


@pytest.mark.parametrize("which", ["checkpoint", "clip"])
@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}'])
def test_a_broken_one_is_refused(clip: Path, which: str, text: str) -> None:
    (clip.parent / which / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=which):
        read(clip)


def test_ids_beyond_the_model_are_refused(clip: Path) -> None:
    path = clip / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["model"]["vocab"]["extra"] = 384
    write_json(path, value)
    with pytest.raises(DataError, match="up to 384"):
        read(clip)


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
def test_image_token_is_added_where_the_config_wants_it(clip: Path, index: int) -> None:
    without(clip, "<image>")
    decoder = read(clip, image_token_index=index).decoder
    assert decoder.token_to_id("<image>") == index
    assert image_ids(decoder).count(index) == 1
    assert decoder.get_added_tokens_decoder()[index].special
    assert decoder.encode("<s></s>", add_special_tokens=False).ids == [1, 2]


@pytest.mark.parametrize("index", [4, 100])
def test_image_token_takes_no_id_of_another(clip: Path, index: int) -> None:
    without(clip, "<image>")
    with pytest.raises(DataError, match=f"tokenizer's {index} is '.*<image> at {index}"):
        read(clip, image_token_index=index)


def test_two_image_tokens_are_refused(clip: Path) -> None:
    edit_json(clip / "config.json", image_token_index=4)
    with pytest.raises(DataError, match=r"<image> is 3, .*image_token_index has <image> at 4"):
        read(clip)


def test_image_token_that_was_text_becomes_special(clip: Path) -> None:
    path = clip / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    for entry in value["added_tokens"]:
        entry["special"] = entry["special"] and entry["content"] != "<image>"
    write_json(path, value)
    assert read(clip).decoder.get_added_tokens_decoder()[3].special


def test_vicuna_layout(clip: Path) -> None:
    """As LLaVA-NeXT is published: two more tokens after the vocabulary, stated in three files."""
    without(clip, "<image>")
    write_json(clip / "added_tokens.json", {"<image>": 361, "<pad>": 370, "[v1.5]": 372})
    write_json(clip / "special_tokens_map.json", {"pad_token": token("<pad>"), "eos_token": "no"})
    write_json(
        clip / "tokenizer_config.json",
        {
            "added_tokens_decoder": {"361": token("<image>"), "370": token("<pad>")},
            "legacy": False,
            "processor_class": "LlavaNextProcessor",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
        },
    )
    decoder = read(clip, image_token_index=361).decoder
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
    clip: Path, name: str, value: object, message: str
) -> None:
    write_json(clip / name, value)
    with pytest.raises(DataError, match=message):
        read(clip)


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


def test_qwen2_from_vocabulary_and_merges(clip: Path) -> None:
    changes = write_qwen2(clip)
    decoder = read(clip, **changes).decoder
    vocabulary = json.loads((clip / "vocab.json").read_text(encoding="utf-8"))
    text = "<|im_start|>user\n<image>\na red<|im_end|>"
    letters = [vocabulary[letter] for letter in "user"]
    line, space = vocabulary["Ċ"], vocabulary["Ġ"]
    expected = [260, *letters, line, 262, line, vocabulary["a"], space, vocabulary["red"], 261]
    assert decoder.encode(text).ids == expected
    assert decoder.decode(decoder.encode(TEXT).ids) == TEXT
    config = replace(load_config(clip), **changes)
    assert chat_template(decoder, config) == chat_template(None, config) == CHATML
    assert end_token_ids(decoder, config) == (2, 261)
    (clip / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"vocab\.json and merges\.txt.*--skip-tokenizer"):
        read(clip, **changes)


def test_tokens_that_no_file_states_are_not_made_up(clip: Path) -> None:
    """Without its added tokens Qwen2's tokenizer can end no answer, and says so."""
    changes = write_qwen2(clip)
    (clip / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"neither <\|im_end\|> nor </s>"):
        read(clip, **changes)


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


@needs_sentencepiece
def test_llama_from_tokenizer_model(clip: Path, sentencepiece_llama: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    (clip / "tokenizer.json").unlink()
    shutil.copy(sentencepiece_llama, clip)
    reference = SentencePieceProcessor(model_file=str(sentencepiece_llama))
    decoder = read(clip, image_token_index=360).decoder
    for text in ("USER: what is seen?", TEXT, "12 34", "a  b\nc", "日本 🎉"):
        assert decoder.encode(text).ids == [1, *reference.encode(text)]
        assert decoder.decode(decoder.encode(text).ids) == text
    assert image_ids(decoder).count(360) == 1
    write_json(clip / "tokenizer_config.json", {"add_bos_token": False})
    assert read(clip, image_token_index=360).decoder.encode("red").ids == reference.encode("red")


@needs_sentencepiece
def test_broken_tokenizer_model_is_refused(clip: Path) -> None:
    (clip / "tokenizer.json").unlink()
    (clip / "tokenizer.model").write_bytes(b"\x0a\xffnothing of the kind")
    with pytest.raises(DataError, match="cannot be read"):
        read(clip)


def test_tokenizer_model_names_the_packages_it_needs(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clip / "tokenizer.json").rename(clip / "tokenizer.model")
    monkeypatch.setattr(text_tokenizer, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="pip install sentencepiece protobuf"):
        read(clip)


# Templates


def test_templates_follow_the_tokenizer(clip: Path) -> None:
    config = load_config(clip)
    qwen2 = replace(config, decoder={**config.decoder, "model_type": "qwen2"})
    tokenizer = decoder_tokenizer()
    assert chat_template(tokenizer, qwen2) == chat_template(None, config) == VICUNA
    assert end_token_ids(tokenizer, replace(config, eos_token_ids=(7,))) == (7, 2)
    assert end_token_ids(None, replace(config, eos_token_ids=())) == ()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert chat_template(tokenizer, config) == CHATML
    end = tokenizer.get_vocab()["<|im_end|>"]
    assert end_token_ids(tokenizer, replace(config, eos_token_ids=(end, 2))) == (end, 2)
