"""What the commands share: options that stand for settings, and the ways to read and refuse them.

An option left out is None, so that the environment and the defaults have their say. Knows no command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from server.settings import DEFAULT_BASE, Dtype, Settings

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


def fail(message: str) -> typer.Exit:
    """What to raise to end with a sentence on standard error and status 2."""
    err.print(f"[red]graftwork:[/red] {message}", highlight=False)
    return typer.Exit(2)


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
