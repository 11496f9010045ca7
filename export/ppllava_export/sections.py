"""Typed reading of the JSON files beside a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppllava_engines import strict_json
from ppllava_engines.errors import DataError, NotFoundError

_LARGEST = 2**31 - 1  # more than any size or id of a model
_MOST_BYTES = 1 << 30  # more than any tokenizer has
# The graphs compute in float32; what is below its normal range is zero to some of its kernels.
_SMALLEST_FLOAT, _LARGEST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def is_file(path: Path) -> bool:
    """Returns whether there is such a file, one that may be read as a whole.

    Raises:
        DataError: Something else is there: a pipe, which may be read without end, a link to what
            is missing, or a file above 1 GiB.
    """
    if not path.exists():
        if path.is_symlink():
            raise DataError(f"{path}: a link to what is not there, copy the whole checkpoint")
        return False
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise DataError(f"{path}: {size} bytes, expected at most {_MOST_BYTES}")
    return True


def is_normal(value: float) -> bool:
    """Returns whether a positive number is within float32's normal range."""
    return _SMALLEST_FLOAT <= value <= _LARGEST_FLOAT


class Section:
    """One JSON object of a named file; null counts as absent, as in the files people publish."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    @staticmethod
    def read(path: Path) -> Section:
        """Returns the object in the JSON file `path`.

        Raises:
            DataError: Not to be read, above 64 MiB, not UTF-8, not JSON, or not an object.
            NotFoundError: There is no such file.
        """
        is_file(path)
        try:
            text = strict_json.read_text(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{path}: no such file") from error
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
        """Returns a positive number within float32's normal range."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not is_normal(value):
            raise self.wrong(key, value, "a positive number in float32's normal range")
        return float(value)

    def triple(self, key: str, default: tuple[int, int, int] | None) -> tuple[int, int, int]:
        """Returns three positive ints."""
        value = self.get(key, default)
        if (
            not isinstance(value, list | tuple)
            or len(value) != 3
            or any(type(item) is not int or not 1 <= item <= _LARGEST for item in value)
        ):
            raise self.wrong(key, value, "three positive integers")
        return value[0], value[1], value[2]

    def channels(
        self, key: str, default: tuple[float, float, float], *, positive: bool
    ) -> tuple[float, float, float]:
        """Returns a number per channel; of any sign, and maybe 0, unless `positive`."""
        value = self.get(key, default)
        if (
            not isinstance(value, list | tuple)
            or len(value) != 3
            or any(type(item) not in (int, float) for item in value)
            or not all(is_normal(i) if positive else abs(i) <= _LARGEST_FLOAT for i in value)
        ):
            expected = "positive numbers" if positive else "numbers"
            raise self.wrong(key, value, f"three {expected} in float32's range")
        return float(value[0]), float(value[1]), float(value[2])

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns a bool."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: Any, expected: str) -> DataError:
        """Returns the error that says what `key` holds and what it must hold."""
        key = strict_json.shortened(key)
        return DataError(f"{self.where}: {key} is {shown(value)}, expected {expected}")


def shown(value: Any) -> str:
    """Returns a value for people, cut to what fits into a sentence."""
    return "absent" if value is None else strict_json.shortened(repr(value))
