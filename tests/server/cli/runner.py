"""The command line in a test: run in this process, wide enough that no line is cut."""

from __future__ import annotations

import json
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from server.cli.main import app


def run(*arguments: object, text: str | None = None, **environment: str) -> Result:
    """Run `graftwork` with these words; `text` is its standard input."""
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, input=text, env={"COLUMNS": "250", **environment})


def run_json(*arguments: object, **options: Any) -> Any:
    """What a command that succeeds prints with --json."""
    result = run(*arguments, "--json", **options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*arguments: object, **options: Any) -> str:
    """The one line with which a command refuses, and nothing on standard output."""
    result = run(*arguments, **options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("graftwork: "), lines
    return lines[-1].removeprefix("graftwork: ")
