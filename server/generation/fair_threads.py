"""Long work of the processor on threads: as many at a time as there are cores, and callers in turn.

More threads than cores make each other slower, and all of them slow the event loop. What waits here waits
without a thread, so nothing else has to wait behind it. Knows neither texts nor jobs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from server.store.caller import Caller

ResultT = TypeVar("ResultT")
_Key = tuple[str | None, bool]


class FairThreads:
    """Runs functions on a bounded number of threads. Use from one event loop.

    Callers who wait are served in turn, one function each, however many a caller has waiting. The long
    functions of a caller and the others take turns too: a short one waits for one long one at most.

    Args:
        num_threads: functions that run at a time.
    """

    def __init__(self, num_threads: int) -> None:
        self._limiter = anyio.CapacityLimiter(num_threads)
        self._num_free = num_threads
        # In the order of their turns; a key that has had its turn goes to the end.
        self._waiting: dict[_Key, deque[asyncio.Future[None]]] = {}

    async def run(
        self, caller: Caller, work: Callable[[], ResultT], *, is_long: bool = False
    ) -> ResultT:
        """Run `work` on a thread when it is its turn.

        Args:
            caller: whose turn it takes.
            work: raises to the caller.
            is_long: it may take a second or more.
        """
        await self._enter((caller.owner, is_long))
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._leave()

    async def _enter(self, key: _Key) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had its turn, and does not take it
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            key = next(iter(self._waiting))
            turns = self._waiting.pop(key)
            turn = turns.popleft()
            if turns:
                self._waiting[key] = turns
            if not turn.done():  # else its request was given up
                turn.set_result(None)
                return
        self._num_free += 1
