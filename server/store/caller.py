"""The API key of the current request, in a context variable.

Set once per request by `server.api.middleware.authentication`. It determines which adapters, files and
jobs are visible and whose cached prompts may be reused. Tasks and threads started by a request inherit
it. Code outside a request (startup, the watched directory, a training worker, the command line) has no
key, as has every request on a server without authentication. Without a key nothing is hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from server.store.key import Key

_caller: ContextVar[Key | None] = ContextVar("caller", default=None)


@contextmanager
def calling(key: Key | None) -> Iterator[None]:
    """Run the block on behalf of this key; None is unrestricted."""
    token = _caller.set(key)
    try:
        yield
    finally:
        _caller.reset(token)


def caller() -> Key | None:
    """The current key; None if there is none."""
    return _caller.get()


def visible_adapters() -> tuple[str, ...] | None:
    """Adapter names and name prefixes visible to the caller; None is all."""
    key = caller()
    return None if key is None else key.adapters


def owner() -> str | None:
    """The owner recorded for what the caller creates; None is no owner."""
    key = caller()
    return None if key is None else key.owner


def only_owner() -> str | None:
    """The owner whose files and jobs are visible to the caller; None is all."""
    key = caller()
    return None if key is None or key.may(()) else key.owner
