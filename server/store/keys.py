"""API keys in the data directory's database. Only `revoked_at` and `last_used_at` of a row ever change.

The permissions of a key are fixed at creation: to change them, create another key and revoke the first. A
key cached in memory can therefore be stale only in its revocation. Independent of HTTP; never stores the
text of a key.
"""

from __future__ import annotations

import builtins
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from server.errors import KeyInvalid, KeyNotFound
from server.store.database import Database
from server.store.key import SCOPES, Key, Scope, digest_of, id_in, new_text
from server.store.rates import MAX_REQUESTS, MAX_TOKENS, checked_limit
from server.store.tables import KeyRow

_MAX_NAME = 100
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ADAPTER = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\*?")


@dataclass(frozen=True)
class NewKey:
    """A key that was just made, with the only copy of its text."""

    key: Key
    text: str


class KeyStore:
    """All keys of one data directory. Safe between threads and processes.

    Args:
        root: the data directory; it must exist.
        clock: Unix time.

    Raises:
        RegistryError: the database cannot be used.
        StorageFull: the database could not be created.
    """

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._database = Database(root / "registry.db")

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

    def create(
        self,
        name: str,
        scopes: Collection[str],
        *,
        adapters: Collection[str] | None = None,
        tenant: str | None = None,
        rate: str | None = None,
        tokens: str | None = None,
        expires_in: timedelta | None = None,
    ) -> NewKey:
        """Create a key; its text is returned here and stored nowhere.

        Args:
            name: display name, not necessarily unique.
            scopes: at least one.
            adapters: see `Key`.
            tenant: see `Key`.
            rate: such as "60/minute".
            tokens: such as "100000/day".
            expires_in: from now; None is never.

        Raises:
            KeyInvalid: an argument is invalid; nothing was stored.
            StorageFull: the disk is full; nothing was stored.
        """
        text, now = new_text(), self.now()
        row = KeyRow(
            id=cast(str, id_in(text)),
            name=_name(name),
            digest=digest_of(text).hex(),
            scopes=_scopes(scopes, adapters),
            adapters=_adapters(adapters),
            tenant=_tenant(tenant),
            rate=None if rate is None else checked_limit("rate", rate, MAX_REQUESTS),
            tokens=None if tokens is None else checked_limit("tokens", tokens, MAX_TOKENS),
            created_at=now,
            expires_at=_end(now, expires_in),
        )
        with self._database.write() as session:
            session.add(row)
            session.flush()
            return NewKey(_key(row), text)

    def list(self) -> builtins.list[Key]:
        """Every key, oldest first, including revoked and expired ones."""
        statement = select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
        with self._database.read() as session:
            return [_key(row) for row in session.scalars(statement)]

    def revoke(self, key_id: str) -> Key:
        """Revoke a key; a revoked key is left unchanged.

        Raises:
            KeyNotFound: no such key.
        """
        with self._database.write() as session:
            row = _row(session, key_id)
            row.revoked_at = row.revoked_at or self.now()
            return _key(row)

    def note_used(self, times: Mapping[str, datetime]) -> None:
        """Record when keys were last used, by id; unknown ids are ignored."""
        with self._database.write() as session:
            for key_id, at in times.items():
                session.execute(update(KeyRow).where(KeyRow.id == key_id).values(last_used_at=at))

    def now(self) -> datetime:
        """The current time, used for expiry."""
        return datetime.fromtimestamp(self._clock(), UTC)


def _row(session: Session, key_id: str) -> KeyRow:
    row = session.get(KeyRow, key_id)
    if row is None:
        came = ascii(key_id)[1:-1][:40]
        raise KeyNotFound(f"there is no key {came!r}", field="id", came=came)
    return row


def _key(row: KeyRow) -> Key:
    return Key(
        id=row.id,
        name=row.name,
        digest=bytes.fromhex(row.digest),
        # Ignore scopes of newer versions.
        scopes=frozenset(scope for scope in SCOPES if scope in row.scopes),
        adapters=None if row.adapters is None else tuple(row.adapters),
        tenant=row.tenant,
        rate=row.rate,
        tokens=row.tokens,
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
    )


# --- what a key may be ------------------------------------------------------------------------------


def _invalid(field: str, expected: str, came: str) -> KeyInvalid:
    shown = ascii(came)[1:-1][:80]
    return KeyInvalid(
        f"{field}: expected {expected}, came {shown!r}", field=field, expected=expected, came=shown
    )


def _name(name: str) -> str:
    if not name.strip() or len(name) > _MAX_NAME or not name.isprintable():
        raise _invalid("name", f"1 to {_MAX_NAME} printable characters", name)
    return name


def _scopes(scopes: Collection[str], adapters: Collection[str] | None) -> builtins.list[Scope]:
    expected = f"one or more of {', '.join(SCOPES)}"
    for scope in scopes:
        if scope not in SCOPES:
            raise _invalid("scope", expected, scope)
    if not scopes:
        raise _invalid("scope", expected, "none")
    if "admin" in scopes and adapters is not None:
        raise _invalid("adapter", "none beside the scope admin, which may use all", "some")
    return [scope for scope in SCOPES if scope in scopes]


def _adapters(adapters: Collection[str] | None) -> builtins.list[str] | None:
    if adapters is None:
        return None
    for name in adapters:
        if not _ADAPTER.fullmatch(name) or ".." in name:
            raise _invalid("adapter", "an adapter's name, or a beginning of names and *", name)
    if not adapters:
        raise _invalid("adapter", "at least one, or no list at all", "an empty list")
    return sorted(set(adapters))


def _tenant(tenant: str | None) -> str | None:
    if tenant is not None and not _TENANT.fullmatch(tenant):
        raise _invalid("tenant", "up to 63 letters, digits and ._-", tenant)
    return tenant


def _end(now: datetime, expires_in: timedelta | None) -> datetime | None:
    if expires_in is None:
        return None
    try:
        end = now + expires_in
    except OverflowError:
        end = now
    if end <= now:
        raise _invalid("expires", "a time from now on", str(expires_in))
    return end
