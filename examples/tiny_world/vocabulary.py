"""The two tokenizers of the tiny model, in the file formats of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from .questions import all_texts

DECODER_SPECIAL = ("<unk>", "<s>", "</s>", "<image>")
TEXT_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_DECODER_SIZE = 768
_TEXT_SIZE = 768


def decoder_tokenizer() -> Tokenizer:
    """Returns a Llama-style BPE: spaces are marks, unknown characters fall back to bytes."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=_DECODER_SIZE,
        special_tokens=[*DECODER_SPECIAL, *byte_tokens],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    turns = [f"\n{text} ASSISTANT: " for text in all_texts()]
    trained.train_from_iterator([*all_texts(), *turns, *["USER: "] * len(turns)], trainer)
    # only the first four are special tokens; bytes are plain entries, as in Llama's vocabulary
    state = json.loads(trained.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in DECODER_SPECIAL]
    state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", token_id(tokenizer, "<s>"))]
    )
    return tokenizer


def text_tokenizer() -> Tokenizer:
    """Returns a CLIP-style byte-level BPE, lower-cased, with end-of-word marks."""
    tokenizer = Tokenizer(
        models.BPE(unk_token=TEXT_SPECIAL[1], end_of_word_suffix="</w>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # every byte exists alone and as the end of a word, so that any text can be written
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=_TEXT_SIZE - len(TEXT_SPECIAL),
        special_tokens=[],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_texts(), trainer)
    state = json.loads(tokenizer.to_str())
    learned = [t for t in state["model"]["vocab"] if t not in alphabet]
    entries = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *learned, *TEXT_SPECIAL]
    state["model"]["vocab"] = {t: i for i, t in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in TEXT_SPECIAL])
    tokenizer.decoder = decoders.ByteLevel()
    start, end = TEXT_SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(name, token_id(tokenizer, name)) for name in TEXT_SPECIAL],
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Returns the id of a token.

    Raises:
        KeyError: The tokenizer has no such token.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def write_json(path: Path, content: object) -> None:
    """Writes `content` as indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_decoder_tokenizer(folder: Path, positions: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    decoder_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": positions,
            "clean_up_tokenization_spaces": False,
            "image_token": "<image>",
            **names,
        },
    )
    write_json(folder / "special_tokens_map.json", names)


def write_text_tokenizer(folder: Path, positions: int) -> None:
    """Writes CLIP's vocab.json, merges.txt, tokenizer.json and tokenizer_config.json."""
    tokenizer = text_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    state = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", tokenizer.get_vocab(with_added_tokens=True))
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    names = {
        "bos_token": TEXT_SPECIAL[0],
        "eos_token": TEXT_SPECIAL[1],
        "unk_token": TEXT_SPECIAL[1],
        "pad_token": TEXT_SPECIAL[1],
    }
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": positions, **names},
    )
    write_json(folder / "special_tokens_map.json", names)
