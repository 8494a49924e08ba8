"""Stop strings, found in text that arrives in pieces.

Knows nothing of tokens: a stop string may begin in one piece and end in another.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one output for the first of several strings to be completed.

    The answer depends on the text alone, never on how it was cut into pieces: the match is the one
    that ends first, and of those that end together the longest.

    Args:
        stops: non-empty strings.
        include: whether the match belongs to the output. Where it does not, text that may be its
            beginning is held back until it is certain.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = True) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._first_letters = frozenset(stop[0] for stop in self._stops)
        # The end of the text so far that a match may begin with.
        self._tail = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Take the next piece of the text.

        Returns:
            What is now known to belong to the output, and whether a stop string was completed.
            After that nothing more may be fed.
        """
        if not self._stops or not piece:
            return piece, False
        window = self._tail + piece
        # Where the text ends that was given out before.
        given = len(self._tail) if self._include else 0
        matches = [
            (start + len(stop), start) for stop in self._stops if (start := window.find(stop)) >= 0
        ]
        if matches:
            end, start = min(matches)
            self._tail = ""
            return window[given : end if self._include else start], True
        self._tail = self._beginning_in(window)
        return window[given:] if self._include else window[: len(window) - len(self._tail)], False

    def flush(self) -> str:
        """The text held back, now that the output has ended without a match."""
        held = "" if self._include else self._tail
        self._tail = ""
        return held

    def _beginning_in(self, text: str) -> str:
        """The longest end of `text` with which a stop string begins."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_letters:
                end = text[start:]
                if any(stop.startswith(end) for stop in self._stops):
                    return end
        return ""
