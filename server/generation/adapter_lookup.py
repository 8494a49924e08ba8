"""Adapters looked up by name, for many requests at once.

A lookup takes a millisecond, nearly all of it Python: threads that make several side by side want one
interpreter, and each took three times as long. So one thread makes them, one after another, and who
asks for the same as somebody else meanwhile gets the same answer.

Nothing is kept: a lookup begins after everybody has asked whom it answers, so that each sees what was
written before. Knows neither the registry nor requests.
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

# Lookups that one visit of the thread makes, before those who asked hear of any.
_MOST_AT_ONCE = 16


@dataclass
class _Lookup(Generic[FoundT]):
    name: str
    context: Context
    waiting: list[asyncio.Future[FoundT | Exception]] = field(default_factory=list)


class Lookups(Generic[FoundT]):
    """Makes lookups on one thread at a time. Use from one event loop.

    Args:
        look_up: what finds a name, or raises; called on a thread, in the context of one who asked.
        threads: how many threads there may be.
        asker: who asks just now; an answer to one is none to another.
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
        """What is found now, or raised, by this name."""
        key = (name, self._asker())
        lookup = self._asked.get(key)
        if lookup is None:
            lookup = self._asked[key] = _Lookup(name, copy_context())
        # One each: who leaves takes nobody's answer along.
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
        """Wait until all who have asked so far have heard, and did what they do at once with it."""
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
        except Exception as error:  # no thread is to be had: nobody may wait for one for ever
            return [error] * len(lookups)

    def _find(self, lookups: Sequence[_Lookup[FoundT]]) -> list[FoundT | Exception]:
        found: list[FoundT | Exception] = []
        for lookup in lookups:
            last = found[-1] if found else None
            # It was waited for once, which may take half a minute: the others need not wait again.
            one = last if isinstance(last, StorageUnavailable) else self._one(lookup)
            found.append(one)
        return found

    def _one(self, lookup: _Lookup[FoundT]) -> FoundT | Exception:
        try:
            return lookup.context.run(self._look_up, lookup.name)
        except Exception as error:  # it belongs to whoever asked
            return error
