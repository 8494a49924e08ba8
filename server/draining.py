"""Whether the server still takes work, and how much of it runs. Knows no request and no signal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

_POLL_SECONDS = 0.05


class Draining:
    """The state of one server's drain.

    Attributes:
        asked: a client began a drain, and may end it.
        going: a signal came; that is not taken back.
        hurried: a second signal came: nothing is waited for any more.
        running: requests that a drain waits for.
    """

    def __init__(self) -> None:
        self.asked = False
        self.going = False
        self.hurried = False
        self.running = 0

    @property
    def active(self) -> bool:
        """Whether new work is refused."""
        return self.asked or self.going

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
