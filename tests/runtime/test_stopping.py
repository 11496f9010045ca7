"""Text that ends before a stop string, however it comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ppllava_engines.errors import UsageError
from ppllava_runtime.stopping import StopStrings


def whole(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the strings to be complete, read letter by letter."""
    for end in range(len(text) + 1):
        begins = [end - len(string) for string in strings if text[:end].endswith(string)]
        if begins:
            return text[: min(begins)].rstrip()
    return text


def shown(pieces: Sequence[str], strings: Sequence[str]) -> list[str]:
    stop = StopStrings(strings)
    return [*(stop.push(piece) for piece in pieces), stop.finish()]


LETTERS = st.text("ab \n", max_size=12)


@given(pieces=st.lists(LETTERS, max_size=8), strings=st.lists(LETTERS.filter(bool), max_size=3))
@example(pieces=["abcd"], strings=["abcd", "c"])
@example(pieces=["abc", "d"], strings=["abcd", "c"])
def test_pieces_are_the_text_before_the_first_stop_string(
    pieces: list[str], strings: list[str]
) -> None:
    assert "".join(shown(pieces, strings)) == whole("".join(pieces), strings)


@pytest.mark.parametrize("pieces", [["abcd"], ["abc", "d"], ["ab", "cd"], ["a", "b", "c", "d"]])
def test_the_first_to_be_complete_ends_it_however_it_is_cut(pieces: list[str]) -> None:
    assert "".join(shown(pieces, ["abcd", "c"])) == "ab"
    assert "".join(shown(pieces, ["c", "bc"])) == "a"


def test_nothing_is_held_back_that_no_stop_string_can_begin_with() -> None:
    assert shown(["It is", " red", "."], []) == ["It is", " red", ".", ""]
    assert shown(["It is", " U", "S", "."], ["USER:"]) == ["It is", "", "", " US.", ""]
    assert shown(["Yes", "\nUS", "ER: and"], ["USER:"]) == ["Yes", "", "", ""]
    # White space waits, as a stop string may follow it.
    assert shown(["Yes ", "no"], ["USER:"]) == ["Yes", " no", ""]


@pytest.mark.parametrize(
    ("strings", "sentence"),
    [
        ("USER:", "stop takes a list of strings, got 'USER:': put it in a list"),
        (["a", ""], "stop has '' in it, expected strings that are not empty"),
        ([3], "stop has 3 in it, expected strings that are not empty"),
    ],
)
def test_refuses(strings: Sequence[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        StopStrings(strings)
    assert str(caught.value) == sentence
