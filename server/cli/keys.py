"""`graftwork keys`: make, list and revoke the API keys of a data directory.

A running server sees the change within a second. A key's text is printed once, when it is made, and is
kept nowhere. Knows no engine and no server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from server.cli.command_group import CommandGroup
from server.cli.options import (
    AsJson,
    takes_settings,
)
from server.cli.render import (
    errors_as_lines,
    fail,
    print_json,
    print_line,
    print_table,
    say,
)
from server.config.settings import Settings
from server.store.key import SCOPES, Key

if TYPE_CHECKING:
    from server.store.keys import KeyStore

keys_app = typer.Typer(
    cls=CommandGroup,
    help="Make, list and revoke the API keys of a data directory.",
    no_args_is_help=True,
)

_TIMES = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_TIME = re.compile(r"([1-9][0-9]{0,6})([smhdw])")


def add_commands(app: typer.Typer) -> None:
    """Hang this file's commands into the command line."""
    app.add_typer(keys_app, name="keys")


@keys_app.command("create")
@takes_settings("data_dir")
def create_key(
    *,
    name: Annotated[str, typer.Option("--name", "-n", help="What people call the key.")],
    scope: Annotated[
        list[str],
        typer.Option("--scope", "-s", help=f"What it may do; repeatable: {', '.join(SCOPES)}."),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME",
            help="An adapter it may use; NAME* is all that begin so; repeatable. Left out: all.",
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", help="Keys of one tenant share files, jobs and cached prompts."),
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Requests in a time, such as 60/minute.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", help="Tokens in a time, prompts included: 100000/day."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help="Good for so long: 12h, 30d, 8w.")
    ] = None,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print it: it is shown this once.

    \b
    graftwork keys create --name web --scope generate --rate 60/minute
    """
    expires_in = None if expires is None else _duration(expires)
    with _store(settings, new=True) as store:
        made = store.create(
            name,
            scope,
            adapters=adapter or None,
            tenant=tenant,
            rate=rate,
            tokens=tokens,
            expires_in=expires_in,
        )
    if as_json:
        print_json({**key_json(made.key), "key": made.text})
        return
    say(f"{made.key.id}; the key itself is shown this once:")
    print_line(made.text)


@keys_app.command("list")
@takes_settings("data_dir")
def list_keys(*, settings: Settings, as_json: AsJson = False) -> None:
    """List the keys, without their texts.

    \b
    graftwork keys list
    """
    with _store(settings) as store:
        keys, now = store.list(), store.now()
    if as_json:
        print_json([key_json(key) for key in keys])
        return
    table = Table("id", "name", "scopes", "adapters", "tenant", "limits", "last used", "state")
    for key in keys:
        limits = ", ".join(
            f"{limit} {what}"
            for limit, what in ((key.rate, "requests"), (key.tokens, "tokens"))
            if limit
        )
        cells = (
            key.id,
            key.name,
            ", ".join(_ordered(key)),
            "all" if key.adapters is None else ", ".join(key.adapters),
            key.tenant or "",
            limits,
            _minute(key.last_used_at) or "never",
            _state(key, now),
        )
        table.add_row(*(Text(cell) for cell in cells))
    print_table(table)


@keys_app.command("revoke")
@takes_settings("data_dir")
def revoke_key(
    *,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As graftwork keys list shows it.")],
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Revoke a key: requests that have begun end, others are refused.

    \b
    graftwork keys revoke key-0123456789ab
    """
    with _store(settings) as store:
        key = store.revoke(key_id)
    if as_json:
        print_json(key_json(key))
    else:
        print_line(f"{key.id} ({key.name}) is revoked")


def key_json(key: Key) -> dict[str, Any]:
    """A key as JSON, without its text or its digest."""
    times = ("created_at", "expires_at", "last_used_at", "revoked_at")
    found: dict[str, datetime | None] = {name: getattr(key, name) for name in times}
    return {
        "id": key.id,
        "name": key.name,
        "scopes": _ordered(key),
        "adapters": None if key.adapters is None else list(key.adapters),
        "tenant": key.tenant,
        "rate": key.rate,
        "tokens": key.tokens,
        **{name: None if at is None else at.isoformat() for name, at in found.items()},
    }


@contextmanager
def _store(settings: Settings, *, new: bool = False) -> Iterator[KeyStore]:
    from server.store.keys import KeyStore

    root = settings.data_dir
    if not new and not (root / "registry.db").exists():
        raise fail(f"{root} is no data directory: it has no registry.db")
    with errors_as_lines():
        root.mkdir(parents=True, exist_ok=True)
        store = KeyStore(root)
        try:
            yield store
        finally:
            store.close()


def _duration(text: str) -> timedelta:
    found = _TIME.fullmatch(text)
    if found is None:
        raise fail(
            f"--expires: expected a number and one of s, m, h, d, w, such as 30d; came {text!r}"
        )
    return timedelta(**{_TIMES[found.group(2)]: int(found.group(1))})


def _ordered(key: Key) -> list[str]:
    return [scope for scope in SCOPES if scope in key.scopes]


def _minute(at: datetime | None) -> str:
    return "" if at is None else at.strftime("%Y-%m-%d %H:%M")


def _state(key: Key, now: datetime) -> str:
    if key.revoked_at is not None:
        return f"revoked {_minute(key.revoked_at)}"
    if not key.is_good(now):
        return f"expired {_minute(key.expires_at)}"
    return "good" if key.expires_at is None else f"good until {_minute(key.expires_at)}"
