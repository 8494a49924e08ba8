"""Whether the server still takes work, and how much of it runs. Knows no request and no signal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

_POLL_SECONDS = 0.05


class Stage(IntEnum):
    """How far a server is on its way to the end; it never goes back from STOPPING."""

    SERVING = 0
    DRAINING = 1  # a client asked for it, and may end it
    STOPPING = 2  # a signal came
    HURRYING = 3  # a second signal came: nothing is waited for any more


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
        """Take no new work."""
        self.stage = max(self.stage, Stage.DRAINING)

    def end(self) -> None:
        """Take work again, unless a signal came."""
        if self.stage == Stage.DRAINING:
            self.stage = Stage.SERVING

    def stop(self, *, hurry: bool = False) -> None:
        """Take no new work any more; `hurry` ends what runs, too."""
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
        """Whether nothing is waited for any more."""
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
        """Wait until nothing runs, a drain is over or the time is up.

        Returns:
            Whether nothing runs.
        """
        until = time.monotonic() + seconds
        while self.running and self.active and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)
        return not self.running
