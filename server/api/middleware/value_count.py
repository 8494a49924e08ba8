"""How much there is to read in a JSON body, counted while it arrives. Knows no schema."""

from __future__ import annotations

from server.errors import BodyTooLarge

# What a field, a list or an object counts.
_COSTLY = 4


class ValueCount:
    """Counts what a JSON body is made of, while it arrives.

    Python reads JSON in one go, while everybody waits: eight megabytes of text take a hundredth of
    the time that eight megabytes of empty lists take. So commas are counted before; and four times
    what makes a field, a list or an object: colons and opening brackets. Those in texts are left out.

    Args:
        most: of what is counted.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._number = 0
        self._in_text = False
        # A backslash at the end of what came: it says what the next character means.
        self._held = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            BodyTooLarge: there were too many.
        """
        data = self._held + data
        kept = len(data) - (len(data) - len(data.rstrip(b"\\"))) % 2
        self._held, data = data[kept:], data[:kept]
        pieces = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        for piece in pieces[self._in_text :: 2]:
            costly = piece.count(b":") + piece.count(b"[") + piece.count(b"{")
            self._number += piece.count(b",") + _COSTLY * costly
        self._in_text ^= len(pieces) % 2 == 0
        if self._number > self._most:
            expected = f"at most {self._most} values, a field, list or object counting {_COSTLY}"
            raise BodyTooLarge(
                f"body: expected {expected}; came more",
                field="body",
                expected=expected,
                came="more",
            )
