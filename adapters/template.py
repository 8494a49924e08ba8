"""Templates: plain `{column}` substitution, with `{{` and `}}` for the braces themselves.

A column that may be empty is written `{?column}`: a line whose columns are all of that kind and all empty
is left out, with its line break, as tutorials do with Alpaca's `input`.

No attributes, indexing, conversions or format specs, so an untrusted template can do nothing but
substitute. Trailing white space of a template is dropped here: it belongs to the target that follows the
prompt (the tokenizer sees both as one text). The caller can request to keep it, for recipes written
that way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal
from unicodedata import normalize

from adapters.errors import TemplateInvalid

Value = str | int | float | bool
# Columns of one row of data.
Row = dict[str, Value]
Tokenization = Literal["boundary", "as_written"]

# In this order: an escape, a column, or a brace that is neither.
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_WORD = re.compile(r"\w")
# Shorter punctuation stands at the end of any text.
_LEAST_PUNCTUATION = 2
MAX_TEMPLATE_CHARACTERS = 10_000
_SHOWN = 80
DEFAULT_SEPARATOR = " "


@dataclass(frozen=True)
class Column:
    """A placeholder in a template.

    Attributes:
        name: of the column.
        is_optional: written `{?name}`; a row may lack it, which is the same as an empty value.
    """

    name: str
    is_optional: bool = False


def text_of(value: Value) -> str:
    """A value as text in a prompt or a target: numbers as in Python, booleans as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def is_empty(value: Value) -> bool:
    """Whether a value is a text of nothing but white space."""
    return isinstance(value, str) and not value.strip()


@dataclass(frozen=True)
class Filled:
    """A template with a row's values in it.

    Attributes:
        text: the whole text.
        ranges: for every column of a line that was not left out, the half-open range of characters of
            its value.
    """

    text: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        parts: literal text and columns, in order; trailing white space is already gone, unless
            `parse` was asked to keep it.
        dropped: the white space that was at the end.
    """

    parts: tuple[str | Column, ...]
    dropped: str = ""

    @classmethod
    def parse(cls, text: str, *, keep_trailing_space: bool = False) -> Template:
        """Parse a template.

        Args:
            text: the template.
            keep_trailing_space: leave white space at the end in the prompt ("as_written").

        Raises:
            TemplateInvalid: a lone brace, an empty column name, or more than the size limit.
        """
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            raise TemplateInvalid(
                f"template has {len(text)} characters, at most {MAX_TEMPLATE_CHARACTERS} are taken",
                field="template",
                expected=f"at most {MAX_TEMPLATE_CHARACTERS} characters",
                came=str(len(text)),
            )
        parts: list[str | Column] = []
        literal = ""
        position = 0
        for match in _PIECE.finditer(text):
            literal += text[position : match.start()]
            position = match.end()
            if match.group() in ("{{", "}}"):
                literal += match.group()[0]
                continue
            parts += [literal, _column(match, text)]
            literal = ""
        end = literal + text[position:]
        kept = end if keep_trailing_space else end.rstrip()
        parts.append(kept)
        return cls(tuple(part for part in parts if part != ""), dropped=end[len(kept) :])

    def require_column(self) -> None:
        """Refuse a template that makes the same prompt of every row.

        Raises:
            TemplateInvalid: it names no column.
        """
        if not self.columns:
            text = "".join(part for part in self.parts if isinstance(part, str)) + self.dropped
            raise TemplateInvalid(
                "template: it names no column, so every prompt would be the same; write {column} where "
                "the text of a row belongs",
                field="template",
                expected="at least one {column}",
                came=repr(text[:_SHOWN]),
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names in order of first use."""
        return tuple(dict.fromkeys(part.name for part in self.parts if isinstance(part, Column)))

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the columns that every row must have, in order of first use."""
        names = (p.name for p in self.parts if isinstance(p, Column) and not p.is_optional)
        return tuple(dict.fromkeys(names))

    @property
    def optional(self) -> tuple[str, ...]:
        """Names of the columns that a row may lack."""
        return tuple(name for name in self.columns if name not in self.required)

    @property
    def sole_column(self) -> str | None:
        """The column that one text fills: the only one, or the only one that is not optional."""
        names = self.required or self.columns
        return names[0] if len(names) == 1 else None

    @property
    def has_words(self) -> bool:
        """Whether a rendered text can be distinguished from a column's value by the template's own text."""
        literal = "".join(part for part in self._always if isinstance(part, str))
        return bool(_WORD.search(literal)) or len("".join(literal.split())) >= _LEAST_PUNCTUATION

    def recognises(self, text: str) -> bool:
        """Whether a text looks like a row that this template has rendered.

        It begins and ends with the template's own text and has the rest of it in between, in this order.
        Letters' case, width and white space are not compared. False where the template has no text of
        its own, or no more than one punctuation mark.
        """
        parts = self._always
        if not self.has_words or not parts:
            return False
        first, last = parts[0], parts[-1]
        rest = _folded(text)
        if isinstance(last, str):
            if not rest.endswith(_folded(last)):
                return False
            rest = rest[: len(rest) - len(_folded(last))]
            if len(parts) == 1:
                return not rest
        if isinstance(first, str) and not rest.startswith(_folded(first)):
            return False
        position = 0
        for part in parts[: -1 if isinstance(last, str) else None]:
            if isinstance(part, str):
                found = rest.find(_folded(part), position)
                if found < 0:
                    return False
                position = found + len(_folded(part))
        return True

    def render(self, row: Mapping[str, Value]) -> str:
        """Fill in a row that has exactly the template's columns; optional ones may be missing.

        Raises:
            TemplateInvalid: a column is missing from the row, or the row has one too many.
        """
        unknown = [name for name in row if name not in self.columns]
        if unknown:
            raise self._misfit(row, unknown)
        return self.fill(row).text

    def fill(self, row: Mapping[str, Value]) -> Filled:
        """Fill in a row; columns that the template does not name are left alone.

        Raises:
            TemplateInvalid: a column is missing from the row.
        """
        text = ""
        ranges: list[tuple[int, int]] = []
        is_first = True
        for line in self.lines:
            if _is_left_out(line, row):
                continue
            if not is_first:
                text += "\n"
            is_first = False
            for part in line:
                if isinstance(part, str):
                    text += part
                    continue
                if part.name not in row and not part.is_optional:
                    raise self._misfit(row, [])
                start = len(text)
                text += text_of(row.get(part.name, ""))
                ranges.append((start, len(text)))
        return Filled(text, tuple(ranges))

    @cached_property
    def _always(self) -> tuple[str | Column, ...]:
        """The parts that every rendered text has: of a line that may be left out, its columns only."""
        kept: list[str | Column] = []
        for line in self.lines:
            columns = [part for part in line if isinstance(part, Column)]
            may_go = bool(columns) and all(column.is_optional for column in columns)
            kept += columns if may_go else [part for part in line if part != ""]
        return tuple(kept)

    @cached_property
    def lines(self) -> tuple[tuple[str | Column, ...], ...]:
        """The parts of each line, without line breaks."""
        lines: list[list[str | Column]] = [[]]
        for part in self.parts:
            if isinstance(part, Column):
                lines[-1].append(part)
                continue
            first, *others = part.split("\n")
            lines[-1].append(first)
            lines += [[other] for other in others]
        return tuple(map(tuple, lines))

    def _misfit(self, row: Mapping[str, Value], unknown: list[str]) -> TemplateInvalid:
        missing = [name for name in self.required if name not in row]
        return TemplateInvalid(
            f"row: the template takes the columns {_listed(self.columns)}; "
            f"missing: {_listed(missing)}; unknown: {_listed(unknown)}",
            field="row",
            expected=_listed(self.columns),
            came=_listed(row),
        )


def default_separator(template: str, tokenization: str) -> str:
    """The text between prompt and target unless one is given.

    The template's trailing white space, or one space where it has none; nothing where the white space
    stays in the prompt ("as_written").

    Raises:
        TemplateInvalid: the template does not parse.
    """
    if tokenization == "as_written":
        return ""
    return Template.parse(template).dropped or DEFAULT_SEPARATOR


def _is_left_out(line: tuple[str | Column, ...], row: Mapping[str, Value]) -> bool:
    columns = [part for part in line if isinstance(part, Column)]
    return bool(columns) and all(
        column.is_optional and is_empty(row.get(column.name, "")) for column in columns
    )


def _folded(text: str) -> str:
    if not text.isascii():
        text = normalize("NFKC", text)  # a full-width colon is a colon
    return "".join(text.split()).casefold()


def _column(match: re.Match[str], text: str) -> Column:
    name = match.group(1)
    if name is None:
        raise TemplateInvalid(
            f"template: a lone {match.group()!r} at character {match.start()}; "
            "write {column} for a column, {?column} for one that may be empty, {{ or }} for a brace",
            field="template",
            expected="{column}, {?column}, {{ or }}",
            came=text[max(0, match.start() - 10) : match.end() + 10],
        )
    is_optional = name.startswith("?")
    name = name.removeprefix("?")
    if not name.strip():
        raise TemplateInvalid(
            f"template: a column without a name at character {match.start()}",
            field="template",
            expected="{column}",
            came=match.group(),
        )
    return Column(name, is_optional)


def _listed(names: object) -> str:
    listed = list(names)  # type: ignore[call-overload]
    return ", ".join(repr(name) for name in listed) or "none"
