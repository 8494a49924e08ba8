"""What the commands share: options that stand for settings, and the ways to read and refuse them.

An option left out is None, so that the environment and the defaults have their say. Knows no command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.config.settings import DEFAULT_BASE, Dtype, Settings

if TYPE_CHECKING:
    from server.cli.http_client import RemoteServer

# Characters of a line that is no terminal's.
_WIDEST = 2_000

err = Console(stderr=True)
out = Console()


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    return f"{field.description} [dim]GRAFTWORK_{name.upper()}[/dim]"


def option(name: str, *flags: str) -> Any:
    """A command-line option that sets a setting."""
    default = Settings.model_fields[name].default
    return typer.Option(
        *flags, help=_help(name), show_default=str(default) if default is not None else False
    )


Base = Annotated[str | None, option("base", "--base", "-b")]
Revision = Annotated[str | None, option("revision", "--revision")]
DataDir = Annotated[Path | None, option("data_dir", "--data-dir", "-d")]
DtypeOption = Annotated[Dtype | None, option("dtype", "--dtype")]
Device = Annotated[str | None, option("device", "--device")]
Threads = Annotated[int | None, option("threads", "--threads")]
TrainWorkers = Annotated[int | None, option("train_workers", "--train-workers")]
Url = Annotated[str | None, option("url", "--url")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
LogFormat = Annotated[str | None, option("log_format", "--log-format")]
LogLevel = Annotated[str | None, option("log_level", "--log-level")]


def settings_from(**given: Any) -> Settings:
    """The settings, with the options that were given; exits with a sentence on a wrong one."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise fail(
            f"--{name.replace('_', '-')} (GRAFTWORK_{name.upper()}): {first['msg']}; "
            f"came: {first['input']!r}"
        ) from error


def place_from(url: str | None, data_dir: Path | None, **given: Any) -> tuple[Settings, str | None]:
    """Where a command works: the settings, and the server's URL or None for the data directory.

    An option wins over the environment; where neither says anything, the data directory's default
    does. Exits with a sentence where both are named in the same place.
    """
    settings = settings_from(url=url, data_dir=data_dir, **given)
    if url is not None and data_dir is not None:
        raise fail("--url and --data-dir are both given; a command talks to one of them")
    if data_dir is not None or settings.url is None:
        return settings, None
    if url is None and "data_dir" in settings.model_fields_set:
        raise fail(
            "GRAFTWORK_URL and GRAFTWORK_DATA_DIR are both set; say which with --url or --data-dir"
        )
    return settings, settings.url


def connect(url: str) -> RemoteServer:
    """A running server, with the key that the environment has for it.

    Raises:
        ServerRefused: not a server's URL.
    """
    from server.cli.http_client import RemoteServer

    return RemoteServer(url, api_key=api_key())


def api_key() -> str | None:
    """The key for running servers. It has no option: a command line can be read by other users."""
    key = settings_from().api_key
    return None if key is None else key.get_secret_value()


def fail(message: str) -> typer.Exit:
    """What to raise to end with a sentence on standard error and status 2."""
    say(f"[red]graftwork:[/red] {escape(message)}")
    return typer.Exit(2)


def say(line: str) -> None:
    """Print a line of rich's markup on standard error; never wrapped, so that it can be searched."""
    err.print(line, highlight=False, soft_wrap=True)


def tell(line: str) -> None:
    """Print a line as it is on standard output; never wrapped, so that it can be copied."""
    out.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table on standard output: as wide as a terminal, and as wide as it is anywhere else."""
    if out.is_terminal:
        out.print(table)
        return
    # In a pipe or a file nothing may be cut, whatever COLUMNS says: somebody searches in it.
    wide = Console(width=_WIDEST)
    wide.width = max(out.width, wide.measure(table).maximum)
    wide.print(table, crop=False)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def prepare_base(settings: Settings) -> None:
    """Make the default base if that is the one asked for and it is not there yet."""
    if Path(settings.base) != DEFAULT_BASE:
        return
    from server.base.convert import TargetTaken, prepare_default_base
    from server.base.fetch import FetchFailed

    try:
        prepare_default_base(DEFAULT_BASE)
    except (FetchFailed, TargetTaken) as error:
        raise fail(str(error)) from error
