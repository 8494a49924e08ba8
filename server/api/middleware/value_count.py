"""Counts the values of a JSON body while it arrives. Independent of schemas."""

from __future__ import annotations

from server.errors import BodyTooLarge

# Weight of a field, a list or an object.
_COSTLY = 4


class ValueCount:
    """Counts the values of a JSON body while it arrives.

    Python parses JSON in one call, which blocks all other requests: eight megabytes of empty lists take
    a hundred times as long as eight megabytes of text. Commas count one; colons and opening brackets,
    which make a field, a list or an object, count four. Those inside strings do not count.

    Args:
        most: maximum count.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._number = 0
        self._in_text = False
        # A backslash at the end of a chunk: it escapes the first character of the next.
        self._held = b""

    def feed(self, data: bytes) -> None:
        """Count the next bytes.

        Raises:
            BodyTooLarge: the maximum was exceeded.
        """
        data = self._held + data
        end = len(data) - (len(data) - len(data.rstrip(b"\\"))) % 2
        self._held, data = data[end:], data[:end]
        parts = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        for part in parts[self._in_text :: 2]:
            costly = part.count(b":") + part.count(b"[") + part.count(b"{")
            self._number += part.count(b",") + _COSTLY * costly
        self._in_text ^= len(parts) % 2 == 0
        if self._number > self._most:
            expected = f"at most {self._most} values, a field, list or object counting {_COSTLY}"
            raise BodyTooLarge(
                f"body: expected {expected}; came more",
                field="body",
                expected=expected,
                came="more",
            )
