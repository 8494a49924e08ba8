"""`graftwork`: the verbs of the command line.

    graftwork serve      serve a base and its adapters over HTTP
    graftwork demo       install the demo adapters and measure them
    graftwork generate   prompts or rows in, texts out
    graftwork eval       accuracy of adapters and the base, side by side
    graftwork adapters   list, show, add, remove, rollback, alias, download, preload, unload, combine,
                         merge
    graftwork train      rows of a file become an adapter
    graftwork jobs       list, show, cancel, remove, log, events of training jobs
    graftwork worker     run training jobs apart from a server
    graftwork keys       make, list and revoke API keys
    graftwork bench      put load on a server
    graftwork doctor     would it run here, and what to do where it would not
    graftwork settings   every setting with its default

Most of them work on a data directory (--data-dir) or with a running server (--url). Status 2 is a
refusal, status 1 a failure that was found. This file is serve, demo and settings; the others have
their own.

Options win over the environment, the environment over defaults. Knows no engine and no route.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from server.cli import adapters, bench, combine, evaluate, generate, jobs, keys, train
from server.cli.command_group import CommandGroup
from server.cli.doctor import command as doctor
from server.cli.options import (
    AsJson,
    check_base,
    prepare_base,
    takes_settings,
)
from server.cli.render import (
    err,
    fail,
    print_json,
    print_line,
    print_table,
)
from server.config.settings import Settings

if TYPE_CHECKING:
    from server.cli.demo import Accuracy


def _with_dashes(word: str) -> str:
    """An option as it is meant where it is typed like a field: --learning_rate."""
    return word.replace("_", "-")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print_line(f"graftwork {version('graftwork')}")
        raise typer.Exit


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    context_settings={
        "token_normalize_func": _with_dashes,
        "help_option_names": ["--help", "-h"],
    },
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Serve many PEFT adapters on one frozen base model."""


@app.command()
@takes_settings(
    "base",
    "revision",
    "base_name",
    "data_dir",
    "host",
    "port",
    "require_keys",
    "dtype",
    "device",
    "threads",
    "adapter_dir",
    "load_dirs",
    "train_workers",
    "max_running",
    "kv_mib",
    "batching",
    "log_format",
    "log_level",
)
def serve(
    *,
    settings: Settings,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo/--no-demo",
            help="Install the demo adapters that are not there yet, and measure them.",
        ),
    ] = False,
) -> None:
    """Serve a base model and its adapters over HTTP.

    Without options: the default base (made on first use in the user's cache),
    adapters in .graftwork/data, on http://127.0.0.1:8000, documented under
    /docs.

    Add an adapter that PEFT saved with graftwork adapters add, and use it with
    POST /generate?adapter=NAME. More settings: graftwork settings.

    \b
    graftwork serve --base /models/llama --data-dir /var/lib/graftwork
    """
    raise typer.Exit(_serve(settings, with_demo=demo))


@app.command()
@takes_settings("base", "data_dir", "dtype", "device", "threads")
def demo(*, settings: Settings, as_json: AsJson = False) -> None:
    """Install the demo adapters and measure them.

    Accuracy on the 20 held-out messages of the demo.

    \b
    graftwork demo
    """
    prepare_base(settings)
    asyncio.run(_demo(settings, as_json=as_json))


def show_settings(as_json: AsJson = False) -> None:
    """List every setting: its variable, its default, what it does.

    \b
    graftwork settings
    """
    table = Table("variable", "default", "what it does", show_lines=False, expand=True)
    listed = []
    for name, field in Settings.model_fields.items():
        default = None if field.default is None else str(field.default)
        variable = f"GRAFTWORK_{name.upper()}"
        listed.append({"variable": variable, "default": default, "description": field.description})
        table.add_row(variable, default or "", field.description)
    if as_json:
        print_json(listed)
    else:
        print_table(table)


# In the order of the help.
generate.add_commands(app)
app.add_typer(adapters.adapters_app, name="adapters")
combine.add_commands(adapters.adapters_app)
train.add_commands(app)
jobs.add_commands(app)
evaluate.add_commands(app)
bench.add_commands(app)
keys.add_commands(app)
app.command("settings")(show_settings)
doctor.add_commands(app)


def main() -> None:
    """Entry point of the console script."""
    app()


def _serve(settings: Settings, *, with_demo: bool) -> int:
    """Run until a signal; the exit status."""
    from server.engine.client import EngineClient
    from server.logs import configure

    configure(settings.log_format, settings.log_level)
    check_base(settings)
    _require_data_dir(settings)
    bound = _bind(settings)
    prepare_base(settings)
    port = bound.getsockname()[1]
    client = EngineClient(settings.engine_config())
    client.launch()
    # These take as long to import as the engine does.
    from server.api.error_replies import refusal_reply
    from server.app import create_app
    from server.http.uvicorn_server import GraftworkServer
    from server.services import Services

    async def on_ready(services: Services) -> None:
        if with_demo:
            await _install_and_measure(services)
        _greet(services, port)

    async def on_failure(services: Services) -> None:
        err.print(f"[red]graftwork:[/red] {services.failure}", highlight=False)
        server.should_exit = True

    app = create_app(settings, client=client, on_ready=on_ready, on_failure=on_failure)
    server = GraftworkServer(app, settings, refusal_reply)
    server.run(sockets=[bound])
    failed = server.services is None or server.services.failure is not None
    return 1 if failed and not server.signalled else 0


def _require_data_dir(settings: Settings) -> None:
    from adapters.errors import StorageUnavailable
    from server.store.data_dir import require_writable

    try:
        require_writable(settings.data_dir)
    except StorageUnavailable as error:
        raise fail(error.message) from error


def _bind(settings: Settings) -> socket.socket:
    """Take the port before anything is loaded, so that a port in use is reported at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on connections of a socket that names its protocol; without it every
    # reply waits some 40 ms between headers and body for the client's delayed acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        why = f"cannot listen on {settings.host}:{settings.port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            why = (
                f"port {settings.port} of {settings.host} is in use: end what listens there, or choose "
                "another with --port"
            )
        raise fail(why) from None
    return bound


async def _install_and_measure(services: Any) -> None:
    from adapters.errors import AdapterError
    from server.cli.demo import install_demo, measure

    try:
        new = await install_demo(services)
    except AdapterError as error:
        err.print(f"[red]graftwork:[/red] no demo adapters: {error.message}", highlight=False)
        return
    if not new:
        return
    err.print(_accuracies([await measure(services.generator, one) for one in new]))


def _accuracies(results: Sequence[Accuracy]) -> Table:
    table = Table("adapter", "method", "held-out messages answered exactly")
    for result in results:
        table.add_row(result.name, result.method, f"{result.num_right} of {result.num_messages}")
    return table


def _greet(services: Any, port: int) -> None:
    from server.cli.demo import SHOWN, curl_line
    from server.demo.install import demo_adapters

    host = services.settings.host
    err.print(
        f"Graftwork serves {services.base_id} ({services.client.base.dtype}) "
        f"on http://{host}:{port}, documented under /docs; "
        f"ready after {time.time() - services.started_at:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    shown = next((one for one in demo_adapters() if one.name == SHOWN), None)
    names = {record.name for record in services.registry.list(limit=100_000)}
    if shown is not None and SHOWN in names:
        err.print("Try it:")
        # Not wrapped: the line must work when it is copied.
        err.print(
            curl_line(host, port, shown), soft_wrap=True, markup=False, highlight=False, emoji=False
        )


async def _demo(settings: Settings, *, as_json: bool) -> None:
    from adapters.errors import AdapterError
    from server.app import close_services, open_services, start_engine

    services = open_services(settings)
    try:
        services.generator = await start_engine(services)
        from server.cli.demo import install_demo, measure
        from server.demo.install import demo_adapters

        await install_demo(services)
        results = [await measure(services.generator, one) for one in demo_adapters()]
        if as_json:
            print_json([asdict(result) for result in results])
        else:
            print_table(_accuracies(results))
    except AdapterError as error:
        raise fail(error.message) from error
    finally:
        await close_services(services)
