"""Options about rows and labels, and the files of rows that `train` and `eval` read.

Knows no model and no command.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import DataInvalid
from adapters.template import Row, text_of
from adapters.training.rows import (
    DEFAULT_DATA_LIMITS,
    Source,
    Used,
    check_sources,
    open_rows,
)
from server.cli.render import fail

if TYPE_CHECKING:
    from server.api.training.training_data import TrainingData, Wish
    from server.text.tokenizer import TextTokenizer

# A path has lost one of the slashes.
_ADDRESS = re.compile(r"(https?|ftp|s3|gs|hf):/", re.IGNORECASE)

Data = Annotated[
    Path,
    typer.Option(
        "--data", help="Rows: JSON lines, a JSON array, or CSV; what it is, is found out."
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="COLUMN=VALUE",
        help="Take only the rows with this value; several must all hold.",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", help="The prompt, with {column} where a row's value goes."),
]
Target = Annotated[
    str | None, typer.Option("--target", help="The column that holds what to answer.")
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        metavar="A,B",
        help="What may be answered: once with commas, or once for each label.",
    ),
]
LabelName = Annotated[
    list[str] | None,
    typer.Option(
        "--label-name",
        metavar="VALUE=LABEL",
        help="The label for a value of the target column; once for each value.",
    ),
]
TargetSeparator = Annotated[
    str | None,
    typer.Option(
        "--target-separator",
        help="Stands between prompt and target. Left out: white space at the template's end, else "
        "one space.",
        show_default=False,
    ),
]
AppendEos = Annotated[
    bool | None,
    typer.Option(
        "--append-eos/--no-append-eos",
        help="Whether a target ends with the end-of-sequence token.",
        show_default=False,
    ),
]


def labels_from(given: Sequence[str] | None) -> list[str] | None:
    """The labels: one option is a list with commas, several are a label each."""
    if not given:
        return None
    if len(given) > 1:
        return list(given)
    return [label.strip() for label in given[0].split(",")]


def pairs_from(flag: str, given: Sequence[str] | None) -> dict[str, str] | None:
    """Options of the form KEY=VALUE; exits with a sentence on another form or a key twice."""
    if not given:
        return None
    pairs: dict[str, str] = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise fail(f"{flag}: expected KEY=VALUE, came {text!r}{_as_pairs(flag, text)}")
        if pairs.setdefault(key, value) != value:
            raise fail(f"{flag}: {key!r} is given twice, as {pairs[key]!r} and {value!r}")
    return pairs


def _as_pairs(flag: str, text: str) -> str:
    """An object as options; empty where the text is none."""
    from adapters.strict_json import StrictJsonError, parse_object

    try:
        given = parse_object(text.encode("utf-8", "surrogatepass"), 2)
    except StrictJsonError:
        return ""
    return "; write " + " ".join(f"{flag} {shlex.quote(f'{key}={given[key]}')}" for key in given)


def _as_json(text: str) -> str:
    """A Python dict as JSON; empty where the text is none."""
    try:
        value = ast.literal_eval(text.strip())
        said = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ""
    return f"; it is a Python dict, in JSON: {shlex.quote(said)}" if isinstance(value, dict) else ""


def object_from(flag: str, text: str | None) -> dict[str, Any] | None:
    """An option that is a JSON object; exits with a sentence on anything else."""
    from adapters.strict_json import StrictJsonError, parse_object

    if text is None:
        return None
    try:
        return parse_object(text.encode("utf-8", "surrogatepass"), 8)
    except StrictJsonError as error:
        raise fail(f"{flag}: expected a JSON object; {error}{_as_json(text)}") from error


def merged_options(flag: str, text: str | None, **named: Any) -> dict[str, Any]:
    """The options that were given, and those of a JSON object; exits where one is given twice."""
    given = {name: value for name, value in named.items() if value is not None}
    others = object_from(flag, text) or {}
    for name in others:
        if name in given:
            raise fail(f"{name} is given twice: by its own option and in {flag}")
    return {**others, **given}


class DataFile:
    """A file of rows, or some of them, and their numbers in the file.

    Args:
        path: the file; its content says what it is.
        where: column -> value, as text, of the rows that are taken; None takes all.

    Raises:
        UnsupportedFile: the file is no text.
        DataInvalid: it has no rows, or the first cannot be read.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, where: dict[str, str] | None = None) -> None:
        self.path = path
        self.where = where or {}
        self._numbers: list[int] = []
        if address := _ADDRESS.match(str(path)):
            raise DataInvalid(
                f"{path}: an address ({address[1]}) is not fetched; download the file, and give its path",
                expected="a file on this machine",
                came="an address",
            )
        with open_rows(path, used=Used(())) as file:
            first = next(file.sources, None)
            self._columns, self._first = file.facts.columns, None if first is None else first.row
            self._facts = file.facts
        if first is None:
            raise DataInvalid(
                f"{path}: there are no rows: expected at least one",
                expected="at least one row",
                came="none",
            )

    @property
    def columns(self) -> str:
        """The columns of the first row, for messages."""
        return ", ".join(repr(name) for name in self._columns)

    @property
    def header_hint(self) -> str:
        """What to do if the first line is no header; "" where there is none."""
        return self._facts.header_hint

    def read(self, wish: Wish, tokenizer: TextTokenizer | None) -> TrainingData:
        """The rows as `POST /train` reads them.

        Args:
            wish: what the command says of their shape.
            tokenizer: the base's; None for rows that are no conversations.

        Raises:
            DataInvalid: rows that are refused, or none with the values of `where`.
            RequestRefused, JobInvalid: see `server.api.training.training_data`.
        """
        from server.api.training.training_data import understand

        with open_rows(self.path, used=self._used(wish.used())) as file:
            sources = self._kept(file.sources)
            return understand(sources, file.facts, wish, tokenizer, DEFAULT_DATA_LIMITS)

    def is_chat(self, wish: Wish) -> bool:
        """Whether the rows are conversations."""
        from server.api.training.training_data import is_chat

        return is_chat(self._facts, self._first, wish)

    def has_known_shape(self) -> bool:
        """Whether the rows need no template."""
        from adapters.training.shapes import find_format

        return isinstance(self._first, dict) and find_format(self._columns, self._first) is not None

    def rows(self, used: Used) -> list[Row]:
        """The rows with the columns that are used; a row may lack any of them.

        Raises:
            DataInvalid: rows that are refused, or none with the values of `where`.
        """
        with open_rows(self.path, used=self._used(used)) as file:
            return check_sources(self._kept(file.sources), used=used)

    def selected(self) -> Iterator[dict[str, Any]]:
        """The rows as they were read, whatever their values."""
        with open_rows(self.path, used=self._used(None)) as file:
            for source in self._kept(file.sources):
                yield source.row

    def message_of(self, error: DataInvalid) -> str:
        """The message, with the row's number in the file where that is another one."""
        if error.row is None or error.row > len(self._numbers):
            return error.message
        number = self._numbers[error.row - 1]
        if number == error.row:
            return error.message
        return f"{error.message} (row {number} of the file)"

    def _used(self, used: Used | None) -> Used:
        used = used or Used(())
        return Used(used.required, (*used.optional, *self.where))

    def _kept(self, sources: Iterator[Source]) -> Iterator[Source]:
        """The rows with the values of `where`."""
        self._numbers = []
        number = 0
        for number, source in enumerate(sources, start=1):
            if isinstance(source.row, dict) and all(
                name in source.row and _text(source.row[name]) == text
                for name, text in self.where.items()
            ):
                self._numbers.append(number)
                yield source
        if not self._numbers:
            wanted = ", ".join(f"{name}={text}" for name, text in self.where.items())
            raise DataInvalid(
                f"{self.path}: none of the {number} rows has {wanted}",
                expected="at least one row",
                came="none",
            )


def _text(value: Any) -> str | None:
    return text_of(value) if isinstance(value, str | int | float) else None
