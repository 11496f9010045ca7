"""What tokenizers of other people's files do when they fail, kept to one kind of error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ppllava_engines.errors import DataError, PPLLaVAError

_STDERR = 2


@contextmanager
def reading(failure: str) -> Iterator[None]:
    """Yields while a tokenizer is read or tried; whatever fails there is the files' fault.

    The library panics over some of them: it prints where in its Rust code that was, and raises
    what is no Exception.

    Args:
        failure: Says what could not be done, of which file.

    Raises:
        DataError: The block failed.
    """
    with _silent():
        try:
            yield
        except (PPLLaVAError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            raise DataError(f"{failure}: {error}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Yields while nothing is written to the process's stderr, by whatever language."""
    try:
        kept = os.dup(_STDERR)
    except OSError:  # it is closed, so nothing can be
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STDERR)
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(nowhere)
        os.close(kept)
