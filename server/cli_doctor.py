"""`graftwork doctor`: prints what `server.doctor` found.

Importable where our other packages are hidden or the dependencies are wrong: that is when it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from server.cli_options import (
    AsJson,
    Base,
    DataDir,
    Device,
    DtypeOption,
    Revision,
    Threads,
    Url,
    option,
)
from server.doctor import Finding, check_installation, examine, read_settings

EXIT_FOUND_FAILURE = 1
_COLOURS = {"ok": "green", "warning": "yellow", "fail": "red"}


def add_commands(app: typer.Typer) -> None:
    """Hang this file's command into the command line."""
    app.command()(doctor)


def doctor(
    base: Base = None,
    revision: Revision = None,
    base_name: Annotated[str | None, option("base_name", "--base-name")] = None,
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
    raise typer.Exit(_show_all(_findings(known, deep=deep), as_json=as_json))


def broken_installation() -> int:
    """Say why the rest of the command line cannot be imported; the exit status."""
    findings = (finding for group in check_installation() for finding in group)
    return _show_all(findings, as_json=False)


def _show_all(findings: Iterator[Finding], *, as_json: bool) -> int:
    """Print findings as they come; 1 if one of them is a failure."""
    found: list[Finding] = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            _show(finding)
    failed = sum(one.status == "fail" for one in found)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], ensure_ascii=False))
    else:
        warned = sum(one.status == "warning" for one in found)
        typer.echo(f"{len(found)} checks, {warned} warnings, {failed} failed")
    return EXIT_FOUND_FAILURE if failed else 0


def _findings(given: dict[str, str | int | Path], *, deep: bool) -> Iterator[Finding]:
    for group in check_installation():
        yield from group
    settings, findings = read_settings(given)
    yield from findings
    if settings is not None:
        for group in examine(settings, settings.url, deep=deep):
            yield from group


def _show(finding: Finding) -> None:
    colour = _COLOURS[finding.status]
    console = Console()
    mark = f"[{colour}]{finding.status:<7}[/{colour}]"
    line = f"{mark}  {finding.check:<14}  {escape(finding.message)}"
    console.print(line, highlight=False, soft_wrap=True)
    if finding.hint is not None:
        console.print(f"{'':25}{escape(finding.hint)}", highlight=False, soft_wrap=True)
