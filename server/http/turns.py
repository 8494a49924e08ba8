"""Connections with more input than is parsed at once take turns, one at a time.

Parsing runs on the event loop, between the frames of everyone's streams. A connection parses a few events
of what it received; the rest waits for its turn. After each turn the loop belongs to the others for as long
as the turn took, and at least `_REST_SECONDS`: however many connections wait, that delays a frame
by one turn, and takes half of the loop at most. Independent of HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

# The loop's clock wakes it no earlier than this.
_REST_SECONDS = 0.001


class Turns:
    """The turns of all connections of one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._next_at = 0.0

    def wait(self, loop: asyncio.AbstractEventLoop, turn: Callable[[], None]) -> None:
        """Call `turn` once, after those that wait already; it is short, and raises nothing."""
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_at(max(self._next_at, loop.time()), self._run, loop)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        began = loop.time()
        try:
            self._waiting[0]()
        finally:
            self._waiting.popleft()
            ended = loop.time()
            self._next_at = ended + max(ended - began, _REST_SECONDS)
            if self._waiting:
                loop.call_at(self._next_at, self._run, loop)
