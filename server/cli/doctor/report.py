"""Prints what the doctor found.

Importable where our other packages are hidden or the dependencies are wrong: that is when it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import typer
from rich.console import Console
from rich.markup import escape

from server.cli.doctor import check_installation
from server.cli.doctor.finding import Finding

EXIT_FOUND_FAILURE = 1
_COLOURS = {"ok": "green", "warning": "yellow", "fail": "red"}


def broken_installation() -> int:
    """Say why the rest of the command line cannot be imported; the exit status."""
    findings = (finding for group in check_installation() for finding in group)
    return show_all(findings, as_json=False)


def show_all(findings: Iterator[Finding], *, as_json: bool) -> int:
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


def _show(finding: Finding) -> None:
    colour = _COLOURS[finding.status]
    console = Console()
    mark = f"[{colour}]{finding.status:<7}[/{colour}]"
    line = f"{mark}  {finding.check:<14}  {escape(finding.message)}"
    console.print(line, highlight=False, soft_wrap=True)
    if finding.hint is not None:
        console.print(f"{'':25}{escape(finding.hint)}", highlight=False, soft_wrap=True)
