"""What readers of row files share: limits, lines, facts about a file, and how a row is refused.

Lines are bounded and decoded here. Independent of JSON and CSV, which `json_rows` and `csv_rows` read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from adapters.checkpoint.limits import MIB
from adapters.errors import DataInvalid
from adapters.training.file_bytes import HEAD_BYTES, UTF8_BOM, LineSource, name_encoding

SHOWN = 80
# Names that a message lists at most.
MAX_LISTED = 20
# Lines for each row that a file may have: bounds the time that blank lines take.
_LINES_PER_ROW = 50


@dataclass(frozen=True)
class DataLimits:
    """Upper bounds of one data set, all inclusive.

    Attributes:
        max_rows: rows.
        max_bytes: bytes in total: of the file, or of the names and texts of inline rows.
        max_line_bytes: bytes of one line of JSON, of one row of a document, or of one record of CSV.
        max_columns: distinct columns over all rows, of those that are read.
        max_values: values over all rows; a short value takes many times its bytes in memory.
    """

    max_rows: int = 100_000
    max_bytes: int = 64 * MIB
    max_line_bytes: int = 1 * MIB
    max_columns: int = 1_000
    max_values: int = 2_000_000


DEFAULT_DATA_LIMITS = DataLimits()


@dataclass(frozen=True)
class Used:
    """The columns that a job names.

    Attributes:
        required: columns that every row must have.
        optional: columns that a row may lack.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.required, *self.optional)


@dataclass
class FileFacts:
    """What was understood of a file.

    Attributes:
        layout: "JSON lines", "JSON array", "JSON objects" or "CSV".
        encoding: such as "UTF-8".
        separator: of CSV: the word for it, such as "tab"; else None.
        columns: of CSV: the header's names; of JSON: those of the first row.
        notes: what a reader might not expect, a sentence each; grows while rows are read.
    """

    layout: str
    encoding: str
    separator: str | None = None
    columns: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def header_hint(self) -> str:
        """A sentence for columns that are not known, after a space; "" where there is no header."""
        if self.layout != "CSV":
            return ""
        return (
            ". The first line was read as the names of the columns; if it is data, put a line with the "
            "names before it"
        )


@dataclass(frozen=True)
class Source:
    """An unchecked row and its name in error messages."""

    row: Any
    place: str


# --- lines -----------------------------------------------------------------------------------


class Lines:
    """The lines of a file, bounded, decoded, counted from 1.

    Attributes:
        number: number of the last line read.
        row: row number for error messages; set by the row reader.
        in_header: whether the lines are a header's, which is no row; set by the row reader.
    """

    def __init__(self, source: LineSource, limits: DataLimits) -> None:
        self._source = source
        self._limits = limits
        self._bytes = 0
        self._has_utf8 = False
        self.number = 0
        self.row = 1
        self.in_header = False

    @property
    def place(self) -> str:
        """The current row and line."""
        if self.in_header:
            return f"line {self.number}, the header"
        return f"row {self.row} (line {self.number})"

    def text(self, *, allow_nul: bool = False) -> Iterator[str]:
        """Decoded lines with their terminators, without the byte order mark.

        NUL is refused unless the caller refuses it with better words: it indicates a binary file.
        """
        most = self._limits.max_line_bytes
        max_lines = _LINES_PER_ROW * (self._limits.max_rows + 1)
        while line := self._read(most + 1):
            self.number += 1
            if self.number > max_lines:
                raise refused(self.place, self.row, f"at most {max_lines} lines", "more")
            if len(line) > most:
                came = f"a line of more than {most} bytes"
                raise refused(self.place, self.row, f"at most {most} bytes", came)
            text = self._decode(line)
            if "\0" in text and not allow_nul:
                raise self._foreign(line, "text in UTF-8", "a NUL character")
            yield text

    def rest(self, before: str) -> str:
        """`before` and everything after it, as one text.

        Raises:
            DataInvalid: more than the limit, or no UTF-8.
        """
        parts = [before]
        while line := self._read(self._limits.max_bytes + 1):
            self.number += 1  # the whole document: its rows are bounded one by one
            parts.append(self._decode(line))
        return "".join(parts)

    def _read(self, size: int) -> bytes:
        try:
            line = self._source.readline(size)
        except UnicodeDecodeError as error:
            self.number += 1
            came = "bytes that are none"
            raise refused(
                self.place, self.row, "UTF-16, as its byte order mark says", came
            ) from error
        self._bytes += len(line)
        if self._bytes > self._limits.max_bytes:
            self.number += 1
            raise too_much(self.place, self.row, self._limits)
        return line.removeprefix(UTF8_BOM) if self.number == 0 else line

    def _decode(self, line: bytes) -> str:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            came = f"a byte that is not (byte {error.start + 1} of the line)"
            raise self._foreign(line, "UTF-8", came) from error
        self._has_utf8 = self._has_utf8 or not text.isascii()
        return text

    def _foreign(self, line: bytes, expected: str, came: str) -> DataInvalid:
        """A refusal that names the encoding if it can be recognised."""
        sample = line[:HEAD_BYTES]
        if not self._has_utf8:
            sample += self._source.readline(HEAD_BYTES)
            if (named := name_encoding(sample)) is not None:
                name, iconv = named
                came += (
                    f"; the file looks like {name}: convert it with "
                    f"iconv -f {iconv} -t utf-8 FILE > NEW"
                )
        return refused(self.place, self.row, expected, came)


# --- refusals --------------------------------------------------------------------------------


def refused(
    place: str, number: int, expected: str, came: str, column: str | None = None
) -> DataInvalid:
    """A refusal of one row."""
    where = place if column is None else f"{place}, column {quoted(column)}"
    return DataInvalid(
        f"{where}: expected {expected}, came {came}",
        row=number,
        field=column,
        expected=expected,
        came=came,
    )


def too_much(place: str, number: int, limits: DataLimits) -> DataInvalid:
    """A refusal of data beyond the limit of bytes."""
    return refused(place, number, f"at most {limits.max_bytes} bytes of data", "more")


def quoted(text: str) -> str:
    """The beginning of a text, in quotation marks."""
    return repr(text[:SHOWN])
