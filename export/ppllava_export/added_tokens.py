"""Tokens that a checkpoint's files add to its tokenizer, each at the id that they state."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ppllava_engines.errors import DataError

from .sections import Section
from .tokenizer_reading import reading

TOKENIZER_CONFIG = "tokenizer_config.json"
_ADDED = "added_tokens.json"
_SPECIAL = "special_tokens_map.json"
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_ID = re.compile(r"[0-9]{1,10}")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True)
class _Stated:
    """A token's id, who states it, and how the token is matched."""

    token_id: int
    where: str
    flags: dict[str, bool]


@dataclass
class AddedTokens:
    """What is known of a tokenizer's added tokens besides the tokenizer itself.

    Attributes:
        special: Tokens that are commands and never text. Those that have no id and that the
            tokenizer does not know are left out: the model has no embedding for them.
    """

    special: set[str] = field(default_factory=set)
    _stated: dict[str, _Stated] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> AddedTokens:
        """Returns what the files in `folder` say; none of them has to be there.

        Raises:
            DataError: A malformed file, two ids of one token, or a file that names code.
        """
        tokens = AddedTokens()
        added = Section.read_optional(folder / _ADDED)
        for token, token_id in added.values.items():
            if type(token_id) is not int or token_id < 0:
                raise added.wrong(token, token_id, "an id")
            tokens.state(token, token_id, added.where)
        config = Section.read_optional(folder / TOKENIZER_CONFIG)
        if config.get("auto_map") is not None:
            raise DataError(f"{config.where}: auto_map names code, which is never run")
        decoder = config.section("added_tokens_decoder")
        for key in decoder.values:
            entry = decoder.section(key)
            token = entry.get("content")
            if not isinstance(token, str) or not _ID.fullmatch(key):
                raise decoder.wrong(key, decoder.get(key), "a token by its id")
            flags = {flag: entry.flag(flag) for flag in _FLAGS}
            tokens.state(token, int(key), decoder.where, entry.flag("special"), flags)
        for section in (config, Section.read_optional(folder / _SPECIAL)):
            tokens.special.update(_special(section))
        return tokens

    def state(
        self,
        token: str,
        token_id: int,
        where: str,
        special: bool = False,
        flags: dict[str, bool] | None = None,
    ) -> None:
        """Adds a token, or what else is known of it.

        Args:
            token: Its text.
            token_id: Its id.
            where: Says so; for errors.
            special: Whether it is a command.
            flags: How it is matched, in the words of tokenizer.json; exactly unless stated.

        Raises:
            DataError: The token was stated with another id.
        """
        before = self._stated.get(token, _Stated(token_id, where, {}))
        if before.token_id != token_id:
            raise DataError(
                f"{where}: {token} is {token_id}, but {before.where} has it at {before.token_id}"
            )
        self._stated[token] = _Stated(token_id, where, before.flags | (flags or {}))
        if special:
            self.special.add(token)

    def place(self, tokenizer: Tokenizer, source: Path, *, built: bool) -> Tokenizer:
        """Returns a tokenizer like `tokenizer` with every token at its id.

        Args:
            tokenizer: Has none of them, some or all.
            source: Where it comes from; for errors.
            built: Whether the ids of what was added to it were made up, and are to be forgotten.

        Raises:
            DataError: A token that has another id there, or an id that belongs to another token.
        """
        with reading(f"{source}: the tokenizer cannot be read"):
            value: dict[str, Any] = json.loads(tokenizer.to_str())
        vocabulary = value["model"]["vocab"]
        own = isinstance(vocabulary, dict)  # pieces of a unigram model are a list instead
        added = {entry["content"]: entry for entry in value["added_tokens"]}
        if built:
            added = {token: entry for token, entry in added.items() if token in vocabulary}
        ids = dict(vocabulary) if own else {piece: at for at, (piece, _) in enumerate(vocabulary)}
        ids |= {token: entry["id"] for token, entry in added.items()}
        owners = {token_id: token for token, token_id in ids.items()}
        for token, stated in self._stated.items():
            found = ids.setdefault(token, stated.token_id)
            owner = owners.setdefault(stated.token_id, token)
            if (found, owner) != (stated.token_id, token):
                same = found == stated.token_id
                reason = f"{found} is {owner!r}" if same else f"{token} is {found}"
                raise DataError(
                    f"{source}: the tokenizer's {reason}, but {stated.where} has {token} at "
                    f"{stated.token_id}"
                )
            added.setdefault(token, _entry(token, found, stated.flags))
        for token in sorted(self.special & ids.keys()):
            added.setdefault(token, _entry(token, ids[token], {}))["special"] = True
        # The library counts up the ids of added tokens, unless the vocabulary itself has them.
        if own:
            vocabulary |= {token: entry["id"] for token, entry in added.items()}
        value["added_tokens"] = sorted(added.values(), key=lambda entry: int(entry["id"]))
        with reading(f"{source}: its added tokens cannot be placed"):
            placed = Tokenizer.from_str(json.dumps(value))
        for token, stated in self._stated.items():
            if (found := placed.token_to_id(token)) != stated.token_id:
                raise DataError(f"{source}: {token} became {found}, expected {stated.token_id}")
        return placed


def _special(section: Section) -> Iterator[str]:
    """Yields the tokens that a file's fields name as special, e.g. under `eos_token`."""
    for key, value in section.values.items():
        if key in _LISTS:
            named = list(value.values()) if isinstance(value, dict) else value
        else:
            named = [value] if key.endswith("_token") else []
        for item in named if isinstance(named, list) else []:
            token = item.get("content") if isinstance(item, dict) else item
            if isinstance(token, str):
                yield token


def _entry(token: str, token_id: int, flags: dict[str, bool]) -> dict[str, Any]:
    exactly = dict.fromkeys(_FLAGS, False)
    return {"id": token_id, "content": token, **exactly, **flags, "special": False}
