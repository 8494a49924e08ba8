"""Options that several commands have, and what they mean: settings, and where a command works.

An option left out is None, so that the environment and the defaults have their say. Knows no command.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from server.cli.render import errors_as_lines, fail
from server.config.settings import DEFAULT_BASE, Dtype, Settings

if TYPE_CHECKING:
    from server.cli.backend import Backend


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
BaseName = Annotated[str | None, option("base_name", "--base-name")]
Revision = Annotated[str | None, option("revision", "--revision")]
DataDir = Annotated[Path | None, option("data_dir", "--data-dir", "-d")]
DtypeOption = Annotated[Dtype | None, option("dtype", "--dtype")]
Device = Annotated[str | None, option("device", "--device")]
Threads = Annotated[int | None, option("threads", "--threads")]
TrainWorkers = Annotated[int | None, option("train_workers", "--train-workers")]
Url = Annotated[str | None, option("url", "--url")]
Description = Annotated[str | None, typer.Option("--description")]
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


@contextmanager
def open_backend(
    url: str | None,
    data_dir: Path | None,
    *,
    create: bool = False,
    reads_base: bool = False,
    jobs: bool = False,
    **given: Any,
) -> Iterator[Backend]:
    """The data directory or the running server that is meant; refusals end the command with one line.

    Args:
        url: the option.
        data_dir: the option.
        create: whether the directory is made if it is not there.
        reads_base: whether adapters are added or combined; makes the default base if it is not there.
        jobs: whether it is about jobs, not adapters.
        given: other options that are settings.
    """
    settings, chosen = place_from(url, data_dir, **given)
    if chosen is None and reads_base:
        prepare_base(settings)
    with errors_as_lines():
        if chosen is None:
            from server.cli.in_process import DataDirectory

            backend: Backend = DataDirectory(
                settings, create=create, reads_base=reads_base, jobs=jobs
            )
        else:
            backend = connect(chosen)
        with backend:
            yield backend


def connect(url: str) -> Backend:
    """A running server, with the key that the environment has for it.

    Raises:
        ServerRefused: not a server's URL.
    """
    from server.cli.backend import Backend
    from server.cli.http_client import RemoteServer

    return Backend(RemoteServer(url, api_key=api_key()))


def running_server_url(url: str | None, command: str, why: str = "") -> str:
    """The URL of a running server, for a command that needs one; exits with a sentence without."""
    _, chosen = place_from(url, None)
    if chosen is None:
        raise fail(
            f"{command} needs a running server: --url http://127.0.0.1:8000, or GRAFTWORK_URL{why}"
        )
    return chosen


def api_key() -> str | None:
    """The key for running servers. It has no option: a command line can be read by other users."""
    key = settings_from().api_key
    return None if key is None else key.get_secret_value()


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
