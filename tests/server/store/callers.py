"""Callers with keys, as the stores see them."""

from __future__ import annotations

from datetime import UTC, datetime

from server.store.caller import Caller
from server.store.key import Key


def caller(owner: str, *adapters: str) -> Caller:
    """A caller with a key of this tenant, for these adapters or for all."""
    now = datetime.now(UTC)
    scopes = frozenset({"train"})
    key = Key("key-1", "", b"", scopes, adapters or None, owner, None, None, now, None, None, None)
    return Caller(key)
