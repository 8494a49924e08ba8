"""Strict JSON parsing for untrusted input: unambiguous, with bounded resources.

Python's own parser accepts NaN, repeated keys (the last one wins), numbers of any size, and nesting up to
a stack overflow. `parse_object` refuses all of them. Independent of configs and headers; errors are
raised as `StrictJsonError`, which the caller converts to its own error type.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

# Possessive, and an unclosed string matches too: otherwise a document of escaped quotes would be
# scanned once for each quote.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
# Longer integers never fit, so int(), which takes quadratic time, is not called.
_MAX_NUMBER_CHARS = 64
_MAX_INT = 2**63 - 1


class StrictJsonError(ValueError):
    """The document is not acceptable; the message gives the position."""


def parse_object(data: bytes, max_depth: int, *, allow_nan: bool = False) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: UTF-8 without a byte order mark; the caller has bounded its size.
        max_depth: nesting allowed, the outermost object being 1.
        allow_nan: take NaN and the infinities, which pandas writes for cells without a value.

    Raises:
        StrictJsonError: not UTF-8, not JSON, not an object, nested too deeply, a key given twice,
            NaN or infinity, an integer beyond 64 bits, or half a surrogate pair in a string.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise StrictJsonError("it starts with a byte order mark; save it as plain UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"it is not UTF-8 (byte {error.start})") from error
    _check_depth(text, max_depth)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=float if allow_nan else _no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except json.JSONDecodeError as error:
        raise StrictJsonError(
            f"it is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from error
    if not isinstance(value, dict):
        raise StrictJsonError(f"an object {{...}} was expected, {_kind(value)} came")
    _check_surrogates(text, value)
    return value


def _check_depth(text: str, max_depth: int) -> None:
    """Count brackets outside strings, so that the recursive parser never sees a deep document."""
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > max_depth:
            raise StrictJsonError(f"it is nested more than {max_depth} levels deep")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise StrictJsonError(f"the key {key[:80]!r} is given twice")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise StrictJsonError(f"{name} is not a JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_NUMBER_CHARS or abs(value := int(digits)) > _MAX_INT:
        raise StrictJsonError(f"the number {digits[:24]}... does not fit 64 bits")
    return value


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise StrictJsonError(f"the number {digits[:24]} is too large")
    return value


def _check_surrogates(text: str, value: dict[str, Any]) -> None:
    # A lone surrogate can only come from an escape: raw ones are not valid UTF-8.
    if "\\u" not in text and "\\U" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise StrictJsonError("a string holds half a surrogate pair") from error


def _kind(value: object) -> str:
    return {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )
