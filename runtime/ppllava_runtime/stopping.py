"""Text as it comes → text that ends before the first of some strings."""

from __future__ import annotations

from collections.abc import Sequence

from ppllava_engines.errors import UsageError


class StopStrings:
    """Holds text back for as long as it may be the beginning of a stop string.

    All pieces together are the text before the stop string that is the first to be complete, and
    the longest of those that end with it, without white space at its end: however it is cut.

    Attributes:
        found: Whether one came; what comes after it is left out.

    Args:
        strings: The stop strings.

    Raises:
        UsageError: One that is empty or not text, or a string instead of several.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str):  # whose letters would be stop strings
            raise UsageError(f"stop takes a list of strings, got {strings!r}: put it in a list")
        for string in strings:
            if not isinstance(string, str) or not string:
                raise UsageError(f"stop has {string!r} in it, expected strings that are not empty")
        self.found = False
        self._strings = tuple(strings)
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain to be shown, now that this piece came."""
        if self.found:
            return ""
        text = self._held + piece
        places = [(text.find(string), len(string)) for string in self._strings]
        ends = [(begin + length, begin) for begin, length in places if begin >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]].rstrip()
        # Before a stop string that is still to come, white space would be at the end.
        shown = text[: len(text) - self._longest_beginning(text)].rstrip()
        if not self._strings:
            shown = text
        self._held = text[len(shown) :]
        return shown

    def finish(self) -> str:
        """The rest, when no more text comes."""
        text, self._held = self._held, ""
        return text

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = 0
        for string in self._strings:
            for length in range(min(len(string) - 1, len(text)), longest, -1):
                if text.endswith(string[:length]):
                    longest = length
                    break
        return longest
