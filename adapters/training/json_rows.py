"""Reads rows from JSON: an object a line, a list of objects, or an object that holds such a list.

JSON lines are read line by line, a document at once, of which one row at a time is parsed: a scan for
strings and brackets finds the rows. Values are not looked at.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator

from adapters.errors import DataInvalid
from adapters.strict_json import StrictJsonError, parse_object
from adapters.training.file_bytes import HEAD_BYTES
from adapters.training.row_source import (
    MAX_LISTED,
    SHOWN,
    DataLimits,
    FileFacts,
    Lines,
    Source,
    quoted,
    refused,
)

# Columns that nothing names may hold lists and objects.
DEPTH = 64
# Names of lists that are one row's conversation, and no list of rows.
CONVERSATIONS = ("messages", "conversations", "conversation", "history", "dialogue", "turns")
_PANDAS = "pandas writes rows with df.to_json(FILE, orient='records', lines=True)"

# Possessive, as in `adapters.strict_json`: a string, closed or not, or a bracket.
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_POSITION = re.compile(r"\(line (\d+), column (\d+)\)")
_SPACE = re.compile(r"\s*")
# A document on one line, which may be longer than a line of rows: an object that begins with its list.
_OPENS_LIST = re.compile(
    r'\{\s*"(?!(?:' + "|".join(CONVERSATIONS) + r')")[^"\\]{1,80}"\s*:\s*\[\s*\{[^\n]*\Z'
)


class JsonReader:
    """The rows of JSON lines, or of a document that spans them."""

    def __init__(self, lines: Lines, limits: DataLimits, facts: FileFacts) -> None:
        self._lines = lines
        self._limits = limits
        self.facts = facts

    def rows(self, start: str) -> Iterator[Source]:
        """All rows.

        Args:
            start: the beginning of the file, without white space before it.
        """
        if start.startswith("["):
            self.facts.layout = "JSON array"
            text = self._lines.rest("")
            yield from self._of_list(text, text.index("["))
            return
        if len(start) > HEAD_BYTES // 4 and _OPENS_LIST.match(start):
            yield from self._of_document(self._lines.rest(""))
            return
        lines = self._lines.text(allow_nul=True)
        first = next(line for line in lines if line.strip())
        if not _is_whole(first):
            yield from self._of_document(self._lines.rest("\n" * (self._lines.number - 1) + first))
            return
        number = self._lines.number
        self._lines.row = 2
        second = next((line for line in lines if line.strip()), None)
        if second is None:
            yield from self._of_document("\n" * (number - 1) + first)
            return
        yield self._row(first, f"row 1 (line {number})", 1)
        for line in itertools.chain([second], lines):
            if line.strip():
                yield self._row(line, self._lines.place, self._lines.row)
                self._lines.row += 1

    def _row(self, text: str, place: str, number: int, line: int = 1) -> Source:
        try:
            row = parse_object(text.encode("utf-8", "surrogatepass"), DEPTH, allow_nan=True)
        except StrictJsonError as error:
            reason = _POSITION.sub(
                lambda found: _position(int(found[1]) + line - 1, int(found[2]), line), str(error)
            )
            raise DataInvalid(
                f"{place}: {reason}{_json_hint(text)}",
                row=number,
                field="data",
                expected="a JSON object",
                came=reason,
            ) from error
        return Source(row, place)

    def _of_document(self, text: str) -> Iterator[Source]:
        """Objects one after another, or one object with a list of rows in it."""
        objects = self._spans(text, 0, 0)
        first = next(objects)
        second = next(objects, None)
        if second is None:
            found = _container(text, first[0])
            if found is not None:
                name, start = found
                self.facts.layout = "JSON array"
                self.facts.notes.append(f"the rows are those of the file's list {quoted(name)}")
                yield from self._of_list(text, start)
                return
        elif first[2] != second[2]:
            self.facts.layout = "JSON objects"
        spans = [first] if second is None else itertools.chain([first, second], objects)
        yield from self._of_spans(text, spans)

    def _of_list(self, text: str, start: int) -> Iterator[Source]:
        yield from self._of_spans(text, self._spans(text, start, 1))

    def _of_spans(self, text: str, spans: Iterable[tuple[int, int, int]]) -> Iterator[Source]:
        for number, (begin, end, line) in enumerate(spans, start=1):
            place = f"row {number} (line {line})"
            if end - begin > self._limits.max_line_bytes:
                came = f"a row of more than {self._limits.max_line_bytes} characters"
                raise refused(place, number, f"at most {self._limits.max_line_bytes} bytes", came)
            yield self._row(text[begin:end], place, number, line)

    def _spans(self, text: str, start: int, outside: int) -> Iterator[tuple[int, int, int]]:
        """Begin, end and line of every object: in a list (outside 1), or one after another (0)."""
        depth, number, end, line, counted = 0, 1, start + outside, 1, 0
        begin = start
        for token in _TOKEN.finditer(text, start):
            letter = text[token.start()]
            if letter == '"' and depth > outside:
                continue
            if depth == outside:
                line += text.count("\n", counted, token.start())
                counted = token.start()
                gap = text[end : token.start()].strip()
                if letter in "]}" and outside == 1 and not gap:
                    self._require_end(text, token.end(), line)
                    return
                if gap != ("," if number > 1 and outside else "") or letter != "{":
                    raise _no_object(text, end, number, line)
                begin = token.start()
            depth += _STEPS[letter]
            if depth > DEPTH + outside:
                raise _nested(number, line)
            if letter in "]}" and depth == outside:
                yield begin, token.end(), line
                end = token.end()
                number += 1
        if depth or text[end:].strip():
            raise _cut_short(number, line)

    def _require_end(self, text: str, end: int, line: int) -> None:
        # What stands beside the list of an object was looked at by `_container`.
        if self.facts.notes:
            return
        if text[end:].strip():
            raise DataInvalid(
                f"after the list that ends in line {line} the file goes on; expected one list of rows",
                field="data",
                expected="one list of rows",
                came=quoted(text[end:].strip()),
            )


_STEPS = {"{": 1, "[": 1, "}": -1, "]": -1, '"': 0}


def _is_whole(line: str) -> bool:
    """Whether every bracket that a line opens is closed in it, or it is clearly a row cut short."""
    depth = 0
    for token in _TOKEN.finditer(line):
        step = _STEPS[line[token.start()]]
        if step == 0 and not token.group().endswith('"'):
            return True  # a string left open: no line break may stand in it
        depth += step
        if depth > DEPTH:
            return True
    return depth <= 0


def _container(text: str, start: int) -> tuple[str, int] | None:
    """The one list of objects of the file's only object: its name, and where it begins.

    Raises:
        DataInvalid: several such lists, or columns instead of rows.
    """
    values = _members(text, start)
    lists = {
        name: at
        for name, at in values.items()
        if text[at] == "[" and text[_SPACE.match(text, at + 1).end() :][:1] == "{"  # type: ignore[union-attr]
    }
    rows = {name: at for name, at in lists.items() if name not in CONVERSATIONS}
    if len(rows) == 1 and len(lists) == 1:
        return next(iter(rows.items()))
    if len(rows) > 1:
        listed = ", ".join(map(quoted, list(rows)[:MAX_LISTED]))
        raise DataInvalid(
            f"the file is one object with several lists, {listed}; keep one of them: "
            f"jq '.[{json.dumps(next(iter(rows)), ensure_ascii=True)}]' FILE > NEW",
            field="data",
            expected="one list of rows",
            came=listed,
        )
    kinds = {text[at] for at in values.values()}
    if not lists and len(values) > 1 and len(kinds) == 1 and kinds <= {"{", "["}:
        raise DataInvalid(
            "the file is one object whose values are columns, or rows by their names; expected a list "
            f"of rows, or a row a line: {_PANDAS}",
            field="data",
            expected="a list of rows, or a row a line",
            came="an object of objects or lists",
        )
    return None


def _members(text: str, start: int) -> dict[str, int]:
    """The names of an object and where their values begin; the text's brackets match."""
    found: dict[str, int] = {}
    depth = 0
    for token in _TOKEN.finditer(text, start):
        letter = text[token.start()]
        if letter == '"' and depth == 1:
            colon = _SPACE.match(text, token.end()).end()  # type: ignore[union-attr]
            at = _SPACE.match(text, colon + 1).end()  # type: ignore[union-attr]
            if text[colon : colon + 1] == ":" and at < len(text):
                found[token.group().strip('"')] = at
        depth += _STEPS[letter]
        if depth == 0 or len(found) > 1000:
            break
    return found


def _position(line: int, column: int, first: int) -> str:
    return f"(line {line}, column {column})" if first > 1 or line > first else f"(column {column})"


def _json_hint(text: str) -> str:
    stripped = text.strip()
    if stripped.startswith("{'"):
        return "; Python's own notation is no JSON: write rows with json.dumps"
    if stripped.endswith("},"):
        return "; JSON lines have no comma at their ends"
    return ""


def _no_object(text: str, at: int, number: int, line: int) -> DataInvalid:
    came = text[at : at + SHOWN].strip().lstrip(",").strip()
    kind = {"[": "a list", '"': "a text", "{": "no comma between two rows"}.get(came[:1], "text")
    if came[:1] in ("]", "}"):
        kind = "a comma after the last row, or a bracket that closes nothing"
    shown = "" if kind.startswith(("no comma", "a comma")) else f": {quoted(came[:30])}"
    return DataInvalid(
        f"row {number} (line {line}): expected an object of columns, came {kind}{shown}",
        row=number,
        field="data",
        expected="an object of columns",
        came=kind,
    )


def _nested(number: int, line: int) -> DataInvalid:
    place = f"row {number} (line {line})"
    return refused(place, number, f"at most {DEPTH} levels of nested values", "more")


def _cut_short(number: int, line: int) -> DataInvalid:
    return DataInvalid(
        f"row {number} (line {line}): it is not JSON: a bracket or a quotation mark is never closed; "
        "perhaps the file is cut short",
        row=number,
        field="data",
        expected="JSON",
        came="a bracket that is never closed",
    )
