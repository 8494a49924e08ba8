"""The key that the running request came with.

Set once a request, by `server.api.middleware.authentication`, and read where it matters: which
adapters there are, whose files and jobs are seen, whose prompts may be reused. Tasks and threads that
work for a request see it too. Whatever works for no request (the start, the watched directory, a
training worker, the command line) has no key, and neither has a server that asks for none: nothing is
hidden from those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from server.store.key import Key

_caller: ContextVar[Key | None] = ContextVar("caller", default=None)


@contextmanager
def calling(key: Key | None) -> Iterator[None]:
    """Everything inside runs on behalf of this key; None is nobody in particular."""
    token = _caller.set(key)
    try:
        yield
    finally:
        _caller.reset(token)


def caller() -> Key | None:
    """The key; None for nobody in particular."""
    return _caller.get()


def visible_adapters() -> tuple[str, ...] | None:
    """Names and beginnings of names that the caller may know of; None is all."""
    key = caller()
    return None if key is None else key.adapters


def owner() -> str | None:
    """Whose that is which the caller makes; None is nobody's."""
    key = caller()
    return None if key is None else key.owner


def only_owner() -> str | None:
    """The one owner whose files and jobs the caller may know of; None is all of them."""
    key = caller()
    return None if key is None or key.may(()) else key.owner
