"""How refusals are checked: the class, its exit code, and one sentence that names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ppllava_engines.errors import PPLLaVAError


def refuses(
    load: Callable[[Path], object],
    folder: Path,
    kind: type[PPLLaVAError],
    exit_code: int,
    *names: str,
) -> None:
    with pytest.raises(kind) as caught:
        load(folder)
    assert type(caught.value) is kind
    assert caught.value.exit_code == exit_code
    sentence = str(caught.value)
    assert "\n" not in sentence
    for name in names:
        assert name in sentence
