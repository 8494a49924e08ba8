"""The job of a worker: load the base, read the examples, train, publish, record the result.

    load_base -> store.examples -> train -> publish -> finish

A job's final state is one write to the jobs table, after its adapter is published. A worker that is
killed in between leaves a running job with a published adapter. The next worker detects this by the
job's id and only writes the final state. Independent of the parent process.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import structlog

from adapters.training.loop import Stopped, TrainingEvent, train
from server.base.load import load_base
from server.errors import LeaseLost
from server.jobs import failures
from server.jobs.config import (
    EXIT_DISK_FULL,
    EXIT_LEASE_LOST,
    EXIT_STOPPED,
    WorkerConfig,
)
from server.jobs.publishing import Outcome, publish, published_by
from server.store.job_files import STATE_DIR
from server.store.jobs import Claim, JobStore
from server.store.registry import Registry

log = structlog.get_logger(__name__)

# Long enough to publish an adapter and to write the job's final state.
PUBLISH_LEASE_SECONDS = 30.0
STEP_SECONDS = 0.25


def run_job(config: WorkerConfig, claim: Claim) -> int:
    """Run a claimed job and write its final state.

    Returns:
        0, or one of `server.jobs.config.EXITS`.
    """
    store = JobStore(Path(config.data_dir))
    try:
        outcome = _work(config, store, claim)
        store.finish(claim, "succeeded", metrics=outcome.metrics, adapter_version=outcome.version)
    except Stopped:
        log.info("stopped")
        return EXIT_STOPPED
    except LeaseLost:
        log.warning("lease_lost", token=claim.token)
        return EXIT_LEASE_LOST
    except Exception as error:
        log.exception("failed")
        return _fail(store, claim, failures.describe(error))
    if warning := (outcome.metrics or {}).get("warning"):
        log.warning("adapter", warning=warning)
    log.info("succeeded", version=outcome.version)
    return 0


def _work(config: WorkerConfig, store: JobStore, claim: Claim) -> Outcome:
    record = store.get(claim.job_id)
    job = record.job
    log.info("claimed", job=claim.job_id, attempt=record.attempts, pid=os.getpid())
    for warning in job.warnings:
        log.warning("data", warning=warning)
    registry = Registry(Path(config.data_dir), reserved=(config.base_name,))
    try:
        if (done := published_by(registry, record)) is not None:
            log.info("published_before", version=done.version)
            return done
        base = load_base(
            config.base, dtype=config.dtype, device=config.device, revision=config.revision
        )
        log.info("base_loaded", base=config.base_name, dtype=base.spec.dtype)
        examples = store.examples(claim.job_id)
        events = EventWriter(lambda kind, data: store.add_event(claim, kind, data))
        with _stop_after_step() as should_stop:
            trained = train(
                job,
                examples,
                base.model,
                base.spec,
                on_event=events,
                state_dir=store.directory(claim.job_id) / STATE_DIR,
                checkpoint_seconds=config.checkpoint_seconds,
                should_stop=should_stop,
            )
        events.flush()
        # Last check that this worker may publish. If it stalls for longer than the lease between here
        # and the registry, another worker publishes the same bytes.
        if store.renew(claim, PUBLISH_LEASE_SECONDS):
            raise Stopped
        return publish(registry, config, record, base.spec, trained)
    finally:
        registry.close()


def _fail(store: JobStore, claim: Claim, error: dict[str, str]) -> int:
    # Its checkpoints are no longer needed, and on a full disk their space is needed for the final state.
    shutil.rmtree(store.directory(claim.job_id) / STATE_DIR, ignore_errors=True)
    try:
        store.finish(claim, "failed", error=error)
    except LeaseLost:
        return EXIT_LEASE_LOST
    except Exception:
        log.exception("finish_failed")
        if error["code"] == failures.DISK_FULL:
            return EXIT_DISK_FULL
        raise
    return 0


@contextmanager
def _stop_after_step() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGTERM requests a stop of training; then raises Stopped at its end.

    Before the block, SIGTERM ends the process at once: nothing would be lost. After the block it is
    ignored: publishing and writing the final state are short and must both complete.
    """
    requested = False

    def request(_signal: int, _frame: FrameType | None) -> None:
        nonlocal requested
        requested = True

    signal.signal(signal.SIGTERM, request)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if requested:
        raise Stopped


class EventWriter:
    """Forwards training events; step events are rate-limited.

    The step before any other event, and the last one, are always forwarded.

    Args:
        write: receives an event's kind and data.
        seconds: minimum time between two forwarded steps.
    """

    def __init__(
        self, write: Callable[[str, dict[str, Any]], object], seconds: float = STEP_SECONDS
    ) -> None:
        self._write = write
        self._seconds = seconds
        self._written_at = -seconds
        self._held: TrainingEvent | None = None

    def __call__(self, event: TrainingEvent) -> None:
        """Handle an event."""
        if event.kind != "step":
            self.flush()
            log.info(event.kind, **event.data)
            self._write(event.kind, event.data)
            return
        self._held = event
        if time.monotonic() - self._written_at >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Forward the latest step if it is pending."""
        if self._held is None:
            return
        held, self._held = self._held, None
        self._written_at = time.monotonic()
        self._write(held.kind, held.data)
