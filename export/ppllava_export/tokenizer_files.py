"""The two tokenizers of a checkpoint → tokenizers/{decoder,text}.json of a bundle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer
from transformers import CLIPTokenizer, LlamaTokenizer

from ppllava_engines.errors import DataError, NotFoundError, UnavailableError

from .config_files import CheckpointFiles, text_token_ids
from .modules.config import ModelConfig

_IMAGE_TOKEN = "<image>"
_SENTENCEPIECE = "tokenizer.model"
_CLIP_SOURCES = ("vocab.json", "merges.txt")
_REMEDY = "add it, or export without text by --skip-tokenizer"


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers, read and found to fit the model."""

    decoder: Tokenizer
    text: Tokenizer

    def write(self, folder: Path) -> dict[str, str]:
        """Returns the bundle's paths of both, which it writes below `folder`."""
        paths = {"decoder": "tokenizers/decoder.json", "text": "tokenizers/text.json"}
        (folder / "tokenizers").mkdir()
        self.decoder.save(str(folder / paths["decoder"]), pretty=False)
        self.text.save(str(folder / paths["text"]), pretty=False)
        return paths


def read_tokenizers(config: ModelConfig, files: CheckpointFiles) -> Tokenizers:
    """Returns the decoder's tokenizer and the text tower's.

    Each is tokenizer.json, or is built by transformers: from tokenizer.model for the decoder,
    from vocab.json and merges.txt for the text tower.

    Raises:
        DataError: A file that is malformed, or that has ids the model has not.
        NotFoundError: One is missing; the message names --skip-tokenizer.
        UnavailableError: tokenizer.model needs a package that is not installed.
    """
    decoder = _read(files.folder, LlamaTokenizer, [_SENTENCEPIECE])
    _check_size(decoder, config.decoder["vocab_size"], files.folder)
    image_id = decoder.token_to_id(_IMAGE_TOKEN)
    if image_id not in (None, config.image_token_index):
        raise DataError(
            f"{files.folder}: the tokenizer's {_IMAGE_TOKEN} is {image_id}, but config.json's "
            f"image_token_index is {config.image_token_index}"
        )
    if files.clip is None or not files.clip.is_dir():
        place = files.clip or "a folder and name it by clip_weight"
        raise NotFoundError(
            f"{files.folder / 'config.json'}: clip_weight names no folder here, so there is no "
            f"tokenizer of the text tower: put its {' and '.join(_CLIP_SOURCES)} into {place}, or "
            "export without text by --skip-tokenizer"
        )
    text = _read(files.clip, CLIPTokenizer, _CLIP_SOURCES)
    _check_size(text, config.text.vocab_size, files.clip)
    _, end = text_token_ids(config.text)
    if text.id_to_token(end) is None:
        raise DataError(f"{files.clip}: the tokenizer has no end-of-text token {end}")
    return Tokenizers(decoder, text)


def _read(
    folder: Path, kind: type[LlamaTokenizer | CLIPTokenizer], sources: Iterable[str]
) -> Tokenizer:
    path = folder / "tokenizer.json"
    if (
        not path.is_file()
        and (folder / _SENTENCEPIECE).is_file()
        and not find_spec("sentencepiece")
    ):
        raise UnavailableError(
            f"{folder / _SENTENCEPIECE} is read by a package that is missing: "
            "pip install sentencepiece"
        )
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        if all((folder / source).is_file() for source in sources):
            built: Tokenizer = kind.from_pretrained(folder, local_files_only=True).backend_tokenizer
            return built
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{folder}: the tokenizer cannot be read: {error}") from error
    raise NotFoundError(
        f"{folder}: no tokenizer, neither tokenizer.json nor {' and '.join(sources)}: {_REMEDY}"
    )


def _check_size(tokenizer: Tokenizer, vocab_size: int, folder: Path) -> None:
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has ids up to {highest}, but the model only {vocab_size}"
        )
