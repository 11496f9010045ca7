"""JSON ↔ frozen dataclasses, where every surprise is an error that names its place."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from ppllava_engines.errors import DataError

T = TypeVar("T")

_SIMPLE = (str, int, float, bool, types.NoneType)
_MOST_BYTES = 64 << 20  # far more than any config or manifest holds
_MOST_SHOWN = 60  # characters of a value in an error
_MOST_NAMED = 3  # keys in an error


def read_text(path: Path) -> str:
    """The text of a JSON file, for `loads`.

    Raises:
        DataError: Not a file but a folder or a pipe, larger than 64 MiB, or not UTF-8.
        OSError: It is not there, or cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe may be read without end
        raise DataError(f"{path}: not a file")
    if status.st_size > _MOST_BYTES:
        raise DataError(f"{path}: {status.st_size} bytes, expected at most {_MOST_BYTES} of JSON")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from error


def loads(text: str, source: str) -> Any:
    """The JSON value of `text`.

    Raises:
        DataError: Not JSON, a key given twice in one object, NaN or an infinity; names `source`.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = sorted(key for key, count in counts.items() if count > 1)
            raise DataError(f"{source}: key {_named(twice)} is given more than once")
        return value

    def finite(constant: str) -> NoReturn:
        raise DataError(f"{source}: {constant} is not a number that JSON allows")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not valid JSON: {error}") from error


def dumps(value: Any) -> str:
    """The JSON text of a dataclass or a dict: indented, in order, a newline at the end."""
    plain = value if isinstance(value, dict) else dataclasses.asdict(value)
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def decode(kind: type[T], value: Any, where: str) -> T:
    """`value`, as parsed from JSON, as a `kind`.

    `kind` is a dataclass whose fields are, at any depth, dataclasses, str, int, float, bool, None,
    tuple[X, ...], tuple[X, Y], dict[str, X], a Literal of strings or a union of simple ones and at
    most one other. All keys are required and no others are allowed. An int passes for a float;
    nothing else is converted.

    Raises:
        DataError: A missing or unknown key or a value of another type; names its place below
            `where`.
    """
    decoded: T = _decode(kind, value, where)
    return decoded


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_object(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict:
        _expect(dict, value, where, "an object")
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        _expect(list, value, where, "a list")
        if arguments[1:] == (...,):
            arguments = arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise DataError(f"{where} has {len(value)} items, expected {len(arguments)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(_decode(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(pairs))
    if origin is Literal:
        if value not in arguments or type(value) is not str:
            choices = " or ".join(map(repr, arguments))
            raise DataError(f"{where} is {_shown(value)}, expected {choices}")
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            if type(value) is option:
                return value
        if len(compound := [option for option in arguments if option not in _SIMPLE]) == 1:
            return _decode(compound[0], value, where)
        names = " or ".join("null" if o is types.NoneType else o.__name__ for o in arguments)
        raise DataError(f"{where} is {_shown(value)}, expected {names}")
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise DataError(f"{where} is too large a number")
        return number
    _expect(kind, value, where, kind.__name__)
    return value


def _decode_object(kind: Any, value: Any, where: str) -> Any:
    _expect(dict, value, where, "an object")
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    missing = [name for name in names if name not in value]
    unknown = [name for name in value if name not in names]
    if missing or unknown:
        found = [
            f"{what} {_named(keys)}"
            for what, keys in (("misses", missing), ("has unknown", unknown))
            if keys
        ]
        raise DataError(f"{where} {' and '.join(found)}")
    return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in names})


def _expect(kind: type, value: Any, where: str, expected: str) -> None:
    # type() and not isinstance: True must not pass for an int.
    if type(value) is not kind:
        raise DataError(f"{where} is {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    try:
        return shortened(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return "nested too deep to be shown"


def _named(keys: Sequence[str]) -> str:
    names = ", ".join(shortened(repr(key)) for key in keys[:_MOST_NAMED])
    more = len(keys) - _MOST_NAMED
    return f"{names} and {more} more" if more > 0 else names


def shortened(text: str) -> str:
    """A value's text, cut to what fits into a sentence."""
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
