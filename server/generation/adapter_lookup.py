"""Looks adapters up by name: a cached snapshot while the database is unchanged, else one shared read.

The snapshot holds what was found since the database last changed. Every lookup first compares the
database's version (`Database.version`, a few microseconds, exact across processes) with the snapshot's.

A read takes a millisecond, nearly all of it Python. Reads on parallel threads contend for the interpreter
lock, and each took three times as long. One thread therefore makes them in sequence, and concurrent
lookups of one name share a result. A shared read starts after the last of its callers asked, so each
sees all earlier writes. Independent of the registry and of requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeAlias, TypeVar

import anyio
import anyio.to_thread

from adapters.errors import StorageUnavailable
from server.store.caller import Caller

FoundT = TypeVar("FoundT")
# A name, and which adapters its caller may see: callers who see the same share results.
_Key: TypeAlias = tuple[str, tuple[str, ...] | None]

# Reads per batch on the thread; results are delivered after the batch.
_MOST_AT_ONCE = 16
# Names in the snapshot; beyond them it starts again.
_MAX_CACHED = 4096


@dataclass
class _Read(Generic[FoundT]):
    name: str
    caller: Caller
    waiting: list[asyncio.Future[FoundT | Exception]] = field(default_factory=list)


class Lookups(Generic[FoundT]):
    """Finds what a name stands for. Use from one event loop.

    Args:
        read: returns the result for a name and a caller, or raises; called on a thread.
        threads: the thread limiter.
        version: returns a number that changes with every write that `read` could see; None if
            it cannot be known now. Called on the event loop.
    """

    def __init__(
        self,
        read: Callable[[str, Caller], FoundT],
        threads: anyio.CapacityLimiter,
        version: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._read = read
        self._threads = threads
        self._version = version
        self._cached: dict[_Key, FoundT] = {}
        self._cached_version: int | None = None
        self._wanted: dict[_Key, _Read[FoundT]] = {}
        self._pending: set[asyncio.Future[FoundT | Exception]] = set()
        self._working: asyncio.Task[None] | None = None

    async def find(self, name: str, caller: Caller) -> FoundT:
        """Return what the name stands for now, for this caller, or raise why there is nothing."""
        key = (name, caller.adapters)
        version = self._version()
        if version is None or version != self._cached_version:
            self._cached.clear()
            self._cached_version = version
        elif key in self._cached:
            return self._cached[key]
        found = await self._shared_read(key, caller)
        # Read after `version` was seen: it is current for as long as the version is.
        if version is not None and version == self._cached_version:
            if len(self._cached) >= _MAX_CACHED:
                self._cached.clear()
            self._cached[key] = found
        return found

    async def settle(self) -> None:
        """Wait until all pending callers have received their results and run their continuations."""
        if self._pending:
            await asyncio.wait([*self._pending])

    async def _shared_read(self, key: _Key, caller: Caller) -> FoundT:
        read = self._wanted.get(key)
        if read is None:
            read = self._wanted[key] = _Read(key[0], caller)
        # One future per caller: a cancelled caller does not cancel the others.
        result: asyncio.Future[FoundT | Exception] = asyncio.get_running_loop().create_future()
        read.waiting.append(result)
        self._pending.add(result)
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        try:
            found = await result
        finally:
            self._pending.discard(result)
        if isinstance(found, Exception):
            raise found
        return found

    async def _work(self) -> None:
        try:
            while self._wanted:
                reads = [self._wanted.pop(key) for key in [*islice(self._wanted, _MOST_AT_ONCE)]]
                found = await self._find_all(reads)
                for read, one in zip(reads, found, strict=True):
                    for result in read.waiting:
                        if not result.done():
                            result.set_result(one)
        finally:
            self._working = None

    async def _find_all(self, reads: Sequence[_Read[FoundT]]) -> Sequence[FoundT | Exception]:
        try:
            return await anyio.to_thread.run_sync(self._find, reads, limiter=self._threads)
        except Exception as error:  # no thread is available: callers must not wait forever
            return [error] * len(reads)

    def _find(self, reads: Sequence[_Read[FoundT]]) -> list[FoundT | Exception]:
        found: list[FoundT | Exception] = []
        for read in reads:
            last = found[-1] if found else None
            # The timeout, up to half a minute, was already spent: fail the others without another wait.
            one = last if isinstance(last, StorageUnavailable) else self._one(read)
            found.append(one)
        return found

    def _one(self, read: _Read[FoundT]) -> FoundT | Exception:
        try:
            return self._read(read.name, read.caller)
        except Exception as error:  # delivered to the callers
            return error
