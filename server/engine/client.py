"""The asyncio side of an engine process: submit a request, iterate over its tokens.

Knows processes, pipes and streams; not HTTP, text or adapter names.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

from adapters.base_model import BaseModelSpec
from server.engine.config import EngineConfig
from server.engine.process import Ready, StartFailed, run_engine
from server.engine.request import (
    Abort,
    AdapterRef,
    Command,
    Event,
    FailedEvent,
    GenerationRequest,
    Preload,
    ResidencyEvent,
    Shutdown,
    StatsEvent,
    Submit,
    TokenEvent,
    Unload,
)

_STOP_SECONDS = 5.0
# An engine sends a sign of life every second, and a long step takes less than this.
_SILENCE_SECONDS = 60.0


class EngineError(Exception):
    """Base of what the client raises.

    |-- EngineStartFailed   the process could not start; the message gives the reason
    |-- EngineUnavailable   the process is not running
    |-- EngineOverloaded    the queue is full
    `-- RequestFailed       one request ended without tokens
    """


class EngineStartFailed(EngineError):
    """The process could not start; `kind` is the class name of what it raised."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class EngineUnavailable(EngineError):
    """The process is not running."""


class EngineOverloaded(EngineError):
    """The queue is full.

    Attributes:
        retry_after_seconds: when to try again.
    """

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class RequestFailed(EngineError):
    """One request ended without more tokens; `code` as in `FailedEvent`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RequestStream:
    """The tokens of one request, as an async iterator that ends with the finish reason.

    Raises RequestFailed from the iteration when the engine gives up on the request. `heard_at` is when
    the token last read had come from the engine (`time.monotonic`), however late it is read.
    """

    def __init__(self, client: EngineClient, request_id: str, adapter: AdapterRef | None) -> None:
        self.request_id = request_id
        self.adapter = adapter
        self._client = client
        self.heard_at = 0.0
        self._events: asyncio.Queue[tuple[TokenEvent | FailedEvent, float]] = asyncio.Queue()
        self._ended = False

    def put(self, event: TokenEvent | FailedEvent, heard_at: float) -> None:
        """Called by the client on the event loop."""
        self._events.put_nowait((event, heard_at))

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        try:
            while not self._ended:
                event, self.heard_at = await self._events.get()
                if isinstance(event, FailedEvent):
                    self._ended = True
                    raise RequestFailed(event.code, event.message)
                self._ended = event.finish_reason is not None
                yield event
        finally:
            self.abort()

    def abort(self) -> None:
        """Free the request's row, if it still has one. Safe to call at any time and twice."""
        self._client.release(self.request_id)


class EngineClient:
    """Starts an engine process and speaks with it. Use from one event loop.

    Attributes:
        base: dimensions of the base, once started.
        base_name: what the base calls itself.
        notes: remarks on its weights.
        max_sequence_tokens: virtual, prompt and new tokens of one sequence together.
        stats: the engine's latest counts.
        on_residency: called on the event loop for every adapter that moved.
    """

    base: BaseModelSpec
    base_name: str
    notes: tuple[str, ...]
    max_sequence_tokens: int

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.stats = StatsEvent(0, 0, 0, 0)
        self.on_residency: Callable[[ResidencyEvent], None] = lambda _event: None
        self._streams: dict[str, RequestStream] = {}
        self._residency: dict[str, Literal["disk", "host", "device"]] = {}
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._process: Any = None
        self._connection: Connection | None = None
        self._threads: list[threading.Thread] = []
        self._heard_at = 0.0
        self._gone = False

    async def start(self) -> None:
        """Spawn the process and wait until it serves.

        Raises:
            EngineStartFailed: with the reason that the process gave.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=run_engine, args=(self.config, theirs), name="graftwork-engine", daemon=True
        )
        self._process.start()
        theirs.close()
        first = await asyncio.to_thread(self._first_message)
        if isinstance(first, StartFailed):
            raise EngineStartFailed(first.kind, first.message)
        self.base = BaseModelSpec.from_dict(first.base)
        self.base_name = first.base_name
        self.notes = first.notes
        self.max_sequence_tokens = first.max_sequence_tokens
        self._heard_at = time.monotonic()
        loop = asyncio.get_running_loop()
        for target, arguments in ((self._read, (loop,)), (self._write, ())):
            thread = threading.Thread(target=target, args=arguments, daemon=True)
            thread.start()
            self._threads.append(thread)

    async def stop(self) -> None:
        """End the process; requests in flight fail with code "aborted"."""
        if self._process is None:
            return
        # Before the process is told: its end would look like a crash to who waits.
        self._lost("aborted", "the server is stopping")
        self._commands.put(Shutdown())
        self._commands.put(None)
        if not self._threads:  # still starting: nobody reads commands yet
            self._process.kill()
        await asyncio.to_thread(self._process.join, _STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        for thread in self._threads:
            await asyncio.to_thread(thread.join, _STOP_SECONDS)
        if self._connection is not None:
            self._connection.close()
        self._process = None

    @property
    def alive(self) -> bool:
        """Whether the process runs, its pipe is open and it was heard of lately."""
        return self._running and time.monotonic() - self._heard_at < _SILENCE_SECONDS

    @property
    def _running(self) -> bool:
        # The pipe ends before the process does: what is sent in between nobody would answer.
        return self._process is not None and not self._gone and self._process.is_alive()

    @property
    def pid(self) -> int | None:
        """The engine's process; None while none runs."""
        return self._process.pid if self._running else None

    @property
    def num_in_flight(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._streams)

    def digests_in_flight(self) -> set[str]:
        """Adapters that a request in flight may still have to load."""
        adapters = (stream.adapter for stream in self._streams.values())
        return {adapter.digest for adapter in adapters if adapter is not None}

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Queue a request.

        Raises:
            EngineUnavailable: the process is not running.
            EngineOverloaded: `max_queued` requests wait already.
        """
        if not self._running:
            raise EngineUnavailable("the engine is not running")
        waiting = len(self._streams) - self.config.max_running
        if waiting >= self.config.max_queued:
            raise EngineOverloaded(retry_after_seconds=1 + waiting // self.config.max_running)
        stream = RequestStream(self, request.request_id, request.adapter)
        self._streams[request.request_id] = stream
        self._commands.put(Submit(request))
        return stream

    def release(self, request_id: str) -> None:
        """Forget a request, and tell the engine to drop it if it has not ended."""
        if self._streams.pop(request_id, None) is not None:
            self._commands.put(Abort(request_id))

    def preload(self, adapter: AdapterRef) -> None:
        """Make an adapter resident when there is room."""
        self._commands.put(Preload(adapter))

    def unload(self, digest: str) -> None:
        """Let an adapter leave the device unless it is in use."""
        self._commands.put(Unload(digest))

    def residency(self, digest: str) -> Literal["disk", "host", "device"]:
        """Where an adapter is, as last heard."""
        return self._residency.get(digest, "disk")

    # --- the two threads -------------------------------------------------------------------

    def _first_message(self) -> Ready | StartFailed:
        assert self._connection is not None  # noqa: S101 - set by start
        process = self._process  # `stop` may forget it meanwhile
        try:
            message: Ready | StartFailed = self._connection.recv()
        except (EOFError, OSError):
            process.join(_STOP_SECONDS)
            return StartFailed("EngineDied", f"exit status {process.exitcode}")
        return message

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._connection is not None  # noqa: S101 - set by start
        # The loop may be closed by the time the pipe ends: then nobody waits any more.
        with contextlib.suppress(RuntimeError):
            try:
                while True:
                    events: list[Event] = self._connection.recv()
                    loop.call_soon_threadsafe(self._dispatch, events)
            except (EOFError, OSError):
                loop.call_soon_threadsafe(
                    self._lost, "engine_error", "the engine process ended unexpectedly"
                )

    def _write(self) -> None:
        assert self._connection is not None  # noqa: S101 - set by start
        with contextlib.suppress(OSError):  # the process is gone; `_read` reports it
            while (command := self._commands.get()) is not None:
                self._connection.send(command)

    def _dispatch(self, events: list[Event]) -> None:
        self._heard_at = time.monotonic()
        for event in events:
            if isinstance(event, StatsEvent):
                self.stats = event
            elif isinstance(event, ResidencyEvent):
                self._residency[event.digest] = event.residency
                self.on_residency(event)
            else:
                self._deliver(event)

    def _deliver(self, event: TokenEvent | FailedEvent) -> None:
        ended = isinstance(event, FailedEvent) or event.finish_reason is not None
        take = self._streams.pop if ended else self._streams.get
        stream = take(event.request_id, None)
        if stream is not None:
            stream.put(event, self._heard_at)

    def _lost(self, code: str, message: str) -> None:
        """Take no more requests, and end those in flight. The first reason stands."""
        self._gone = True
        for request_id in list(self._streams):
            self._deliver(FailedEvent(request_id, code, message))
