"""Answers that are JSON of a schema, or that match a regular expression, whatever the model says.

The package llguidance knows after each id which ones can follow; see `decoders.Constraint`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle
from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    InternalError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher

_SILENT = 0
# As `json.dumps` writes it, in one line: where white space is free, small models get lost in it.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes the constraints of answers, for one model.

    Args:
        tokenizer: The decoder's, as the JSON of its file.
        vocab_size: Length of the logits, V.
        eos_token_ids: Any of them ends an answer.

    Raises:
        DataError: The tokenizer cannot be read.
        UnavailableError: The package llguidance is not installed.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise UnavailableError(
                "answers by a schema or an expression need llguidance: pip install "
                '"ppllava-edge[grammar]"'
            ) from error
        self._matcher = llguidance.LLMatcher
        self._vocab_size = vocab_size
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer, eos_token=list(eos_token_ids))
        except Exception as error:  # the library raises several
            raise DataError(
                f"decoder: llguidance cannot read the tokenizer, export it again: {error}"
            ) from error

    @staticmethod
    def open(bundle: Bundle) -> Grammars:
        """Those for a bundle's model.

        Raises:
            IncompatibleError: A bundle that was exported without tokenizers.
            DataError, UnavailableError: See `Grammars`.
        """
        manifest = bundle.manifest
        if "decoder" not in manifest.tokenizers:
            raise IncompatibleError(
                f"bundle {bundle.path}: it was exported without tokenizers, so its answers follow "
                "no schema or expression: export it again without --skip-tokenizer"
            )
        text = bundle.file(manifest.tokenizers["decoder"]).read_text(encoding="utf-8")
        return Grammars(text, manifest.decoder.vocab_size, manifest.decoder.eos_token_ids)

    def constraint(
        self, json_schema: str | Mapping[str, Any] | None = None, regex: str | None = None
    ) -> TokenConstraint:
        """A new constraint, for one answer.

        Args:
            json_schema: What the answer is, as a JSON schema or its text.
            regex: Or an expression that the whole answer matches.

        Raises:
            UsageError: None of the two or both, or one that is not understood or too large.
        """
        if (json_schema is None) == (regex is None):
            raise UsageError("an answer follows either a json_schema or a regex: give one of them")
        if regex is not None:
            return self._constraint("regex", self._matcher.grammar_from_regex(_encodable(regex)))
        schema = _schema_text(json_schema)
        try:
            grammar = self._matcher.grammar_from_json_schema(schema, overrides=_LAYOUT)
        except ValueError as error:
            raise _not_followed("json_schema", str(error)) from error
        return self._constraint("json_schema", grammar)

    def _constraint(self, what: str, grammar: str) -> TokenConstraint:
        matcher = self._matcher(self._tokenizer, grammar, log_level=_SILENT)
        if matcher.is_error():
            raise _not_followed(what, matcher.get_error())
        # What is too large, or matches nothing, is known only when ids are asked for.
        trial = TokenConstraint(what, matcher.deep_copy(), self._vocab_size)
        trial.accept(int(trial.allowed().argmax()))
        return TokenConstraint(what, matcher, self._vocab_size)


class TokenConstraint:
    """A Constraint by a grammar; see there.

    Args:
        what: What the grammar was given as, for errors.
        matcher: At the beginning of an answer.
        vocab_size: Length of the logits, V.
    """

    def __init__(self, what: str, matcher: LLMatcher, vocab_size: int) -> None:
        self._what = what
        self._matcher = matcher
        self._mask = np.zeros(vocab_size, np.bool_)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """(V,): the ids that may come next.

        Raises:
            UsageError: The grammar turns out to be too large, or leaves nothing to say.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _not_followed(self._what, self._matcher.get_error())
        self._mask = np.zeros_like(self._mask)
        known = np.unpackbits(bits, count=min(8 * bits.size, self._mask.size), bitorder="little")
        self._mask[: known.size] = known  # logits may be padded beyond the tokenizer's ids
        return self._mask.copy()

    def accept(self, token: int) -> None:
        """Takes the id that came, one of those that `allowed` gave.

        Raises:
            InternalError: It is none of them.
            UsageError: The grammar turns out to be too large.
        """
        if not self._mask[token]:
            raise InternalError(f"constraint: id {token} came, which is not allowed here")
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise _not_followed(self._what, self._matcher.get_error())


def _encodable(regex: object) -> str:
    """The expression, which is text that the library takes."""
    if not isinstance(regex, str):
        raise UsageError(f"regex takes a string, got {regex!r}")
    try:
        regex.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"regex has no character at position {error.start}, only a part of one: write it in "
            "UTF-8"
        ) from error
    return regex


def _schema_text(json_schema: object) -> str:
    """The schema as the text of a JSON object."""
    try:
        schema = json.loads(json_schema) if isinstance(json_schema, str) else json_schema
        if isinstance(schema, bool):  # which stands for anything, or nothing
            schema = {} if schema else {"enum": []}
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"json_schema is not JSON: {error}") from error
    except RecursionError as error:
        raise _not_followed("json_schema", "it is nested too deeply") from error
    if not isinstance(schema, dict):
        raise _not_followed("json_schema", f"expected an object, true or false, got {text}")
    return text


def _not_followed(what: str, failure: str) -> UsageError:
    """The error for a grammar, of what llguidance tells: only its reason, not its state."""
    lines = failure.partition("\n<state>")[0].splitlines()
    # Expressions are shown with an arrow first.
    reasons = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    reason = [*reasons, *lines, "it gives no reason"][0].strip()
    if reason == "NoExtensionBias":
        reason = "the model has no token for it"
    return UsageError(f"{what} is not one that answers can follow: {reason}")
