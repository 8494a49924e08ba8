"""Templates: plain `{column}` substitution, with `{{` and `}}` for the braces themselves.

No attributes, indexing, conversions or format specs, so that a template from a stranger can do
nothing but be filled in. White space at the end of a template is dropped here: it belongs to the
target, which stands after the prompt (the tokenizer sees both as one text).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import TemplateInvalid

# In this order: an escape, a column, or a brace that is neither.
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
MAX_TEMPLATE_CHARACTERS = 10_000


@dataclass(frozen=True)
class Column:
    """A place in a template that a row's value fills."""

    name: str


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        parts: literal text and columns, in order; trailing white space is already gone.
    """

    parts: tuple[str | Column, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Parse a template.

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
            parts += [literal, Column(_column_name(match, text))]
            literal = ""
        parts.append(literal + text[position:])
        return cls(_trimmed(parts))

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names in order of first use."""
        return tuple(dict.fromkeys(part.name for part in self.parts if isinstance(part, Column)))

    def render(self, row: Mapping[str, str | int | float]) -> str:
        """Fill in a row.

        Raises:
            TemplateInvalid: a column is missing from the row, or the row has one too many.
        """
        missing = [name for name in self.columns if name not in row]
        unknown = [name for name in row if name not in self.columns]
        if missing or unknown:
            raise TemplateInvalid(
                f"row: the template takes the columns {_listed(self.columns)}; "
                f"missing: {_listed(missing)}; unknown: {_listed(unknown)}",
                field="row",
                expected=_listed(self.columns),
                came=_listed(row),
            )
        return "".join(
            str(row[part.name]) if isinstance(part, Column) else part for part in self.parts
        )


def _column_name(match: re.Match[str], text: str) -> str:
    name = match.group(1)
    if name is None:
        raise TemplateInvalid(
            f"template: a lone {match.group()!r} at character {match.start()}; "
            "write {column} for a column, {{ or }} for a brace",
            field="template",
            expected="{column}, {{ or }}",
            came=text[max(0, match.start() - 10) : match.end() + 10],
        )
    if not name.strip():
        raise TemplateInvalid(
            f"template: a column without a name at character {match.start()}",
            field="template",
            expected="{column}",
            came=match.group(),
        )
    return name


def _trimmed(parts: list[str | Column]) -> tuple[str | Column, ...]:
    last = parts[-1]
    if isinstance(last, str):
        parts[-1] = last.rstrip()
    return tuple(part for part in parts if part != "")


def _listed(names: object) -> str:
    listed = list(names)  # type: ignore[call-overload]
    return ", ".join(repr(name) for name in listed) or "none"
