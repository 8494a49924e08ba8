"""Detects stop strings in streamed text.

Independent of tokens: a stop string may span several chunks.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first completed stop string in one output.

    The result depends on the text alone, not on its division into chunks: the match that ends first wins,
    and of those that end together the longest.

    Args:
        stops: non-empty strings.
        include: whether the match is part of the output. If not, text that may be a prefix of a match is
            held back until that is decided.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = True) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._first_letters = frozenset(stop[0] for stop in self._stops)
        # The suffix of the text so far that a match may start in.
        self._tail = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Process the next chunk of text.

        Returns:
            Text that is certain to belong to the output, and whether a stop string was completed.
            After a match nothing more may be fed.
        """
        if not self._stops or not piece:
            return piece, False
        window = self._tail + piece
        # End of the text that was returned before.
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
        """The held-back text, when the output has ended without a match."""
        held = "" if self._include else self._tail
        self._tail = ""
        return held

    def _beginning_in(self, text: str) -> str:
        """The longest suffix of `text` that is a prefix of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_letters:
                end = text[start:]
                if any(stop.startswith(end) for stop in self._stops):
                    return end
        return ""
