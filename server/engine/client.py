"""The asyncio side of an engine process: submit a request, iterate over its tokens.

It also watches the process. One that ends or falls silent takes its requests with it, and is started
again, with a pause that grows, as often as `EngineConfig.max_restarts` allows.

Knows streams and what became of the process; not HTTP, text or adapter names.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from typing import Literal

import structlog

from adapters.base_model import BaseModelSpec
from server.engine.blocks import room_in_blocks
from server.engine.config import EngineConfig
from server.engine.errors import (
    AdapterOverloaded,
    EngineError,
    EngineOverloaded,
    EngineStartFailed,
    EngineUnavailable,
    RequestFailed,
)
from server.engine.process import Ready, StartFailed
from server.engine.process_handle import RunningEngine
from server.engine.request import (
    Abort,
    AdapterRef,
    Drop,
    Event,
    FailedEvent,
    GenerationRequest,
    Preload,
    ResidencyEvent,
    StatsEvent,
    TokenEvent,
    Unload,
)

__all__ = [
    "AdapterOverloaded",
    "EngineClient",
    "EngineError",
    "EngineOverloaded",
    "EngineStartFailed",
    "EngineUnavailable",
    "RequestFailed",
    "RequestStream",
]

log = structlog.get_logger(__name__)

_STOP_SECONDS = 5.0
# Before the first attempt to start again; each further one waits twice as long.
_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
# An engine that served for so long did not end because of how it is started.
_GOOD_SECONDS = 600.0
# Loading again takes about as long as the first time; the base is in the system's cache by then.
_LEAST_START_SECONDS = 60.0
_START_FACTOR = 4.0


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
        self._events: deque[tuple[TokenEvent | FailedEvent, float]] = deque()
        # Done when an event arrives; None while nothing waits for one.
        self._arrived: asyncio.Future[None] | None = None
        self._ended = False

    def put(self, event: TokenEvent | FailedEvent, heard_at: float) -> None:
        """Called by the client on the event loop."""
        self._events.append((event, heard_at))
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        try:
            while not self._ended:
                while not self._events:
                    self._arrived = asyncio.get_running_loop().create_future()
                    await self._arrived
                    self._arrived = None
                event, self.heard_at = self._events.popleft()
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


def _name_of(adapter: AdapterRef | None) -> str | None:
    # All versions of an adapter are one in what they may take.
    return None if adapter is None else adapter.name or adapter.digest


class EngineClient:
    """Starts an engine process and speaks with it. Use from one event loop.

    Attributes:
        base: dimensions of the base, once started.
        base_name: what the base calls itself.
        notes: remarks on its weights.
        max_sequence_tokens: positions that one sequence may take, see `request.positions_taken`.
        max_virtual_tokens: virtual tokens of an adapter that a request can use.
        stats: the engine's latest counts.
        num_restarts: times that the process was replaced.
        lost: whether the process has ended and will not be replaced: only a new server helps.
        hung: whether the process fell silent, was ended for that, and is not replaced yet.
        on_residency: called on the event loop for every adapter that moved.
    """

    base: BaseModelSpec
    base_name: str
    notes: tuple[str, ...]
    max_sequence_tokens: int
    max_virtual_tokens: int

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.stats = StatsEvent(0, 0, 0, 0)
        self.num_restarts = 0
        self.lost = False
        self.hung = False
        self.on_residency: Callable[[ResidencyEvent], None] = lambda _event: None
        self._streams: dict[str, RequestStream] = {}
        # Requests in flight by their adapter's name; None is the base.
        self._num_by_adapter: Counter[str | None] = Counter()
        self._residency: dict[str, ResidencyEvent] = {}
        self._engine: RunningEngine | None = None
        self._serves = False
        self._has_served = False
        self._heard_at = 0.0
        # A sign of life comes every second; a long step takes less than `silence_seconds`.
        self._tick_seconds = min(1.0, config.silence_seconds / 4)
        self._silent_ticks = 0
        self._launched_at = 0.0
        self._start_seconds = 0.0
        self._served_since = 0.0
        self._tries = 0
        self._watching: asyncio.Task[None] | None = None
        self._restarting: asyncio.Task[None] | None = None

    def launch(self) -> RunningEngine:
        """Spawn the process, so that it gets ready while the caller does something else."""
        if self._engine is None:
            self._launched_at = time.monotonic()
            self._engine = RunningEngine(self.config)
        return self._engine

    async def start(self) -> None:
        """Spawn the process, unless `launch` did, and wait until it serves.

        Raises:
            EngineStartFailed: with the reason that the process gave.
        """
        engine = self.launch()
        first = await asyncio.to_thread(engine.first_message)
        if isinstance(first, StartFailed):
            raise EngineStartFailed(first.kind, first.message)
        self._start_seconds = time.monotonic() - self._launched_at
        self.base = BaseModelSpec.from_dict(first.base)
        self.base_name = first.base_name
        self.notes = first.notes
        self.max_sequence_tokens = first.max_sequence_tokens
        self.max_virtual_tokens = first.max_virtual_tokens
        self._blocks = first.num_blocks, first.block_size
        self._serve(engine)
        self._watching = asyncio.create_task(self._watch())

    def room(self, num_virtual_tokens: int) -> int:
        """Positions that a prompt and its output may take beside so many virtual tokens."""
        in_base = self.base.max_positions - num_virtual_tokens
        return min(in_base, room_in_blocks(*self._blocks, num_virtual_tokens))

    async def stop(self, seconds: float | None = None) -> None:
        """End the process; requests in flight fail with code "aborted".

        Args:
            seconds: what it is given to end by itself; None leaves it time for a long step.
        """
        # Before the process is stopped: its end would look like a crash to waiting callers.
        self._fail_all("aborted", "the server is stopping")
        self._has_served = False
        tasks = [task for task in (self._watching, self._restarting) if task is not None]
        self._watching = self._restarting = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close, _STOP_SECONDS if seconds is None else seconds)

    @property
    def alive(self) -> bool:
        """Whether the process serves and its pipe is open."""
        return self._serves and self._engine is not None and self._engine.running

    @property
    def restarting(self) -> bool:
        """Whether a process that ended is about to be replaced."""
        return self._has_served and not self.alive and not self.lost

    @property
    def pid(self) -> int | None:
        """The engine's process; None while none serves."""
        return self._engine.process.pid if self._engine is not None and self.alive else None

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
            EngineOverloaded: `max_queued` requests wait already, or the process takes no commands.
            AdapterOverloaded: too many of them are for this adapter.
        """
        if self._engine is None or not self.alive:
            raise EngineUnavailable("the engine is not running")
        places = self.config.max_running + self.config.max_queued
        waiting = len(self._streams) - self.config.max_running
        # What was dropped again is a command too, and a process that hangs reads none.
        if waiting >= self.config.max_queued or self._engine.num_unsent > 4 * places:
            raise EngineOverloaded(retry_after_seconds=1 + waiting // self.config.max_running)
        self._require_room_for(request.adapter)
        stream = RequestStream(self, request.request_id, request.adapter)
        self._streams[request.request_id] = stream
        self._num_by_adapter[_name_of(request.adapter)] += 1
        self._engine.send(request)
        return stream

    def release(self, request_id: str) -> None:
        """Forget a request, and make the engine drop it if it has not ended."""
        if self._forget(request_id) is not None:
            self._send(Abort(request_id))

    def _forget(self, request_id: str) -> RequestStream | None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            name = _name_of(stream.adapter)
            self._num_by_adapter[name] -= 1
            if not self._num_by_adapter[name]:
                del self._num_by_adapter[name]
        return stream

    def _require_room_for(self, adapter: AdapterRef | None) -> None:
        most, name = self.config.max_queued_per_adapter, _name_of(adapter)
        number = self._num_by_adapter[name]
        if most is not None and number >= most:
            raise AdapterOverloaded(
                name, number, retry_after_seconds=1 + number // self.config.max_running
            )

    def preload(self, adapter: AdapterRef) -> None:
        """Make an adapter resident when there is room."""
        self._send(Preload(adapter))

    def unload(self, digest: str) -> None:
        """Let an adapter leave the device unless it is in use."""
        self._send(Unload(digest))

    def drop(self, digest: str) -> None:
        """Release everything cached of an adapter whose stored bytes were removed."""
        self._send(Drop(digest))

    def residency(self, digest: str) -> Literal["disk", "host", "device"]:
        """Where an adapter is, as last heard."""
        event = self._residency.get(digest)
        return "disk" if event is None else event.residency

    def _send(self, command: Abort | Preload | Unload | Drop) -> None:
        if self._engine is not None:
            self._engine.send(command)

    # --- what comes from the engine --------------------------------------------------------

    def _dispatch(self, events: list[Event]) -> None:
        self._heard_at = time.monotonic()
        self._silent_ticks = 0
        for event in events:
            if isinstance(event, StatsEvent):
                self.stats = event
            elif isinstance(event, ResidencyEvent):
                self._moved(event)
            else:
                self._deliver(event)

    def _moved(self, event: ResidencyEvent) -> None:
        # Adapters that are on disk only are not listed here: their number is unbounded.
        if event.residency == "disk":
            self._residency.pop(event.digest, None)
        else:
            self._residency[event.digest] = event
        self.on_residency(event)

    def _deliver(self, event: TokenEvent | FailedEvent) -> None:
        ended = isinstance(event, FailedEvent) or event.finish_reason is not None
        stream = (self._forget if ended else self._streams.get)(event.request_id)
        if stream is not None:
            stream.put(event, self._heard_at)

    def _fail_all(self, code: str, message: str) -> None:
        """Take no more requests, and end those in flight. The first reason stands."""
        self._serves = False
        for request_id in list(self._streams):
            self._deliver(FailedEvent(request_id, code, message))

    # --- the process's life ----------------------------------------------------------------

    def _serve(self, engine: RunningEngine) -> None:
        self._serves = self._has_served = True
        self.lost = self.hung = False
        self._silent_ticks = 0
        self._served_since = self._heard_at = time.monotonic()
        engine.serve(
            asyncio.get_running_loop(),
            # Late events of the previous process belong to requests that ended with it.
            lambda events: self._dispatch(events) if engine is self._engine else None,
            lambda: self._ended(engine),
        )

    async def _watch(self) -> None:
        """End a process that says nothing any more; `_ended` sees to the rest."""
        while True:
            await asyncio.sleep(self._tick_seconds)
            # Ticks, not a clock: while this process itself was stopped, no event could arrive.
            self._silent_ticks += 1
            silent = self._silent_ticks * self._tick_seconds
            engine = self._engine
            if engine is None or not self.alive or silent < self.config.silence_seconds:
                continue
            log.error("engine_silent", seconds=silent, pid=self.pid)
            self.hung = True
            self._fail_all(
                "engine_unavailable", f"the engine has reported nothing for {silent:.0f} seconds"
            )
            engine.kill()
            await asyncio.to_thread(engine.process.join, _STOP_SECONDS)
            if engine.process.is_alive():  # it hangs in the kernel, as in a driver
                log.error("engine_cannot_be_ended", pid=engine.process.pid)
                self.lost = True

    def _ended(self, engine: RunningEngine) -> None:
        if engine is not self._engine:
            return  # `stop` has seen to it
        self._fail_all("engine_unavailable", "the engine process ended unexpectedly; try again")
        self.stats = dataclasses.replace(self.stats, num_running=0, num_waiting=0, kv_blocks_used=0)
        for event in list(self._residency.values()):
            self._moved(dataclasses.replace(event, residency="disk", loads=0, evictions=0))
        if time.monotonic() - self._served_since >= _GOOD_SECONDS:
            self._tries = 0
        log.error("engine_ended", pid=engine.process.pid, tries=self._tries)
        if self._tries < self.config.max_restarts:
            self._restarting = asyncio.create_task(self._restart(engine))
        else:
            self.lost = True

    async def _restart(self, ended: RunningEngine) -> None:
        while self._tries < self.config.max_restarts:
            await asyncio.to_thread(ended.close)
            await asyncio.sleep(min(_LONGEST_PAUSE_SECONDS, _PAUSE_SECONDS * 2**self._tries))
            self._tries += 1
            try:
                ended = self._engine = RunningEngine(self.config)
                await self._wait_for(ended)
            except (EngineStartFailed, OSError) as error:
                log.error("engine_restart_failed", reason=str(error), tries=self._tries)
                continue
            self.num_restarts += 1
            self._serve(ended)
            log.warning("engine_restarted", pid=self.pid, tries=self._tries)
            return
        self.lost = True
        log.error("engine_given_up", tries=self._tries)

    async def _wait_for(self, engine: RunningEngine) -> None:
        """Wait until a process that replaces another one serves the same base."""
        seconds = max(_LEAST_START_SECONDS, _START_FACTOR * self._start_seconds)
        first: Ready | StartFailed | None = None
        with contextlib.suppress(TimeoutError):
            first = await asyncio.wait_for(asyncio.to_thread(engine.first_message), seconds)
        if first is None:
            raise EngineStartFailed("TimeoutError", f"not started within {seconds:.0f} seconds")
        if isinstance(first, StartFailed):
            raise EngineStartFailed(first.kind, first.message)
        if BaseModelSpec.from_dict(first.base) != self.base:
            raise EngineStartFailed("BaseChanged", "the base is not the one that was served before")
