"""Reads and validates untrusted training rows: inline, JSON lines or CSV.

A row is a flat object: column name -> text, number or boolean. Errors name the row, counted from 1. A
file is read line by line, and at most the limit of each line, which bounds memory for oversized lines.
Cells that look like formulas are plain text. Independent of templates and tokens.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from adapters.checkpoint.limits import MIB
from adapters.errors import DataInvalid
from adapters.strict_json import StrictJsonError, parse_object
from adapters.template import Row

Kind = Literal["jsonl", "csv"]

_BOM = b"\xef\xbb\xbf"
_MAX_INT = 2**63 - 1
# Lists and objects as values are refused by type; the parser accepts this depth to report the type.
_DEPTH = 8
_SHOWN = 80
_SUFFIXES: dict[str, Kind] = {".jsonl": "jsonl", ".csv": "csv"}


@dataclass(frozen=True)
class DataLimits:
    """Upper bounds of one data set, all inclusive.

    Attributes:
        max_rows: rows.
        max_bytes: UTF-8 bytes in total: of the file, or of the names and texts of inline rows.
        max_line_bytes: bytes of one line of JSON, or of one record of CSV.
        max_columns: distinct columns over all rows.
        max_values: values over all rows; a short value takes many times its bytes in memory.
    """

    max_rows: int = 100_000
    max_bytes: int = 64 * MIB
    max_line_bytes: int = 1 * MIB
    max_columns: int = 1_000
    max_values: int = 2_000_000


DEFAULT_DATA_LIMITS = DataLimits()


def kind_of(name: str) -> Kind | None:
    """The file kind for a name's extension; None for an unknown extension."""
    return _SUFFIXES.get(Path(name).suffix.lower())


def check_rows(
    rows: Iterable[Mapping[str, Any]], limits: DataLimits = DEFAULT_DATA_LIMITS
) -> list[Row]:
    """Validate inline rows.

    Raises:
        DataInvalid: no rows or too many, a value that is not text, number or boolean, or a column
            that mixes value types.
    """
    checker = _Checker(limits)
    return checker.all(_Source(row, f"row {number}") for number, row in enumerate(rows, start=1))


def read_rows(path: Path, kind: Kind, limits: DataLimits = DEFAULT_DATA_LIMITS) -> list[Row]:
    """Read a file of rows.

    JSON lines hold one object a line; blank lines are skipped. CSV is comma-separated with a header
    row, quoted by double quotation marks; every value is text. Both are UTF-8, with or without a
    byte order mark.

    Raises:
        DataInvalid: as `check_rows`, and for invalid UTF-8, JSON or CSV, or an oversized file or
            line; the message also names the line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        lines = _Lines(file, limits)
        sources = _json_rows(lines) if kind == "jsonl" else _csv_rows(lines, limits)
        return _Checker(limits).all(sources)


def read_objects(
    path: Path, max_depth: int, limits: DataLimits = DEFAULT_DATA_LIMITS
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read JSON lines whose values may be nested: the number of each line, and its object.

    Args:
        path: the file.
        max_depth: nesting of one line, its object being 1.
        limits: limits on rows, bytes and lines.

    Raises:
        DataInvalid: as `read_rows` for the file and its lines; values are not checked.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        lines = _Lines(file, limits)
        for source in _json_rows(lines, max_depth):
            _check_count(lines.row, limits)
            yield lines.number, source.row


# --- values ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """An unchecked row and its name in error messages."""

    row: Any
    place: str


class _Checker:
    """Checks rows against the limits, and that every column has one value type."""

    def __init__(self, limits: DataLimits) -> None:
        self._limits = limits
        self._kinds: dict[str, tuple[str, str]] = {}  # column -> kind, and the row that set it
        self._names: dict[str, str] = {}
        self._bytes = 0
        self._num_values = 0

    def all(self, sources: Iterable[_Source]) -> list[Row]:
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

    def _row(self, source: _Source, number: int) -> Row:
        row = source.row
        if not isinstance(row, Mapping):
            raise _refused(source.place, number, "an object of columns", _kind_of_value(row))
        for name, value in row.items():
            self._check(name, value, source.place, number)
        self._num_values += len(row)
        self._check_totals(source.place, number)
        # Intern column names: one object per name instead of one per row.
        return {self._names[name]: value for name, value in row.items()}

    def _check_totals(self, place: str, number: int) -> None:
        limits = self._limits
        if self._bytes > limits.max_bytes:
            raise _too_much(place, number, limits)
        if self._num_values > limits.max_values:
            raise _refused(place, number, f"at most {limits.max_values} values in all rows", "more")

    def _check(self, name: object, value: object, place: str, number: int) -> None:
        if not isinstance(name, str) or not name.strip():
            raise _refused(place, number, "a column name", repr(name)[:_SHOWN])
        self._bytes += _encoded(name, place, number, name) + _encoded(value, place, number, name)
        kind = _kind_of_value(value)
        if kind not in ("a text", "a number", "a boolean"):
            expected = "a text, a number or a boolean"
            raise _refused(place, number, expected, kind, column=name)
        self._names.setdefault(name, name)
        if len(self._names) > self._limits.max_columns:
            expected = f"at most {self._limits.max_columns} columns in all rows"
            raise _refused(place, number, expected, "more")
        first, first_place = self._kinds.setdefault(name, (kind, place))
        if kind != first:
            raise DataInvalid(
                f"{place}: mixed types in column {_quoted(name)}: {kind} came, "
                f"but {first_place} has {first}",
                row=number,
                field=name,
                expected=first,
                came=kind,
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
        raise _refused(
            place, number, "text", "half a surrogate pair", column=ascii(column)
        ) from None


# --- files -----------------------------------------------------------------------------------


class _Lines:
    """The lines of a file, bounded, decoded, counted from 1.

    Attributes:
        number: number of the last line read.
        row: row number for error messages; set by the row reader.
    """

    def __init__(self, file: BinaryIO, limits: DataLimits) -> None:
        self._file = file
        self._limits = limits
        self._bytes = 0
        self.number = 0
        self.row = 1

    @property
    def place(self) -> str:
        return f"row {self.row} (line {self.number})"

    def bytes(self) -> Iterator[bytes]:
        """Lines with their terminators, without the byte order mark."""
        most = self._limits.max_line_bytes
        while line := self._file.readline(most + 1):
            self.number += 1
            if len(line) > most:
                raise _refused(
                    self.place,
                    self.row,
                    f"at most {most} bytes",
                    f"a line of more than {most} bytes",
                )
            self._bytes += len(line)
            if self._bytes > self._limits.max_bytes:
                raise _too_much(self.place, self.row, self._limits)
            if self.number == 1:
                line = line.removeprefix(_BOM)
            yield line

    def text(self) -> Iterator[str]:
        """Decoded lines. NUL is refused: it indicates UTF-16 or a binary file."""
        for line in self.bytes():
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                came = f"byte {error.start + 1} of the line is not"
                raise _refused(self.place, self.row, "UTF-8", came) from error
            if "\0" in text:
                raise _refused(self.place, self.row, "text in UTF-8", "a NUL character")
            yield text


def _json_rows(lines: _Lines, max_depth: int = _DEPTH) -> Iterator[_Source]:
    for line in lines.bytes():
        if not line.strip():
            continue
        try:
            row = parse_object(line, max_depth)
        except StrictJsonError as error:
            reason = str(error).replace("(line 1, column", "(column")
            raise DataInvalid(
                f"{lines.place}: {reason}",
                row=lines.row,
                field="data",
                expected="one JSON object a line, in UTF-8",
                came=reason,
            ) from error
        yield _Source(row, lines.place)
        lines.row += 1


def _csv_rows(lines: _Lines, limits: DataLimits) -> Iterator[_Source]:
    records = _csv_records(lines, limits)
    header = next(records, None)
    if header is None:
        return
    _check_header(header)
    for record in records:
        if len(record) != len(header):
            expected = f"{len(header)} cells, as in the header"
            raise _refused(lines.place, lines.row, expected, f"{len(record)}")
        yield _Source(dict(zip(header, record, strict=True)), lines.place)
        lines.row += 1


def _csv_records(lines: _Lines, limits: DataLimits) -> Iterator[list[str]]:
    """Non-blank records. The line limit applies to a whole record, even if it spans several lines."""
    budget = limits.max_line_bytes
    left = budget

    def bounded() -> Iterator[str]:
        nonlocal left
        for text in lines.text():
            left -= len(text)
            if left < 0:
                came = "more; is a quotation mark left open?"
                raise _refused(lines.place, lines.row, f"a record of at most {budget} bytes", came)
            yield text

    reader = csv.reader(bounded(), strict=True)
    while True:
        left = budget
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _refused(lines.place, lines.row, "CSV", _csv_fault(error)) from error
        if record:
            yield record


def _csv_fault(error: csv.Error) -> str:
    fault = str(error)
    if "unexpected end of data" in fault:
        return "a quotation mark that is never closed"
    if "new-line character" in fault:
        return "a carriage return without a line feed"
    if "field limit" in fault:
        return f"a cell of more than {csv.field_size_limit()} characters"
    return fault


def _check_header(header: list[str]) -> None:
    for index, name in enumerate(header, start=1):
        if not name.strip():
            raise DataInvalid(
                f"the header's column {index} has no name (pandas writes one for its index: "
                "use index=False)",
                field="data",
                expected="a name for every column",
                came=repr(name),
            )
        if name in header[: index - 1]:
            raise DataInvalid(
                f"the header names the column {_quoted(name)} twice",
                field=name[:_SHOWN],
                expected="different names",
                came=_quoted(name),
            )


# --- refusals --------------------------------------------------------------------------------


def _refused(
    place: str, number: int, expected: str, came: str, column: str | None = None
) -> DataInvalid:
    where = place if column is None else f"{place}, column {_quoted(column)}"
    return DataInvalid(
        f"{where}: expected {expected}, came {came}",
        row=number,
        field=column,
        expected=expected,
        came=came,
    )


def _too_much(place: str, number: int, limits: DataLimits) -> DataInvalid:
    return _refused(place, number, f"at most {limits.max_bytes} bytes of data", "more")


def _quoted(text: str) -> str:
    return repr(text[:_SHOWN])
