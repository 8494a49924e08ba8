"""How commands print: results on standard output, sentences and refusals on standard error.

Knows no command and no setting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.errors import AdapterError, DataInvalid

if TYPE_CHECKING:
    from server.cli.data import DataFile

EXIT_FOUND_FAILURE = 1
EXIT_INTERRUPTED = 130
# Characters of a line that is no terminal's.
_WIDEST = 2_000
_MOST_CHARACTERS = 400

# Fields of a request in sentences of the library -> the options that set them.
_TYPED = {
    "infer_labels false takes none": "--no-infer-labels takes none",
    "on_too_long='truncate' drops": "--on-too-long truncate drops",
}

err = Console(stderr=True)
out = Console()


def fail(message: str) -> typer.Exit:
    """What to raise to end with a sentence on standard error and status 2."""
    warn(message)
    return typer.Exit(2)


def warn(message: str, colour: str = "red") -> None:
    """Print a sentence on standard error, after the program's name in this colour."""
    say(f"[{colour}]graftwork:[/{colour}] {escape(message)}")


def as_typed(message: str) -> str:
    """A sentence of the library or the server, with options where it names fields of a request."""
    for field, option in _TYPED.items():
        message = message.replace(field, option)
    return message


def say(line: str) -> None:
    """Print a line of rich's markup on standard error; never wrapped, so that it can be searched."""
    err.print(line, highlight=False, soft_wrap=True)


def print_line(line: str) -> None:
    """Print a line as it is on standard output; never wrapped, so that it can be copied."""
    out.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_table(table: Table, *, expendable: Sequence[str] = ()) -> None:
    """Print a table on standard output: as wide as a terminal, and as wide as it is anywhere else.

    Args:
        table: its columns that may not be folded have `no_wrap`.
        expendable: headers of columns that a narrow terminal does without, the first ones first.
    """
    wide = Console(width=_WIDEST)
    if out.is_terminal:
        table = _narrowed(table, expendable, wide)
        if expendable and wide.measure(table).maximum > out.width:
            out.width = wide.measure(table).maximum  # the terminal wraps it; nothing is cut
        out.print(table, crop=False)
        return
    # In a pipe or a file nothing may be cut, whatever COLUMNS says: it may be searched.
    wide.width = max(out.width, wide.measure(table).maximum)
    with wide.capture() as captured:
        wide.print(table, crop=False)
    for line in captured.get().splitlines():
        print_line(line.rstrip())


def _narrowed(table: Table, expendable: Sequence[str], wide: Console) -> Table:
    """The table without as many columns as it takes to fit the terminal, and with their names."""
    gone: list[str] = []
    for header in expendable:
        if wide.measure(table).maximum <= out.width:
            break
        kept = [column for column in table.columns if column.header != header]
        gone += [header] * (len(kept) < len(table.columns))
        fewer = Table(*(one.copy() for one in kept), box=table.box, pad_edge=table.pad_edge)
        for row in zip(*(one.cells for one in kept), strict=True):
            fewer.add_row(*row)
        table = fewer
    if gone:
        table.caption = f"not shown for want of width: {', '.join(gone)}; --json has all"
        table.caption_justify = "left"
    return table


def print_json(value: Any) -> None:
    """Print a value as one line of JSON on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def cell(value: Any) -> str:
    """A value of JSON for a table: a text as it is, anything else as JSON; a long one is cut."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


def share(value: float | None) -> str:
    """A share for a table: three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


@contextmanager
def errors_as_lines(data: DataFile | None = None) -> Iterator[None]:
    """Let every refusal end the command with one line and status 2; faults of ours pass.

    Args:
        data: the rows that refusals may name, for their numbers in the file.
    """
    from server.cli.http_client import ServerRefused
    from server.engine.errors import EngineError
    from server.errors import RequestRefused
    from server.jobs import failures

    try:
        yield
    except DataInvalid as error:
        raise fail(as_typed(data.message_of(error) if data else error.message)) from error
    except (AdapterError, RequestRefused, ServerRefused) as error:
        raise fail(as_typed(error.message)) from error
    except EngineError as error:
        raise fail(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise fail(f"{where}{error.strerror or error}") from error
    except (MemoryError, RuntimeError) as error:
        if failures.describe(error)["code"] != failures.OUT_OF_MEMORY:
            raise
        raise fail(
            "out of memory; a smaller --batch-size, with more gradient_accumulation_steps, needs less"
        ) from error
