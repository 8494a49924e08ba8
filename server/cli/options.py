"""Options that several commands have, and what they mean: settings, and where a command works.

An option left out is None, so that the environment and the defaults have their say. Knows no command.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import ValidationError

from adapters.field_errors import explain
from server.cli.render import errors_as_lines, fail, warn
from server.config.settings import Settings

if TYPE_CHECKING:
    from server.cli.backend import Backend


Description = Annotated[
    str | None, typer.Option("--description", help="Free text, stored with the adapter.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]

_SHORT = {"base": "-b", "data_dir": "-d", "port": "-p"}
# Options of another type than their setting, which checks them more closely.
_TYPES: dict[str, type] = {
    "adapter_dir": Path,
    "load_dirs": str,
    "log_format": str,
    "log_level": str,
    "threads": int,
    "train_threads": int,
    "train_memory_mib": int,
}

Command = Callable[..., None]


def takes_settings(*names: str) -> Callable[[Command], Command]:
    """Give a command an option for each of these settings; its parameter `settings` receives them.

    With "url" among them, `settings.url` is the server that the command works on, or None for the
    data directory. Exits with a sentence on a wrong value.
    """
    return takes_options(*names, read=lambda given: _resolved(**given))


def takes_options(
    *names: str, read: Callable[[dict[str, Any]], Any]
) -> Callable[[Command], Command]:
    """As `takes_settings`, with what `read` makes of the options that are given."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            options = {name: arguments.pop(name) for name in names}
            given = {name: value for name, value in options.items() if value is not None}
            command(settings=read(given), **arguments)

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            parameters += map(_parameter, names) if name == "settings" else [parameter]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    """The command-line option of a setting; left out it is None."""
    field = Settings.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    if bool in (field.annotation, *get_args(field.annotation)):
        flag = f"{flag}/--no-{flag[2:]}"
    option = typer.Option(
        *(flag, _SHORT[name]) if name in _SHORT else (flag,),
        help=f"{field.description} [{_default(field.default)}GRAFTWORK_{name.upper()}]",
        show_default=False,
    )
    kind: Any = _TYPES.get(name, field.annotation)
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _default(value: object) -> str:
    return "" if value in (None, ()) else f"default: {value}; "


def settings_from(**given: Any) -> Settings:
    """The settings, with the options that were given; exits with a sentence on a wrong one."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        found = explain([first])
        name, variable = str(first["loc"][0]), f"GRAFTWORK_{str(first['loc'][0]).upper()}"
        place = f"--{name.replace('_', '-')}" if name in given else variable
        raise fail(f"{place}: expected {found.expected}, came {found.came}") from error


def as_option(field: str) -> str:
    """What a field of a request is called on the command line: its own option."""
    return f"--{field.rpartition('.')[2].replace('_', '-')}"


def _resolved(url: str | None = None, data_dir: Path | None = None, **given: Any) -> Settings:
    """The settings, with the URL of the server that is meant, or None for the data directory.

    An option wins over the environment; where neither says anything, the data directory's default
    does. Exits with a sentence where both are named in the same place.
    """
    settings = settings_from(url=url, data_dir=data_dir, **given)
    if url is not None and data_dir is not None:
        raise fail("--url and --data-dir are both given; a command talks to one of them")
    if data_dir is not None:
        return settings.model_copy(update={"url": None})
    if settings.url is not None and url is None and "data_dir" in settings.model_fields_set:
        raise fail(
            "GRAFTWORK_URL and GRAFTWORK_DATA_DIR are both set; say which with --url or --data-dir"
        )
    return settings


@contextmanager
def open_backend(
    settings: Settings, *, create: bool = False, reads_base: bool = False, jobs: bool = False
) -> Iterator[Backend]:
    """The data directory or the running server that is meant; refusals end the command with one line.

    Args:
        settings: as `takes_settings` gives them.
        create: whether the directory is made if it is not there.
        reads_base: whether adapters are added or combined; makes the default base if it is not there.
        jobs: whether it is about jobs, not adapters.
    """
    if settings.url is None and reads_base:
        if not create:
            from server.cli.in_process import require_data_dir

            with errors_as_lines():
                require_data_dir(settings.data_dir)
        prepare_base(settings, needs_tokenizer=False)
    with errors_as_lines(), _opened(settings, create, reads_base, jobs) as backend:
        yield backend


def _opened(settings: Settings, create: bool, reads_base: bool, jobs: bool) -> Backend:
    if settings.url is not None:
        return connect(settings)
    from server.cli.in_process import DataDirectory

    return DataDirectory(settings, create=create, reads_base=reads_base, jobs=jobs)


def connect(settings: Settings) -> Backend:
    """The running server at `settings.url`, with the key that the environment has for it.

    Raises:
        ServerRefused: not a server's URL.
    """
    from server.cli.backend import Backend
    from server.cli.http_client import RemoteServer

    def on_loading() -> None:
        warn(f"{settings.url} is still loading its base; waiting for it", "yellow")

    key = api_key(settings)
    return Backend(RemoteServer(settings.url or "", api_key=key, on_loading=on_loading))


def require_url(settings: Settings, command: str, why: str = "") -> str:
    """The URL of a running server; exits with a sentence where none is named."""
    if settings.url is None:
        raise fail(
            f"{command} needs a running server: --url http://127.0.0.1:8000, or GRAFTWORK_URL{why}"
        )
    return settings.url


def api_key(settings: Settings) -> str | None:
    """The key for running servers. It has no option: a command line can be read by other users."""
    return None if settings.api_key is None else settings.api_key.get_secret_value()


def check_base(settings: Settings, *, needs_tokenizer: bool = True) -> None:
    """Refuse a base whose files show that it cannot be served; the default one may not be there yet."""
    if settings.is_default_base:
        return
    from adapters.errors import BaseUnsupported
    from server.base.check import check_base as check

    try:
        check(settings.base, settings.revision, needs_tokenizer=needs_tokenizer)
    except BaseUnsupported as error:
        raise fail(f"--base: {error.message}") from error


def prepare_base(settings: Settings, *, needs_tokenizer: bool = True) -> None:
    """Check the base; make the default one if the settings name it and it is not there yet."""
    check_base(settings, needs_tokenizer=needs_tokenizer)
    if not settings.is_default_base:
        return
    from server.base.convert import TargetTaken, prepare_default_base
    from server.base.fetch import FetchFailed

    directory = Path(settings.base)
    try:
        prepare_default_base(directory)
    except (FetchFailed, TargetTaken) as error:
        raise fail(str(error)) from error
    except OSError as error:
        raise fail(
            f"{directory}: the default base cannot be made there: {error.strerror or error}; name "
            "another place with GRAFTWORK_CACHE_DIR, or another base with --base"
        ) from error
