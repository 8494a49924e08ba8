"""Whether the server accepts new work, and how much of it runs. Independent of requests and signals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

_POLL_SECONDS = 0.05


class Stage(IntEnum):
    """How far a server is on its way to its end; it never goes back from STOPPING."""

    SERVING = 0
    DRAINING = 1  # requested by a client, who may end it
    STOPPING = 2  # a signal came
    HURRYING = 3  # a second signal came: nothing is waited for


class Draining:
    """The state of one server's drain.

    Attributes:
        stage: how far it is.
        running: requests that a drain waits for.
    """

    def __init__(self) -> None:
        self.stage = Stage.SERVING
        self.running = 0

    def begin(self) -> None:
        """Accept no new work."""
        self.stage = max(self.stage, Stage.DRAINING)

    def end(self) -> None:
        """Accept work again, unless a signal came."""
        if self.stage == Stage.DRAINING:
            self.stage = Stage.SERVING

    def stop(self, *, hurry: bool = False) -> None:
        """Accept no new work for good; `hurry` also ends running work."""
        self.stage = max(self.stage, Stage.HURRYING if hurry else Stage.STOPPING)

    @property
    def active(self) -> bool:
        """Whether new work is refused."""
        return self.stage > Stage.SERVING

    @property
    def stopping(self) -> bool:
        """Whether the process is about to end."""
        return self.stage >= Stage.STOPPING

    @property
    def hurried(self) -> bool:
        """Whether running work is not waited for."""
        return self.stage == Stage.HURRYING

    @contextmanager
    def run(self) -> Iterator[None]:
        """Count one request while it runs."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def idle(self, seconds: float) -> bool:
        """Wait until nothing runs, the drain has ended or the time is up.

        Returns:
            Whether nothing runs.
        """
        until = time.monotonic() + seconds
        while self.running and self.active and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)
        return not self.running
