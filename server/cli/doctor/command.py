"""`graftwork doctor`: what would be checked, from its options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from server.cli.doctor import Finding, check_installation, examine, read_settings
from server.cli.doctor.report import show_all
from server.cli.options import (
    AsJson,
    Base,
    BaseName,
    DataDir,
    Device,
    DtypeOption,
    Revision,
    Threads,
    Url,
    option,
)


def add_commands(app: typer.Typer) -> None:
    """Hang this file's command into the command line."""
    app.command()(doctor)


def doctor(
    base: Base = None,
    revision: Revision = None,
    base_name: BaseName = None,
    data_dir: DataDir = None,
    host: Annotated[str | None, option("host", "--host")] = None,
    port: Annotated[int | None, option("port", "--port")] = None,
    dtype: DtypeOption = None,
    device: Device = None,
    threads: Threads = None,
    url: Url = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also hash every adapter and load the base's weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check whether Graftwork would run here, and say what to do.

    Packages, settings, device, port, base, data directory, adapters. Nothing is
    changed. Each line is ok, warning or fail, and says what to do; exit status
    1 where something fails.

    graftwork doctor --base /models/llama --data-dir /var/lib/graftwork --deep
    """
    given = {
        "base": base,
        "revision": revision,
        "base_name": base_name,
        "data_dir": data_dir,
        "host": host,
        "port": port,
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "url": url,
    }
    known = {name: value for name, value in given.items() if value is not None}
    raise typer.Exit(show_all(_findings(known, deep=deep), as_json=as_json))


def _findings(given: dict[str, str | int | Path], *, deep: bool) -> Iterator[Finding]:
    for group in check_installation():
        yield from group
    settings, findings = read_settings(given)
    yield from findings
    if settings is not None:
        for group in examine(settings, settings.url, deep=deep):
            yield from group
