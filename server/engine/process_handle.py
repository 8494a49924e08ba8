"""One engine process from its parent's side: its pipe, the two threads that serve it, its end.

Knows messages and bytes; not requests, and not whether the process is to be started again.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Callable

from server.engine.config import EngineConfig
from server.engine.process import Ready, StartFailed, run_engine
from server.engine.request import Command, Event, Shutdown

_JOIN_SECONDS = 5.0


class RunningEngine:
    """A process that was spawned. It is started once and ended once.

    Attributes:
        process: of `multiprocessing`.
        connection: our end of its pipe.
    """

    def __init__(self, config: EngineConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=run_engine, args=(config, theirs), name="graftwork-engine", daemon=True
        )
        self.process.start()
        # At the end of a parent that did not close it, multiprocessing sends SIGTERM, which it ignores.
        atexit.register(self.kill)
        theirs.close()
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._ended = False

    def first_message(self) -> Ready | StartFailed:
        """Wait until the process serves, or until it is gone."""
        try:
            message: Ready | StartFailed = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(_JOIN_SECONDS)
            return StartFailed("EngineDied", f"exit status {self.process.exitcode}")
        return message

    def serve(
        self,
        loop: asyncio.AbstractEventLoop,
        on_events: Callable[[list[Event]], None],
        on_end: Callable[[], None],
    ) -> None:
        """Begin to carry commands and events.

        Args:
            loop: where the two are called.
            on_events: called with each batch of events.
            on_end: called once when no more events can come.
        """
        reading = (loop, on_events, on_end)
        for thread in (
            threading.Thread(target=self._read, args=reading, daemon=True),
            threading.Thread(target=self._write, daemon=True),
        ):
            thread.start()
            self._threads.append(thread)

    def send(self, command: Command) -> None:
        """Queue a command; one for a process that is gone is lost with it."""
        self._commands.put(command)

    @property
    def num_unsent(self) -> int:
        """About how many commands the process has not taken from us yet."""
        return self._commands.qsize()

    @property
    def running(self) -> bool:
        """Whether what is sent may be answered."""
        # The pipe ends before the process does: commands sent in between would get no answer.
        return not self._ended and self.process.is_alive()

    def kill(self) -> None:
        """End the process now, stopped or not."""
        self.process.kill()

    def close(self, seconds: float = 0.0) -> None:
        """Ask the process to end, kill it after `seconds`, and wait for the threads. Blocks."""
        self._ended = True
        atexit.unregister(self.kill)
        self._commands.put(Shutdown())
        self._commands.put(None)
        if not self._threads:  # still starting: commands are not read yet
            self.process.kill()
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
        self.connection.close()

    # --- the two threads -------------------------------------------------------------------

    def _read(
        self,
        loop: asyncio.AbstractEventLoop,
        on_events: Callable[[list[Event]], None],
        on_end: Callable[[], None],
    ) -> None:
        # The loop may be closed by the time the pipe ends: then nothing is waiting.
        with contextlib.suppress(RuntimeError):
            try:
                while True:
                    events: list[Event] = self.connection.recv()
                    loop.call_soon_threadsafe(on_events, events)
            except (EOFError, OSError):
                self._ended = True
                loop.call_soon_threadsafe(on_end)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the process is gone; `_read` reports it
            while (command := self._commands.get()) is not None:
                self.connection.send(command)
