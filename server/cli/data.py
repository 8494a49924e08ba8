"""Options about rows and labels, and the files of rows that `train` and `eval` read.

Knows no model and no command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import DataInvalid
from adapters.template import Row, text_of
from adapters.training.rows import kind_of, read_rows
from server.cli.render import fail

Data = Annotated[Path, typer.Option("--data", help="Rows: a .jsonl or a .csv file.")]
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
            raise fail(f"{flag}: expected KEY=VALUE, came {text!r}")
        if pairs.setdefault(key, value) != value:
            raise fail(f"{flag}: {key!r} is given twice, as {pairs[key]!r} and {value!r}")
    return pairs


def object_from(flag: str, text: str | None) -> dict[str, Any] | None:
    """An option that is a JSON object; exits with a sentence on anything else."""
    from adapters.strict_json import StrictJsonError, parse_object

    if text is None:
        return None
    try:
        return parse_object(text.encode("utf-8", "surrogatepass"), 8)
    except StrictJsonError as error:
        raise fail(f"{flag}: expected a JSON object; {error}") from error


def merged_options(flag: str, text: str | None, **named: Any) -> dict[str, Any]:
    """The options that were given, and those of a JSON object; exits where one is given twice."""
    given = {name: value for name, value in named.items() if value is not None}
    others = object_from(flag, text) or {}
    for name in others:
        if name in given:
            raise fail(f"{name} is given twice: by its own option and in {flag}")
    return {**others, **given}


class DataFile:
    """The rows of a file, or some of them, and their numbers in the file.

    Args:
        path: .jsonl or .csv.
        where: column -> value, as text, of the rows that are taken; None takes all.

    Raises:
        DataInvalid: another kind of file, rows that are refused, or none with those values.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, where: dict[str, str] | None = None) -> None:
        kind = kind_of(path.name)
        if kind is None:
            raise DataInvalid(
                f"{path}: expected a file named .jsonl (one JSON object a line) or .csv",
                expected=".jsonl or .csv",
                came=path.suffix or "no ending",
            )
        everything = read_rows(path, kind)
        kept = [
            (number, row)
            for number, row in enumerate(everything, start=1)
            if all(
                name in row and text_of(row[name]) == text for name, text in (where or {}).items()
            )
        ]
        if not kept:
            wanted = ", ".join(f"{name}={text}" for name, text in (where or {}).items())
            raise DataInvalid(
                f"{path}: none of the {len(everything)} rows has {wanted}",
                expected="at least one row",
                came="none",
            )
        self.rows: list[Row] = [row for _, row in kept]
        self._numbers = [number for number, _ in kept]

    @property
    def columns(self) -> str:
        """The columns of the first row, for messages."""
        return ", ".join(repr(name) for name in self.rows[0])

    def message_of(self, error: DataInvalid) -> str:
        """The message, with the row's number in the file where that is another one."""
        if error.row is None or error.row > len(self._numbers):
            return error.message
        number = self._numbers[error.row - 1]
        if number == error.row:
            return error.message
        return f"{error.message} (row {number} of the file)"
