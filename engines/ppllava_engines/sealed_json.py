"""Versioned JSON documents that carry their own hash, so that a change is told from a mistake."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ppllava_engines import strict_json
from ppllava_engines.errors import DataError, IncompatibleError

T = TypeVar("T")


@dataclass(frozen=True)
class Format(Generic[T]):
    """A kind of document; its field schema_version says of which version it is.

    Attributes:
        content: The dataclass.
        version: Of this release.
        seal: The key of the hash.
        made_by: "the export" or "the build", for people.
        advice: How to come by another document.
    """

    content: type[T]
    version: int
    seal: str
    made_by: str
    advice: str

    def dumps(self, document: T) -> str:
        """The text that `loads` reads back to an equal document."""
        value = json.loads(strict_json.dumps(document))
        return strict_json.dumps({self.seal: hash_of(value)} | value)

    def seal_of(self, document: T) -> str:
        """The hash of a document, which tells it from every other one."""
        return hash_of(json.loads(strict_json.dumps(document)))

    def loads(self, text: str, source: str) -> T:
        """The document of `text`; `source` names it in errors.

        Raises:
            DataError: Not JSON, a key or value that does not belong, which it names, or one that
                was changed since it was written.
            IncompatibleError: Another schema version.
        """
        value = strict_json.loads(text, source)
        # The version comes first: of another one, nothing else is known.
        version = value.get("schema_version") if isinstance(value, dict) else None
        if type(version) is int and version != self.version:
            raise IncompatibleError(
                f"{source}: schema_version is {version}, this release reads {self.version}: "
                f"{self.advice}"
            )
        seal = value.pop(self.seal, None) if isinstance(value, dict) else None
        document = strict_json.decode(self.content, value, source)
        if seal != hash_of(value):
            raise DataError(f"{source}: it was changed since {self.made_by}: {self.advice}")
        return document


def hash_of(value: dict[str, Any]) -> str:
    """The SHA-256 in hexadecimal of a JSON object, however it is laid out."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
