"""Opens a file of rows by its content: JSON lines, JSON documents, or CSV with any usual separator.

The file's name decides nothing. A file is read within `DataLimits`. Values are not checked here, and
templates and tokens are not known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.training.csv_rows import csv_rows
from adapters.training.file_bytes import HEAD_BYTES, head_text, line_source, refuse_binary
from adapters.training.json_rows import JsonReader
from adapters.training.row_source import (
    DEFAULT_DATA_LIMITS,
    DataLimits,
    FileFacts,
    Lines,
    Source,
    Used,
)


@dataclass(frozen=True)
class RowFile:
    """An open file: what was understood of it, and its rows, which can be read once."""

    facts: FileFacts
    sources: Iterator[Source]


@contextmanager
def open_rows(
    path: Path, limits: DataLimits = DEFAULT_DATA_LIMITS, used: Used | None = None
) -> Iterator[RowFile]:
    """Open a file of rows.

    Args:
        path: the file.
        limits: limits on rows, bytes and lines.
        used: the columns that will be read, if they are known: they help to find the separator, and a
            header without one of them is refused.

    Raises:
        UnsupportedFile: the file is no text.
        DataInvalid: here or while rows are read: an encoding that is not read, invalid JSON or CSV, or
            an oversized file or line; the message names the row and the line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        refuse_binary(head)
        source, encoding = line_source(file, head)
        lines = Lines(source, limits)
        start = head_text(head).lstrip()
        if start.startswith(("{", "[")):
            reader = JsonReader(lines, limits, FileFacts("JSON lines", encoding))
            facts, rows = reader.facts, reader.rows(start)
        else:
            facts = FileFacts("CSV", encoding)
            rows = csv_rows(path, lines, limits, used, facts, head)
        first = list(itertools.islice(rows, 1))
        if first and not facts.columns and isinstance(first[0].row, dict):
            facts.columns = tuple(first[0].row)
        yield RowFile(facts, itertools.chain(first, rows))
