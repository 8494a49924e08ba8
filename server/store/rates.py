"""Limits on what a key may use in a time, as text: `60 per 1 minute`. Counts nothing."""

from __future__ import annotations

import limits

from server.errors import KeyInvalid

# A moving window holds one entry a request.
MAX_REQUESTS = 100_000
MAX_TOKENS = 10**12


def checked_limit(field: str, text: str, most: int) -> str:
    """Normalise a limit to the notation of `limits`, such as "60 per 1 minute".

    Raises:
        KeyInvalid: it is none, several, or of more than `most`.
    """
    expected = f"a number from 1 to {most} and a time, such as 60/minute or 1000/2hour"
    try:
        found = limits.parse_many(text)
    except ValueError:
        found = []
    if len(found) != 1 or not 1 <= found[0].amount <= most or found[0].get_expiry() < 1:
        came = ascii(text)[1:-1][:80]
        raise KeyInvalid(
            f"{field}: expected {expected}; came {came!r}",
            field=field,
            expected=expected,
            came=came,
        )
    return repr(found[0])
