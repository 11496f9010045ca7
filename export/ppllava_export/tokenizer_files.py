"""The two tokenizers of a checkpoint → tokenizers/{decoder,text}.json of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import LlamaTokenizer, Qwen2Tokenizer

from ppllava_engines.errors import DataError

from .added_tokens import TOKENIZER_CONFIG, AddedTokens
from .config_files import CheckpointFiles
from .modules.config import ModelConfig
from .sections import Section, is_file
from .text_tokenizer import (
    SKIP,
    TOKENIZER,
    check_tokenizer,
    load_tokenizer,
    read_text_tokenizer,
    require_sentencepiece,
)
from .tokenizer_reading import reading

_IMAGE_TOKEN, _IMAGE_INDEX = "<image>", "image_token_index"
_CHATML = "<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_VICUNA = "USER: <image>\n{question} ASSISTANT: "
_VICUNA_END = "</s>"
_NEXT_TURNS = {
    _CHATML: "<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    _VICUNA: "</s>USER: {question} ASSISTANT: ",
}
# Decoder → the files its tokenizer is built from when there is no tokenizer.json.
_SOURCES = {"llama": ("tokenizer.model",), "qwen2": ("vocab.json", "merges.txt")}


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers, read and found to fit the model."""

    decoder: Tokenizer
    text: Tokenizer

    def write(self, folder: Path) -> dict[str, str]:
        """Returns the bundle's paths of both, which it writes below `folder`."""
        paths = {"decoder": "tokenizers/decoder.json", "text": "tokenizers/text.json"}
        (folder / "tokenizers").mkdir()
        # Not by the library's own save, whose failures do not say that they are the disk's.
        (folder / paths["decoder"]).write_text(self.decoder.to_str(), encoding="utf-8")
        (folder / paths["text"]).write_text(self.text.to_str(), encoding="utf-8")
        return paths


def read_tokenizers(config: ModelConfig, files: CheckpointFiles) -> Tokenizers:
    """Returns the decoder's tokenizer and the text tower's.

    The decoder's is tokenizer.json, or is built by transformers from tokenizer.model (Llama) or
    vocab.json and merges.txt (Qwen2); added tokens of the files beside it are in it at their ids,
    and `<image>` at the id that config.json states. For the text tower's see `text_tokenizer`.

    Raises:
        DataError: A file that is malformed, or that has ids the model has not; or one is missing,
            which names --skip-tokenizer.
        UnavailableError: One needs a package that is not installed; names the pip command.
    """
    decoder = _read_decoder(config, files.folder)
    check_tokenizer(decoder, config.decoder["vocab_size"], files.folder)
    end_token_ids(decoder, config)
    return Tokenizers(decoder, read_text_tokenizer(config, files.clip))


def chat_template(decoder: Tokenizer | None, config: ModelConfig) -> str:
    """Returns a turn's text, with {question} and one "<image>" before a line break.

    It is ChatML for a tokenizer that knows its tokens, or without one for a Qwen2 decoder; else
    Vicuna's.
    """
    if decoder is None:
        return _CHATML if config.decoder["model_type"] == "qwen2" else _VICUNA
    known = all(decoder.token_to_id(token) is not None for token in _CHATML_TOKENS)
    return _CHATML if known else _VICUNA


def next_turn_template(chat_template: str) -> str:
    """Returns the text between an answer and the next one, with the next {question} in it."""
    return _NEXT_TURNS[chat_template]


def end_token_ids(decoder: Tokenizer | None, config: ModelConfig) -> tuple[int, ...]:
    """Returns the ids that end an answer: the checkpoint's and, with a tokenizer, the template's.

    Raises:
        DataError: A tokenizer that does not know the token which ends its template's answers.
    """
    if decoder is None:
        return config.eos_token_ids
    template = chat_template(decoder, config)
    token = _CHATML_TOKENS[1] if template == _CHATML else _VICUNA_END
    end = decoder.token_to_id(token)
    if end is None:
        raise DataError(
            f"{config.name}: the decoder's tokenizer has neither {_CHATML_TOKENS[1]} nor "
            f"{_VICUNA_END}, one of which ends an answer: add it, or {SKIP}"
        )
    return tuple(dict.fromkeys((*config.eos_token_ids, end)))


def _read_decoder(config: ModelConfig, folder: Path) -> Tokenizer:
    tokens = AddedTokens.read(folder)
    # A checkpoint may count on its user to add this one, as LLaVA's processors do.
    where = f"config.json's {_IMAGE_INDEX}"
    tokens.state(_IMAGE_TOKEN, config.image_token_index, where, special=True)
    path = folder / TOKENIZER
    if is_file(path):
        return tokens.place(load_tokenizer(path), path, built=False)
    return tokens.place(_build_decoder(config.decoder["model_type"], folder), folder, built=True)


def _build_decoder(kind: str, folder: Path) -> Tokenizer:
    """Returns the tokenizer that transformers makes of the files of this kind of decoder."""
    sources = [folder / name for name in _SOURCES[kind]]
    if not all(is_file(source) for source in sources):
        raise DataError(
            f"{folder}: no tokenizer of the decoder, neither {TOKENIZER} nor "
            f"{' and '.join(_SOURCES[kind])}: add it, or {SKIP}"
        )
    if kind == "llama":
        require_sentencepiece(sources[0])
    # Llama begins a prompt with its own token unless the checkpoint says that it does not.
    begin = Section.read_optional(folder / TOKENIZER_CONFIG).flag("add_bos_token", default=True)
    with reading(f"{folder}: the tokenizer cannot be read"):
        if kind == "qwen2":
            vocabulary, merges = map(str, sources)
            return Qwen2Tokenizer(vocab=vocabulary, merges=merges).backend_tokenizer
        return LlamaTokenizer.from_pretrained(
            folder, local_files_only=True, add_bos_token=begin
        ).backend_tokenizer
