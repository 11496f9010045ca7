"""Typed reading of the JSON files beside a checkpoint's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppllava_engines import strict_json
from ppllava_engines.errors import DataError, NotFoundError

_LARGEST = 2**31 - 1  # more than any size or id of a model


def is_file(path: Path) -> bool:
    """Returns whether there is such a file.

    Raises:
        DataError: Something else is there, such as a pipe, which may be read without end.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a file")
    return path.is_file()


class Section:
    """One JSON object of a named file; null counts as absent, as in the files people publish."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    @staticmethod
    def read(path: Path) -> Section:
        """Returns the object in the JSON file `path`.

        Raises:
            DataError: Not to be read, not UTF-8, not JSON, or not an object.
            NotFoundError: There is no such file.
        """
        is_file(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{path}: no such file") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        values = strict_json.loads(text, str(path))
        if not isinstance(values, dict):
            raise DataError(f"{path}: holds a {type(values).__name__}, expected an object")
        return Section(values, str(path))

    @staticmethod
    def read_optional(path: Path) -> Section:
        """Returns the object in the JSON file `path`, an empty one when there is no such file.

        Raises:
            DataError: See `read`.
        """
        return Section.read(path) if is_file(path) else Section({}, str(path))

    @property
    def values(self) -> dict[str, Any]:
        """Every field that is not null."""
        return {key: value for key, value in self._values.items() if value is not None}

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of `key`, where a dot descends into an object."""
        first, _, rest = key.partition(".")
        value = self._values.get(first)
        if rest:
            return self.section(first).get(rest, default)
        return default if value is None else value

    def section(self, key: str) -> Section:
        """Returns the object under `key`, an empty one when it is absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return Section(value, f"{self.where}: {key}")

    def integer(
        self, key: str, default: int | None = None, least: int = 1, most: int = _LARGEST
    ) -> int:
        """Returns an int of at least `least` and at most `most`."""
        value = self.get(key, default)
        if type(value) is not int or not least <= value <= most:
            limit = "" if most == _LARGEST else f" and at most {most}"
            raise self.wrong(key, value, f"an integer of at least {least}{limit}")
        return value

    def index(self, key: str, size: int, default: int | None = None) -> int:
        """Returns an id of a vocabulary of `size`."""
        value = self.integer(key, default, least=0)
        if value >= size:
            raise self.wrong(key, value, f"an id below the vocabulary's {size}")
        return value

    def number(self, key: str, default: float) -> float:
        """Returns a positive finite float."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def triple(self, key: str, default: Any, kind: type[int] | type[float]) -> tuple[Any, Any, Any]:
        """Returns three positive numbers of `kind`."""
        value = self.get(key, default)
        kinds = (int,) if kind is int else (int, float)
        if (
            not isinstance(value, list | tuple)
            or len(value) != 3
            or any(type(item) not in kinds or not 0 < item < math.inf for item in value)
        ):
            raise self.wrong(key, value, f"three positive {kind.__name__} values")
        return kind(value[0]), kind(value[1]), kind(value[2])

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns a bool."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: Any, expected: str) -> DataError:
        """Returns the error that says what `key` holds and what it must hold."""
        got = "absent" if value is None else repr(value)
        return DataError(f"{self.where}: {key} is {got}, expected {expected}")
