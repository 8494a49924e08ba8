"""In-memory cache of the API keys of a data directory, for authentication on every request.

The cache is reloaded off the event loop when it is older than a second, which bounds the delay of a
revocation elsewhere (`graftwork keys`). An unknown key may be new, so a reload precedes every refusal;
these reloads are limited to ten a second, shared by all callers with unknown keys, who wait for them.
Last-use times are written about once a minute. Independent of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime

import anyio
import anyio.to_thread
import structlog
from sqlalchemy.exc import DatabaseError

from adapters.errors import AdapterError
from server.errors import NotReady
from server.store.key import Key, id_in, is_text_of
from server.store.keys import KeyStore

log = structlog.get_logger(__name__)

FRESH_SECONDS = 1.0
_BETWEEN_LOOKS_SECONDS = 0.1
# Maximum age of the cache while the database cannot be read; revocations are not seen in that time.
_STALE_SECONDS = 60.0
_NOTE_SECONDS = 60.0


class KeyRing:
    """Looks keys up. One event loop at a time.

    Args:
        store: the key store; read on construction.
        clock: monotonic seconds.

    Raises:
        AdapterError: the keys cannot be read.
    """

    def __init__(self, store: KeyStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._reading = asyncio.Lock()
        # A separate limiter: requests may occupy all default threads, which would block authentication.
        self._threads = anyio.CapacityLimiter(1)
        self._used: dict[str, datetime] = {}
        self._keys = _by_id(store)
        self._read_at = self._noted_at = clock()

    async def find(self, text: str) -> Key | None:
        """The valid key with this text; None if there is none.

        Raises:
            NotReady: the keys cannot be read.
        """
        key_id = id_in(text)
        if key_id is None:
            return None
        arrived = self._clock()
        await self._look_since(arrived - FRESH_SECONDS if key_id in self._keys else arrived)
        key, now = self._keys.get(key_id), self._store.now()
        if not is_text_of(text, key) or key is None or not key.is_good(now):
            return None
        self._used[key_id] = now
        return key

    def is_empty(self) -> bool:
        """Whether the last read found no valid key."""
        now = self._store.now()
        return not any(key.is_good(now) for key in self._keys.values())

    def close(self) -> None:
        """Write pending last-use times and close the database."""
        self._note()
        self._store.close()

    async def _look_since(self, moment: float) -> None:
        """Ensure that the keys were read after the given moment."""
        if self._read_at > moment:
            return
        async with self._reading:
            if self._read_at > moment:
                return
            await asyncio.sleep(self._read_at + _BETWEEN_LOOKS_SECONDS - self._clock())
            await anyio.to_thread.run_sync(self._read, limiter=self._threads)

    def _read(self) -> None:
        began = self._clock()
        try:
            self._keys = _by_id(self._store)
        except (AdapterError, DatabaseError, OSError) as error:
            log.warning("keys_unread", error=str(error))
            if began - self._read_at >= _STALE_SECONDS:
                raise NotReady("not ready: the keys cannot be read") from error
            return
        self._read_at = began
        if began - self._noted_at >= _NOTE_SECONDS:
            self._noted_at = began
            self._note()

    def _note(self) -> None:
        used, self._used = self._used, {}
        if not used:
            return
        try:
            # A copy: the event loop may still hold a reference to the original.
            self._store.note_used(dict(used))
        except (
            AdapterError,
            DatabaseError,
            OSError,
        ) as error:  # does not fail a request
            log.warning("key_use_not_noted", error=str(error))


def _by_id(store: KeyStore) -> dict[str, Key]:
    return {key.id: key for key in store.list()}
