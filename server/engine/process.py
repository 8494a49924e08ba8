"""The engine in a process of its own: commands come in over a pipe, events go out.

A process and not a thread, because tokenising, HTTP and JSON would otherwise wait for the engine's
interpreter lock and it for theirs, and because an engine that hangs can be ended from outside.
Only the plain data of `request` crosses the pipe, between two processes of one program.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from server.engine.config import EngineConfig
from server.engine.process_memory import give_back_free_memory
from server.engine.request import (
    Abort,
    Command,
    Drop,
    Event,
    FailedEvent,
    GenerationRequest,
    Preload,
    Shutdown,
    StatsEvent,
    Unload,
)

log = logging.getLogger(__name__)

_IDLE_SECONDS = 1.0
# Time for an engine whose parent is gone to end by itself.
_ORPHAN_SECONDS = 5.0


@dataclass(frozen=True)
class Ready:
    """First message: the engine serves.

    Attributes:
        base: `BaseModelSpec.to_dict()`.
        base_name: what the base calls itself.
        notes: remarks on its weights, for the model listing.
        max_sequence_tokens: positions that one sequence may take, see `request.positions_taken`.
        num_blocks: KV blocks there are.
        block_size: tokens of one.
        max_virtual_tokens: virtual tokens that leave a request its room in the KV blocks.
    """

    base: dict[str, Any]
    base_name: str
    notes: tuple[str, ...]
    max_sequence_tokens: int
    num_blocks: int
    block_size: int
    max_virtual_tokens: int


@dataclass(frozen=True)
class StartFailed:
    """First message: the engine cannot start, and why. `kind` is the error's class name."""

    kind: str
    message: str


def run_engine(config: EngineConfig, connection: Connection) -> None:
    """Body of the engine process: start, then serve until Shutdown or until the other end is gone."""
    # The parent decides when to stop; both reach the whole group, from a terminal or a supervisor.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        engine, ready = _start(config)
    except Exception as error:
        connection.send(StartFailed(type(error).__name__, str(error)))
        return
    connection.send(ready)
    try:
        _serve(engine, connection)
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone, and with it all who wait for tokens
    finally:
        engine.close()


def _end_with_parent() -> None:
    """Wait for the parent's end and follow it, though a step or a load may never end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)


def spin_briefly() -> None:
    """Let torch's threads spin for some 0.2 ms between operations before they sleep, not for several.

    Before torch is imported. Between steps they spin beside Python: at 32 rows that was 5 % of processor
    time, and as many tokens came. A tenth of it halves the speed of single rows.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _start(config: EngineConfig) -> tuple[Any, Ready]:
    spin_briefly()
    # Imported here: the parent imports this file for its messages, and needs no torch for them.
    import torch

    from adapters.checkpoint.folder import load_serving_form
    from adapters.checkpoint.limits import CheckpointLimits
    from server.base.served import load_served
    from server.base.tokenizer import load_tokenizer
    from server.engine.engine import Engine
    from server.engine.grammar_compiler import Vocabulary

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = load_served(
        config.base, dtype=config.dtype, device=config.device, revision=config.revision
    )
    blobs, limits = Path(config.blobs_dir), CheckpointLimits()
    engine = Engine(
        loaded.model,
        loaded.spec,
        config,
        lambda digest: load_serving_form(blobs / digest, loaded.spec, limits, digest=digest),
        lambda: Vocabulary.of(load_tokenizer(loaded.tokenizer_dir), loaded.eos_token_ids),
    )
    # What loading took; the allocator would keep it.
    give_back_free_memory()
    by_blocks = engine.limits.num_blocks * engine.limits.block_size
    ready = Ready(
        base=loaded.spec.to_dict(),
        base_name=loaded.name,
        notes=tuple(loaded.notes),
        max_sequence_tokens=min(loaded.spec.max_positions, by_blocks),
        num_blocks=engine.limits.num_blocks,
        block_size=engine.limits.block_size,
        max_virtual_tokens=engine.scheduler.limits.max_virtual_tokens,
    )
    return engine, ready


def _serve(engine: Any, connection: Connection) -> None:
    reported: StatsEvent | None = None
    reported_at = 0.0
    while True:
        events: list[Event] = []
        # With work at hand only what has arrived already; without, wait for something.
        timeout = 0.0 if engine.has_work else _IDLE_SECONDS
        while connection.poll(timeout):
            command: Command = connection.recv()
            if isinstance(command, Shutdown):
                return
            events += _apply(engine, command)
            timeout = 0.0
        if engine.has_work:
            events += engine.step()
        else:
            engine.scheduler.check_integrity()
            events += engine.residency_changes()  # a command may have moved an adapter
        stats = engine.stats()
        now = time.monotonic()
        if stats != reported or now - reported_at >= _IDLE_SECONDS:  # also a sign of life
            events.append(stats)
            reported, reported_at = stats, now
        if events:
            connection.send(events)


def _apply(engine: Any, command: Command) -> list[Event]:
    if isinstance(command, GenerationRequest):
        try:
            submitted: list[Event] = engine.submit(command)
        except Exception as error:  # one request's fault is no end of all others
            log.error("a request could not be queued", exc_info=error)
            engine.abort(command.request_id)
            message = f"the request could not be queued: {error}"
            return [FailedEvent(command.request_id, "engine_error", message)]
        return submitted
    if isinstance(command, Abort):
        engine.abort(command.request_id)
    elif isinstance(command, Preload):
        engine.preload(command.adapter)
    elif isinstance(command, Unload):
        engine.unload(command.digest)
    elif isinstance(command, Drop):
        engine.drop(command.digest)
    return []
