"""Typed reading of the JSON files beside a checkpoint's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppllava_engines import strict_json
from ppllava_engines.errors import DataError, NotFoundError


class Section:
    """One JSON object of a named file; null counts as absent, as in the files people publish."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    @staticmethod
    def read(path: Path) -> Section:
        """Returns the object in the JSON file `path`.

        Raises:
            DataError: Not UTF-8, not JSON, or not an object.
            NotFoundError: There is no such file.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{path}: no such file") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error}") from error
        values = strict_json.loads(text, str(path))
        if not isinstance(values, dict):
            raise DataError(f"{path}: holds a {type(values).__name__}, expected an object")
        return Section(values, str(path))

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

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns an int of at least `least`."""
        value = self.get(key, default)
        if type(value) is not int or value < least:
            raise self.wrong(key, value, f"an integer of at least {least}")
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

    def flag(self, key: str) -> bool:
        """Returns a bool, false when absent."""
        value = self.get(key, False)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: Any, expected: str) -> DataError:
        """Returns the error that says what `key` holds and what it must hold."""
        got = "absent" if value is None else repr(value)
        return DataError(f"{self.where}: {key} is {got}, expected {expected}")
