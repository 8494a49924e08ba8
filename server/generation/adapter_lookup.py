"""Coalesces concurrent adapter lookups by name.

A lookup takes a millisecond, nearly all of it Python. Lookups on parallel threads contend for the
interpreter lock, and each took three times as long. One thread therefore makes them in sequence, and
concurrent lookups of one name share a result.

No caching. A shared lookup starts after the last of its callers asked, so each sees all earlier writes.
Independent of the registry and of requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeAlias, TypeVar

import anyio
import anyio.to_thread

from adapters.errors import StorageUnavailable

FoundT = TypeVar("FoundT")
Asker: TypeAlias = Hashable

# Lookups per batch on the thread; results are delivered after the batch.
_MOST_AT_ONCE = 16


@dataclass
class _Lookup(Generic[FoundT]):
    name: str
    context: Context
    waiting: list[asyncio.Future[FoundT | Exception]] = field(default_factory=list)


class Lookups(Generic[FoundT]):
    """Runs lookups on one thread at a time. Use from one event loop.

    Args:
        look_up: returns the result for a name, or raises; called on a thread, in a caller's context.
        threads: the thread limiter.
        asker: returns the current caller; results are not shared between different callers.
    """

    def __init__(
        self,
        look_up: Callable[[str], FoundT],
        threads: anyio.CapacityLimiter,
        asker: Callable[[], Asker],
    ) -> None:
        self._look_up = look_up
        self._threads = threads
        self._asker = asker
        self._asked: dict[tuple[str, Asker], _Lookup[FoundT]] = {}
        self._unheard: set[asyncio.Future[FoundT | Exception]] = set()
        self._working: asyncio.Task[None] | None = None

    async def find(self, name: str) -> FoundT:
        """Look up a name and return or raise the result."""
        key = (name, self._asker())
        lookup = self._asked.get(key)
        if lookup is None:
            lookup = self._asked[key] = _Lookup(name, copy_context())
        # One future per caller: a cancelled caller does not cancel the others.
        answer: asyncio.Future[FoundT | Exception] = asyncio.get_running_loop().create_future()
        lookup.waiting.append(answer)
        self._unheard.add(answer)
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        try:
            found = await answer
        finally:
            self._unheard.discard(answer)
        if isinstance(found, Exception):
            raise found
        return found

    async def settle(self) -> None:
        """Wait until all pending callers have received their results and run their continuations."""
        if self._unheard:
            await asyncio.wait([*self._unheard])

    async def _work(self) -> None:
        try:
            while self._asked:
                lookups = [self._asked.pop(key) for key in [*islice(self._asked, _MOST_AT_ONCE)]]
                found = await self._find_all(lookups)
                for lookup, one in zip(lookups, found, strict=True):
                    for answer in lookup.waiting:
                        if not answer.done():
                            answer.set_result(one)
        finally:
            self._working = None

    async def _find_all(self, lookups: Sequence[_Lookup[FoundT]]) -> Sequence[FoundT | Exception]:
        try:
            return await anyio.to_thread.run_sync(self._find, lookups, limiter=self._threads)
        except Exception as error:  # no thread is available: callers must not wait forever
            return [error] * len(lookups)

    def _find(self, lookups: Sequence[_Lookup[FoundT]]) -> list[FoundT | Exception]:
        found: list[FoundT | Exception] = []
        for lookup in lookups:
            last = found[-1] if found else None
            # The timeout, up to half a minute, was already spent: fail the others without another wait.
            one = last if isinstance(last, StorageUnavailable) else self._one(lookup)
            found.append(one)
        return found

    def _one(self, lookup: _Lookup[FoundT]) -> FoundT | Exception:
        try:
            return lookup.context.run(self._look_up, lookup.name)
        except Exception as error:  # delivered to the callers
            return error
