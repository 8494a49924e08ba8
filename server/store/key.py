"""An API key: the format of its text, and its permissions.

    gw-0123456789ab-<64 hex digits>
       ^ id          ^ 256 random bits

The id is not secret: it locates the row and identifies the key in lists and logs. Only the SHA-256 of the
whole text is stored. A slow hash such as Argon2 protects low-entropy passwords from guessing; 256 random
bits do not need it, and every request would pay for it. Independent of the database and HTTP.
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
# Compared with if no key has the id, so that this takes as long as a wrong secret.
_NO_DIGEST = bytes(hashlib.sha256().digest_size)


@dataclass(frozen=True)
class Key:
    """A stored key, without its text.

    Attributes:
        id: "key-" and 12 hex digits.
        name: display name.
        digest: SHA-256 of its text.
        scopes: its scopes; "admin" includes all.
        adapters: names it may use, and name prefixes ending in `*`; None is all.
        tenant: keys of one tenant see one another's files and jobs, and share cached prompts; a key
            without one is its own.
        rate: request limit, such as "60 per 1 minute"; None is no limit.
        tokens: limit on prompt and output tokens, in the same form.
        created_at: aware UTC time, as are the next three.
        expires_at: None is never.
        last_used_at: accurate to about a minute; None before the first use.
        revoked_at: None unless revoked.
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
        """The owner of its files, jobs and cached prompts: its tenant, or the key itself."""
        return self.id if self.tenant is None else f"tenant:{self.tenant}"


def new_text() -> str:
    """Generate the text of a new key from the system's random source."""
    return f"gw-{secrets.token_hex(_ID_BYTES)}-{secrets.token_hex(_SECRET_BYTES)}"


def id_in(text: str) -> str | None:
    """The key id in a text; None if the text does not have the format of a key."""
    found = _TEXT.fullmatch(text)
    return None if found is None else f"key-{found.group(1)}"


def digest_of(text: str) -> bytes:
    """The stored digest of a key's text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_text_of(text: str, key: Key | None) -> bool:
    """Whether a text is this key's; constant-time comparison."""
    kept = _NO_DIGEST if key is None else key.digest
    return hmac.compare_digest(digest_of(text), kept) and key is not None
