"""How `graftwork adapters` shows records of adapters, as `GET /adapters/{name}` has them, to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from server.cli.render import cell, print_json, print_line, warn

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
_NOTHING: tuple[Any, ...] = (None, [], {})
_COLUMNS = ("version", "method", "tokens", "bytes", "status", "residency")
# Of a running server's requests; a data directory has none.
_COUNTED = ("requests", "last use")


# Of `table_of`: what a narrow terminal does without, the first ones first.
EXPENDABLE = ("residency", "last use", "bytes", "tokens", "requests", "status")


def table_of(records: Sequence[Shown]) -> Table:
    """Adapters, one a line."""
    # Names are copied from here: never folded.
    name = Column("name", no_wrap=True, overflow="fold")
    counted = _COUNTED if any("counters" in one for one in records) else ()
    table = Table(name, *_COLUMNS, *counted, box=box.SIMPLE_HEAD, pad_edge=False)
    for one in records:
        method, tokens = one["peft_type"].lower(), one["num_virtual_tokens"]
        cells = (one["name"], one["version"], method, tokens, one["bytes"])
        cells = (*cells, one["status"], one["residency"], *_use(one, len(counted)))
        table.add_row(*(Text(str(value)) for value in cells))
    return table


def _use(record: Shown, num_columns: int) -> tuple[object, ...]:
    """Requests and the last one's time, for a table with so many columns about them."""
    counters = record.get("counters") or {}
    last = str(counters.get("last_used_at") or "-")[:19].replace("T", " ")
    return (counters.get("requests", 0), last)[:num_columns]


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
            table.add_row(label, Text(cell(value)))
    return table


def print_record(record: Shown, remark: str, *, as_json: bool) -> None:
    """Print a record: as JSON, or its name and version with a remark."""
    if as_json:
        print_json(record)
    else:
        print_line(f"{record['name']}@{record['version']} {remark}")


def print_added(one: Shown, printed: set[str]) -> None:
    """Report one folder: its adapter on standard output, or its refusal on standard error.

    Args:
        one: its record, or `path` and `error`.
        printed: warnings that were printed before, and are not again; grows.
    """
    if "error" in one:
        path, said = one["path"], one["error"]
        warn(said if said.startswith(path) else f"{path}: {said}")
        return
    what = "registered" if one["created"] else "was there already"
    facts = f"({one['peft_type']}, {one['digest'][:12]})"
    print_line(f"{one['name']}@{one['version']} {what} {facts}")
    for warning in one["warnings"]:
        if warning not in printed:
            warn(warning, "yellow")
        printed.add(warning)


def _versions(versions: Sequence[Shown]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for one in versions:
        facts = [one["created_at"][:19], one["digest"][:12], one["status"], *one["aliases"]]
        facts += ["default"] if one["is_default"] else []
        rows.append((f"version {one['version']}", " ".join(facts)))
    return rows
