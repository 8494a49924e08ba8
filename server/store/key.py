"""A key: what its text looks like, and what it allows.

    gw-0123456789ab-<64 hex digits>
       ^ id          ^ 256 random bits

The id is no secret: it finds the row, and names the key in lists and logs. Of the whole text only the
SHA-256 is kept. A slow hash such as Argon2 protects what people think up, by making each guess dear;
of 256 random bits nobody guesses any, and every request would pay. Knows no database and no HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

Scope = Literal["generate", "adapters:read", "adapters:write", "train", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_ID_BYTES, _SECRET_BYTES = 6, 32
_TEXT = re.compile(r"gw-([0-9a-f]{12})-[0-9a-f]{64}")
# Compared with where no key has the id, so that this takes as long as a wrong secret does.
_NOBODYS = bytes(hashlib.sha256().digest_size)


@dataclass(frozen=True)
class Key:
    """A key as it is kept; its text is not among what is kept.

    Attributes:
        id: "key-" and 12 hex digits.
        name: what people call it.
        digest: SHA-256 of its text.
        scopes: what it may do; "admin" may do everything.
        adapters: names it may use, and beginnings of names that end in `*`; None is all.
        tenant: keys of one tenant see one another's files and jobs, and share cached prompts; a key
            without one is its own.
        rate: requests in a time, such as "60 per 1 minute"; None is no limit.
        tokens: prompt and output tokens in a time, likewise.
        created_at: aware UTC time, as are the next three.
        expires_at: None is never.
        last_used_at: to about a minute; None before.
        revoked_at: None while it is good.
    """

    id: str
    name: str
    digest: bytes
    scopes: frozenset[Scope]
    adapters: tuple[str, ...] | None
    tenant: str | None
    rate: str | None
    tokens: str | None
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None

    def is_good(self, now: datetime) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def may(self, any_of: Collection[Scope]) -> bool:
        """Whether it has one of these scopes."""
        return "admin" in self.scopes or not self.scopes.isdisjoint(any_of)

    @property
    def owner(self) -> str:
        """Whose the files and jobs are that it makes, and the prompts that it leaves in the cache."""
        return self.id if self.tenant is None else f"tenant:{self.tenant}"


def new_text() -> str:
    """The text of a new key, from the system's source of randomness."""
    return f"gw-{secrets.token_hex(_ID_BYTES)}-{secrets.token_hex(_SECRET_BYTES)}"


def id_in(text: str) -> str | None:
    """The id of the key that a text could be; None if it could be none."""
    found = _TEXT.fullmatch(text)
    return None if found is None else f"key-{found.group(1)}"


def digest_of(text: str) -> bytes:
    """What is kept of a key's text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_text_of(text: str, key: Key | None) -> bool:
    """Whether a text is this key's, in a time that does not tell how much of it is right."""
    kept = _NOBODYS if key is None else key.digest
    return hmac.compare_digest(digest_of(text), kept) and key is not None
