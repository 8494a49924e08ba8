"""Reads rows from CSV: separated by commas, semicolons, tabs or vertical bars, with a header.

Every value is text. Quotation marks enclose cells as in RFC 4180, unless a tab-separated file shows that
they are text in it. Values are not looked at.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.errors import DataInvalid
from adapters.training.file_bytes import head_text, line_source
from adapters.training.row_source import (
    MAX_LISTED,
    SHOWN,
    DataLimits,
    FileFacts,
    Lines,
    Source,
    Used,
    quoted,
    refused,
)

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_SNIFFED_RECORDS = 20
_MAX_COMPARED = 1000
_MAX_NEAR = 4
_SEP_LINE = re.compile(r'"?sep=([,;:|\t])"?\r?\n', re.IGNORECASE)


@dataclass(frozen=True)
class _Dialect:
    separator: str
    has_sep_line: bool = False
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL


@dataclass(frozen=True)
class _Header:
    """The columns of a CSV file: for every cell the column's name, None for one that is not read."""

    names: tuple[str | None, ...]


def csv_rows(
    path: Path,
    lines: Lines,
    limits: DataLimits,
    used: Used | None,
    facts: FileFacts,
    head: bytes,
) -> Iterator[Source]:
    """The rows of a CSV file; fills in `facts` with the first of them.

    Args:
        path: the file, which a tab-separated one is read from a second time.
        lines: its lines, at the start.
        limits: limits on records.
        used: the columns that will be read, if they are known.
        facts: what is understood.
        head: the first bytes of the file.

    Raises:
        DataInvalid: no CSV, a record with another number of cells than the header, or no column of a
            name that is used.
    """
    dialect = _dialect(head_text(head), used)
    if dialect.separator == "\t" and _has_plain_quotes(path, head, limits):
        dialect = _Dialect("\t", dialect.has_sep_line, csv.QUOTE_NONE)
        facts.notes.append("quotation marks are read as text: they do not enclose whole cells")
    records = _csv_records(lines, limits, dialect)
    lines.in_header = True
    first = next(records, None)
    lines.in_header = False
    if first is None:
        return
    header = _header(first, dialect, used, facts)
    width = len(header.names)
    facts.separator = SEPARATORS.get(dialect.separator, repr(dialect.separator))
    facts.columns = tuple(name for name in header.names if name is not None)
    for record in records:
        if len(record) > width and not any(cell.strip() for cell in record[width:]):
            record = record[:width]
        if len(record) != width:
            raise _wrong_width(record, width, dialect, lines)
        row = {
            name: cell for name, cell in zip(header.names, record, strict=True) if name is not None
        }
        yield Source(row, lines.place)
        lines.row += 1


def _dialect(sample: str, used: Used | None) -> _Dialect:
    """The separator: that which gives the columns that are used, or else even rows."""
    said = _SEP_LINE.match(sample)
    if said:
        return _Dialect(said[1], has_sep_line=True)
    wanted = set(used.names) if used is not None else set()

    def worth(separator: str) -> tuple[int, bool, bool, int]:
        records = _sniffed(sample, separator)
        header = [cell.strip() for cell in records[0]] if records else []
        is_even = len({len(record) for record in records}) == 1
        return len(wanted & {*header}), is_even and len(header) > 1, len(header) > 1, len(header)

    # The first of equals: comma before the others.
    return _Dialect(max(SEPARATORS, key=worth))


def _sniffed(sample: str, separator: str) -> list[list[str]]:
    """The first records of a sample; the last one of it may be cut and is left out."""
    reader = csv.reader(io.StringIO(sample, newline=""), delimiter=separator)
    records: list[list[str]] = []
    try:
        for record in reader:
            if record:
                records.append(record)
            if len(records) > _SNIFFED_RECORDS:
                break
    except csv.Error:
        pass
    is_cut = len(records) > 1 and (len(records) > _SNIFFED_RECORDS or not sample.endswith("\n"))
    return records[:-1] if is_cut and len(records) > 2 else records


def _has_plain_quotes(path: Path, head: bytes, limits: DataLimits) -> bool:
    """Whether a tab-separated file has quotation marks that are text.

    So where lines have the same number of cells without regard to quotation marks, and some cell
    begins with one that does not enclose it.
    """
    found = False
    width = None
    with path.open("rb") as file:
        source, _ = line_source(file, head)
        lines = Lines(source, limits)
        lines.in_header = True
        for line in lines.text(allow_nul=True):
            lines.in_header = False
            cells = line.rstrip("\r\n").split("\t")
            if cells == [""]:
                continue
            if width is None:
                width = len(cells)
            else:
                lines.row += 1
            if len(cells) != width:
                return False
            found = found or any(map(_is_open, cells))
    return found


def _is_open(cell: str) -> bool:
    """Whether a cell begins with a quotation mark that does not enclose it."""
    if not cell.startswith('"'):
        return False
    inner = cell[1:-1]
    return len(cell) < 2 or not cell.endswith('"') or '"' in inner.replace('""', "")


def _csv_records(lines: Lines, limits: DataLimits, dialect: _Dialect) -> Iterator[list[str]]:
    """Non-blank records. The line limit applies to a whole record, even if it spans several lines."""
    budget = limits.max_line_bytes
    left = budget

    def bounded() -> Iterator[str]:
        nonlocal left
        for text in lines.text():
            if dialect.has_sep_line and lines.number == 1:
                continue
            left -= len(text)
            if left < 0:
                came = "more; is a quotation mark left open?"
                raise refused(lines.place, lines.row, f"a record of at most {budget} bytes", came)
            yield text

    reader = csv.reader(
        bounded(), delimiter=dialect.separator, quoting=dialect.quoting, strict=True
    )
    while True:
        left = budget
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise refused(lines.place, lines.row, "CSV", _csv_fault(error)) from error
        if record:
            yield record


def _csv_fault(error: csv.Error) -> str:
    fault = str(error)
    if "unexpected end of data" in fault:
        return "a quotation mark that is never closed"
    if "expected after" in fault:
        return (
            "text after a quotation mark that closes a cell (a quotation mark within a cell is written "
            "twice)"
        )
    if "new-line character" in fault:
        return "a carriage return without a line feed (tr '\\r' '\\n' < FILE > NEW makes lines)"
    if "field limit" in fault:
        return f"a cell of more than {csv.field_size_limit()} characters"
    return fault


def _header(cells: list[str], dialect: _Dialect, used: Used | None, facts: FileFacts) -> _Header:
    """The columns that a header names; those that have no name or one that came before are not read.

    Raises:
        DataInvalid: a column that is used is missing or named twice.
    """
    wanted = used.names if used is not None else ()
    stripped = {cell.strip() for cell in cells}
    names: list[str | None] = []
    seen: set[str] = set()
    for index, cell in enumerate(cells, start=1):
        name = cell.strip() if cell not in wanted and cell.strip() in wanted else cell
        if not name.strip():
            names.append(None)
            if len(facts.notes) < MAX_LISTED:
                facts.notes.append(f"column {index} has no name and is not read")
            continue
        if name in seen:
            if name in wanted or used is None:
                raise DataInvalid(
                    f"the header names the column {quoted(name)} twice",
                    field=name[:SHOWN],
                    expected="different names",
                    came=quoted(name),
                )
            names.append(None)
            continue
        seen.add(name)
        names.append(name)
    if used is not None and not {*used.required} <= stripped | {*cells}:
        raise _no_such_header(cells, dialect, used)
    suspects = [name for name in wanted if name in seen and _is_number(name)]
    if suspects:
        facts.notes.append(
            f"the first line is read as the header, and names a column {quoted(suspects[0])}; if it is "
            "data, put a line with the names of the columns before it"
        )
    return _Header(tuple(names))


def _no_such_header(cells: list[str], dialect: _Dialect, used: Used) -> DataInvalid:
    listed = ", ".join(quoted(cell) for cell in cells[:MAX_LISTED])
    stripped = {cell.strip() for cell in cells}
    missing = [name for name in used.required if name not in stripped and name not in cells]
    near = [found for name in missing[:_MAX_NEAR] if (found := _near(name, cells)) is not None]
    if near:
        hint = f"; did you mean {' and '.join(map(repr, dict.fromkeys(near)))}?"
    elif len(missing) < len(used.required):
        hint = ""
    else:
        header = dialect.separator.join(used.required).replace("\t", "<TAB>")
        separator = SEPARATORS.get(dialect.separator, repr(dialect.separator))
        line = (
            f"put a line with the names before it, {header[:SHOWN]!r}, separated by a {separator}"
        )
        looks = ". It looks like data: " if _looks_like_data(cells) else ". If it is data, "
        hint = looks + line
    wanted = ", ".join(map(quoted, missing))
    return DataInvalid(
        f"the first line names the columns: {listed}; there is no column {wanted}{hint}",
        field="data",
        expected=f"a header with {wanted}",
        came=listed,
    )


def _near(name: str, cells: list[str]) -> str | None:
    """The cell of a header that is most like a name, whatever the case of its letters."""
    shown = {
        cell.strip()[:SHOWN].casefold(): cell.strip()[:SHOWN] for cell in cells[:_MAX_COMPARED]
    }
    near = difflib.get_close_matches(name[:SHOWN].casefold(), shown, n=1)
    return shown[near[0]] if near else None


def _looks_like_data(cells: Collection[str]) -> bool:
    return any(_is_number(cell) or len(cell) > SHOWN for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _wrong_width(record: list[str], width: int, dialect: _Dialect, lines: Lines) -> DataInvalid:
    name = SEPARATORS.get(dialect.separator, "separator")
    hint = ""
    if len(record) > width:
        hint = f" (a cell with a {name} in it is written between quotation marks)"
    expected = f"{width} cells, as in the header"
    return refused(lines.place, lines.row, expected, f"{len(record)}{hint}")
