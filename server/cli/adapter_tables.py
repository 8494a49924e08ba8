"""How `graftwork adapters` shows records of adapters, as `GET /adapters/{name}` has them, to people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from server.cli.options import print_json, say, tell

Shown = Mapping[str, Any]

# What a person wants to know first, in this order; --json has all of it.
_SHOWN = (
    ("digest", "digest"),
    ("method", "peft_type"),
    ("virtual tokens", "num_virtual_tokens"),
    ("bytes", "bytes"),
    ("status", "status"),
    ("residency", "residency"),
    ("created", "created_at"),
    ("source", "source"),
    ("description", "description"),
    ("template", "template"),
    ("labels", "labels"),
    ("target separator", "target_separator"),
    ("ends with eos", "append_eos"),
    ("base", "base_model_name_or_path"),
    ("base digest", "base_digest"),
    ("job", "job_id"),
    ("metrics", "metrics"),
    ("requests", "counters"),
    ("warnings", "warnings"),
)
_RECIPE = ("method", "num_rows", "trainable_params", "config", "hyperparameters")
_MOST_CHARACTERS = 400
_NOTHING: tuple[Any, ...] = (None, [], {})
_COLUMNS = ("version", "method", "tokens", "bytes", "status", "residency")


def table_of(records: Sequence[Shown]) -> Table:
    """Adapters, one a line."""
    name = Column("name", overflow="fold")
    table = Table(name, *_COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
    for one in records:
        method, tokens = one["peft_type"].lower(), one["num_virtual_tokens"]
        words = (one["name"], one["version"], method, tokens, one["bytes"])
        table.add_row(*(Text(str(word)) for word in (*words, one["status"], one["residency"])))
    return table


def details_of(shown: Shown) -> Table:
    """One adapter, a line for each thing that is known of it."""
    rows: list[tuple[str, Any]] = [("name", f"{shown['name']}@{shown['version']}")]
    # White space alone would not be seen.
    quoted = {**shown, "target_separator": repr(shown["target_separator"])}
    rows += [(label, quoted.get(key)) for label, key in _SHOWN]
    recipe = shown["recipe"] or {}
    rows += [(f"recipe: {key}", recipe.get(key)) for key in _RECIPE if recipe]
    rows += _versions(shown["versions"])
    table = Table("what", Column("value", overflow="fold"), show_header=False, box=None)
    for label, value in rows:
        if value not in _NOTHING:
            table.add_row(label, Text(_shortened(_text(value))))
    return table


def tell_record(record: Shown, said: str, *, as_json: bool) -> None:
    """Print a record: as JSON, or its name and version with what is said of it."""
    if as_json:
        print_json(record)
    else:
        tell(f"{record['name']}@{record['version']} {said}")


def tell_added(one: Shown) -> None:
    """Say what came of one folder: on standard output, or why it was refused on standard error."""
    if "error" in one:
        say(f"[red]graftwork:[/red] {escape(one['path'])}: {escape(one['error'])}")
        return
    what = "registered" if one["created"] else "was there already"
    facts = f"({one['peft_type']}, {one['digest'][:12]})"
    tell(f"{one['name']}@{one['version']} {what} {facts}")
    for warning in one["warnings"]:
        say(f"[yellow]graftwork:[/yellow] {escape(warning)}")


def _versions(versions: Sequence[Shown]) -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []
    for one in versions:
        facts = [one["created_at"][:19], one["digest"][:12], one["status"], *one["aliases"]]
        facts += ["default"] if one["is_default"] else []
        told.append((f"version {one['version']}", " ".join(facts)))
    return told


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
