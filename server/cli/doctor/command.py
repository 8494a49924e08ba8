"""`graftwork doctor`: what would be checked, from its options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from server.cli.doctor import Finding, check_installation, examine, read_settings
from server.cli.doctor.report import show_all
from server.cli.options import (
    AsJson,
    takes_options,
)


def add_commands(app: typer.Typer) -> None:
    """Hang this file's command into the command line."""
    app.command()(doctor)


@takes_options(
    "base",
    "revision",
    "base_name",
    "data_dir",
    "host",
    "port",
    "dtype",
    "device",
    "threads",
    "url",
    read=dict,
)
def doctor(
    *,
    settings: dict[str, Any],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also hash every adapter and load the base's weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check whether Graftwork would run here, and say what to do.

    Packages, settings, device, port, base, data directory, adapters. Nothing is
    changed. Each line is ok, warning or fail, and says what to do; exit status
    1 where something fails.

    \b
    graftwork doctor --base /models/llama --data-dir /var/lib/graftwork --deep
    """
    raise typer.Exit(show_all(_findings(settings, deep=deep), as_json=as_json))


def _findings(given: dict[str, Any], *, deep: bool) -> Iterator[Finding]:
    for group in check_installation():
        yield from group
    settings, findings = read_settings(given)
    yield from findings
    if settings is not None:
        for group in examine(settings, settings.url, deep=deep):
            yield from group
