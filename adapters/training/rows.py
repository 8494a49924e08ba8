"""Validates untrusted training rows: inline, or read from a file by `adapters.training.row_files`.

A row is a flat object: column name -> text, number or boolean. Only the columns that a job names are read:
others may hold anything and are left out. A cell without a value (null, NaN) is the empty text. Errors name
the row, counted from 1. Cells that look like formulas are plain text. Independent of templates and tokens.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapters.errors import DataInvalid
from adapters.template import Row
from adapters.training.row_files import open_rows
from adapters.training.row_source import (
    DEFAULT_DATA_LIMITS,
    MAX_LISTED,
    SHOWN,
    DataLimits,
    FileFacts,
    Source,
    Used,
    quoted,
    refused,
    too_much,
)

__all__ = [
    "DEFAULT_DATA_LIMITS",
    "DataLimits",
    "FileFacts",
    "Source",
    "Used",
    "check_rows",
    "check_sources",
    "inline_sources",
    "open_rows",
    "read_rows",
]

_MAX_INT = 2**63 - 1


def check_rows(
    rows: Iterable[Mapping[str, Any]],
    limits: DataLimits = DEFAULT_DATA_LIMITS,
    used: Used | None = None,
) -> list[Row]:
    """Validate inline rows.

    Args:
        rows: the rows.
        limits: limits on rows, bytes, columns and values.
        used: the columns to read; None reads all.

    Raises:
        DataInvalid: no rows or too many, a value that is not text, number, boolean or null, or a column
            that mixes value types.
    """
    return check_sources(inline_sources(rows), limits, used)


def inline_sources(rows: Iterable[Any]) -> Iterable[Source]:
    """Inline rows, with the name of each in messages."""
    return (Source(row, f"row {number}") for number, row in enumerate(rows, start=1))


def check_sources(
    sources: Iterable[Source], limits: DataLimits = DEFAULT_DATA_LIMITS, used: Used | None = None
) -> list[Row]:
    """Validate the rows of a file, see `check_rows`."""
    return _Checker(limits, used).all(sources)


def read_rows(
    path: Path, limits: DataLimits = DEFAULT_DATA_LIMITS, used: Used | None = None
) -> list[Row]:
    """Read a file of rows, whatever its name, see `row_files.open_rows`.

    Raises:
        UnsupportedFile: the file is no text.
        DataInvalid: as `check_rows`, and for an encoding that is not read, invalid JSON or CSV, or an
            oversized file or line; the message also names the line.
        OSError: the file cannot be read.
    """
    with open_rows(path, limits, used) as file:
        return check_sources(file.sources, limits, used)


# --- values ----------------------------------------------------------------------------------


class _Checker:
    """Checks rows against the limits, and that every column has one value type."""

    def __init__(self, limits: DataLimits, used: Used | None) -> None:
        self._limits = limits
        self._used = None if used is None else frozenset(used.names)
        self._required = () if used is None else used.required
        self._kinds: dict[str, tuple[str, str]] = {}  # column -> kind, and the row that set it
        self._names: dict[str, str] = {}
        self._bytes = 0
        self._num_values = 0

    def all(self, sources: Iterable[Source]) -> list[Row]:
        rows: list[Row] = []
        for number, source in enumerate(sources, start=1):
            _check_count(number, self._limits)
            rows.append(self._row(source, number))
        if not rows:
            raise DataInvalid(
                "there are no rows: expected at least one",
                field="rows",
                expected="at least one row",
                came="none",
            )
        return rows

    def _row(self, source: Source, number: int) -> Row:
        row = source.row
        if not isinstance(row, Mapping):
            raise refused(source.place, number, "an object of columns", _kind_of_value(row))
        for name in self._required:
            if name not in row:
                raise _missing(name, row, source.place, number)
        if self._used is not None:
            row = {name: value for name, value in row.items() if name in self._used}
        for name, value in row.items():
            self._check(name, value, source.place, number)
        self._num_values += len(row)
        self._check_totals(source.place, number)
        # Intern column names: one object per name instead of one per row.
        return {
            self._names[name]: "" if _is_missing(value) else value for name, value in row.items()
        }

    def _check_totals(self, place: str, number: int) -> None:
        limits = self._limits
        if self._bytes > limits.max_bytes:
            raise too_much(place, number, limits)
        if self._num_values > limits.max_values:
            raise refused(place, number, f"at most {limits.max_values} values in all rows", "more")

    def _check(self, name: object, value: object, place: str, number: int) -> None:
        if not isinstance(name, str) or not name.strip():
            raise refused(place, number, "a column name", repr(name)[:SHOWN])
        self._bytes += _encoded(name, place, number, name) + _encoded(value, place, number, name)
        self._names.setdefault(name, name)
        kind = _kind_of_value(value)
        if not _is_missing(value) and kind not in ("a text", "a number", "a boolean"):
            expected = "a text, a number or a boolean"
            raise refused(place, number, expected, kind, column=name)
        if len(self._names) > self._limits.max_columns:
            expected = f"at most {self._limits.max_columns} columns in all rows"
            raise refused(place, number, expected, "more")
        if _is_missing(value):
            return
        first, first_place = self._kinds.setdefault(name, (kind, place))
        if kind != first:
            raise DataInvalid(
                f"{place}: mixed types in column {quoted(name)}: {kind} came, "
                f"but {first_place} has {first}",
                row=number,
                field=name,
                expected=first,
                came=kind,
            )


def _missing(column: str, row: Mapping[object, Any], place: str, number: int) -> DataInvalid:
    names = [name[:SHOWN] for name in itertools.islice(row, MAX_LISTED) if isinstance(name, str)]
    listed = ", ".join(map(repr, names)) or "none"
    near = difflib.get_close_matches(column[:SHOWN], names, n=1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return DataInvalid(
        f"{place}: the column {quoted(column)} is missing; the row has {listed}{hint}",
        row=number,
        field=column,
        expected=f"a column {quoted(column)}",
        came=listed,
    )


def _check_count(number: int, limits: DataLimits) -> None:
    if number > limits.max_rows:
        raise DataInvalid(
            f"there are more than {limits.max_rows} rows",
            row=number,
            field="rows",
            expected=f"at most {limits.max_rows} rows",
            came="more",
        )


def _is_missing(value: object) -> bool:
    """Whether a cell has no value: null, or the NaN that pandas writes."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind_of_value(value: object) -> str:
    """Name of a value's type; numbers outside JSON or 64 bits have names of their own."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "a number" if abs(value) <= _MAX_INT else "a number beyond 64 bits"
    if isinstance(value, float):
        return "a number" if math.isfinite(value) else "NaN or infinity"
    if isinstance(value, str):
        return "a text"
    return _KINDS.get(type(value), f"a {type(value).__name__}")


_KINDS: dict[type, str] = {
    type(None): "null",
    list: "a list",
    dict: "an object",
}


def _encoded(value: object, place: str, number: int, column: str) -> int:
    """UTF-8 bytes of a text; other values count as 8."""
    if not isinstance(value, str):
        return 8
    try:
        return len(value.encode())
    except UnicodeEncodeError:
        raise refused(
            place, number, "text", "half a surrogate pair", column=ascii(column)
        ) from None
