"""Stop strings, found in text that arrives in pieces.

Knows nothing of tokens: a stop string may begin in one piece and end in another.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one output for the first of several strings to be completed.

    The answer depends on the text alone, never on how it was cut into pieces: the match is the one
    that ends first.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        # A match that is not yet complete can lie in these last characters only.
        self._keep = max((len(stop) for stop in self._stops), default=1) - 1
        self._tail = ""

    def feed(self, piece: str) -> int | None:
        """Take the next piece of output.

        Returns:
            How many characters of `piece` belong to the output, the stop string included, when
            one is completed in it; None while none is.
        """
        if not self._stops or not piece:
            return None
        window = self._tail + piece
        ends = [end for end in map(lambda stop: _end(window, stop), self._stops) if end is not None]
        if ends:
            return min(ends) - len(self._tail)
        self._tail = window[max(0, len(window) - self._keep) :]
        return None


def _end(text: str, stop: str) -> int | None:
    start = text.find(stop)
    return None if start < 0 else start + len(stop)
