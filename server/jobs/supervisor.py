"""Claims jobs and runs a worker process for each, in a thread of the server or of `graftwork worker`.

    tick: check every run -> claim while there is capacity -> wait

The supervisor, not the worker, holds the lease and renews it while the process lives. A worker also
exits with its parent, so it never outlives its supervisor's lease. `_settle` alone decides the state of
a job whose process has ended, from the jobs table and the registry.

Several supervisors may share a data directory; a claim assigns a job to one of them. Jobs that were
planned for another base than the supervisor's wait for one that has it. Independent of
torch, HTTP and asyncio.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import structlog

from server.errors import JobNotFound, LeaseLost
from server.jobs import failures
from server.jobs.config import EXIT_DISK_FULL, WorkerConfig
from server.jobs.publishing import published_by
from server.jobs.worker_process import WorkerProcess, describe_exit
from server.store.job_states import FINISHED
from server.store.jobs import Claim, JobRecord, JobStore
from server.store.registry import Registry

log = structlog.get_logger(__name__)

LEASE_SECONDS = 10.0
# Tick interval; also the maximum delay before a cancellation is noticed.
TICK_SECONDS = 0.25
CLAIM_SECONDS = 1.0
# Grace period of a cancelled worker before it is killed.
CANCEL_SECONDS = 2.0
# The same of a worker that has written its job's outcome: it only has to exit, at its niceness.
EXIT_SECONDS = 10.0
STOP_SECONDS = 10.0

Ending = Literal["cancel", "leave"]


@dataclass
class _Run:
    """A worker process and its claim; times are of the monotonic clock.

    Attributes:
        renew_at: when to renew the lease.
        ending: why it was asked to stop, if it was.
        kill_at: when to kill it.
    """

    claim: Claim
    process: WorkerProcess
    renew_at: float
    ending: Ending | None = None
    kill_at: float = float("inf")


class Supervisor:
    """Runs the jobs of one data directory.

    Args:
        store: the jobs.
        registry: where their adapters are published.
        config: configuration of the workers.
        workers: maximum number of concurrent jobs.
        lease_seconds: lease duration; a job whose lease has expired can be claimed by any supervisor.
    """

    def __init__(
        self,
        store: JobStore,
        registry: Registry,
        config: WorkerConfig,
        *,
        workers: int,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._store = store
        self._registry = registry
        self._config = config
        self._workers = workers
        self._lease_seconds = lease_seconds
        self._runs: list[_Run] = []
        self._claim_at = 0.0
        self._stopping = False
        self._stop_seconds = STOP_SECONDS
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._base_digest: str | None = None
        self._held = ExitStack()
        self._holder: str | None = None

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the running workers, by job."""
        return {run.claim.job_id: run.process.pid for run in list(self._runs)}

    def start(self, base_digest: str | None = None) -> None:
        """Start claiming jobs. With 0 workers nothing is started.

        Args:
            base_digest: of the base of `config`; jobs for another one are left alone. None claims any, and
                the worker refuses a job for another base.
        """
        if self._workers == 0 or self._thread is not None:
            return
        self._base_digest = base_digest
        self._thread = threading.Thread(target=self._loop, name="graftwork-jobs", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tick now, because a job was added or cancelled. Thread-safe."""
        self._claim_at = 0.0
        self._wake.set()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Stop claiming, let workers write a checkpoint and exit, and requeue their jobs.

        Args:
            seconds: grace period; workers are then killed and lose the progress since their last
                checkpoint.
        """
        if self._thread is None:
            return
        self._stop_seconds = seconds
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self._thread = None

    # --- the thread -------------------------------------------------------------------------

    def _loop(self) -> None:
        with self._held:
            self._run_jobs()

    def _run_jobs(self) -> None:
        while not self._stopping:
            in_order = self._look_after_all()
            # If a lease could not be renewed, a claim might return a job that still runs here.
            if in_order and time.monotonic() >= self._claim_at:
                self._claim_more()
            self._wake.wait(TICK_SECONDS if self._runs else CLAIM_SECONDS)
            self._wake.clear()
        self._end_all()

    def _end_all(self) -> None:
        give_up_at = time.monotonic() + self._stop_seconds + CANCEL_SECONDS
        for run in self._runs:
            self._ask_to_leave(run, "leave", self._stop_seconds)
        while self._runs and time.monotonic() < give_up_at:
            self._look_after_all()
            time.sleep(TICK_SECONDS / 5)
        for run in self._runs:
            # The final state could not be written; the lease expires by itself.
            run.process.kill()
            run.process.close()
        self._runs.clear()

    def _look_after_all(self) -> bool:
        """Check every run. Returns whether all due actions succeeded."""
        in_order = True
        for run in list(self._runs):
            try:
                ended = self._look_after(run)
            except Exception:
                # A full disk or a locked database: retry on the next tick.
                log.exception("job_not_looked_after", job=run.claim.job_id)
                in_order = False
                continue
            if ended:
                self._runs.remove(run)
        return in_order

    def _look_after(self, run: _Run) -> bool:
        """One tick of one run. Returns whether the run is over."""
        code = run.process.poll()
        if code is not None:
            run.process.close()
            self._settle(run, code)
            return True
        now = time.monotonic()
        if now >= run.kill_at:
            run.process.kill()
            return False
        try:
            record = self._store.get(run.claim.job_id)
            if record.state == "running" and now >= run.renew_at:
                self._store.renew(run.claim, self._lease_seconds)
                run.renew_at = now + self._lease_seconds / 4
        except (LeaseLost, JobNotFound):
            log.warning("lease_lost", job=run.claim.job_id, token=run.claim.token)
            run.process.kill()
            return False
        if record.state != "running":
            # It has written the job's final state and is about to exit.
            run.kill_at = min(run.kill_at, now + EXIT_SECONDS)
        elif record.cancel_requested and run.ending != "cancel":
            self._ask_to_leave(run, "cancel", CANCEL_SECONDS)
        return False

    def _ask_to_leave(self, run: _Run, ending: Ending, seconds: float) -> None:
        run.ending = ending
        run.kill_at = min(run.kill_at, time.monotonic() + seconds)
        run.process.terminate()

    def _claim_more(self) -> None:
        try:
            if self._holder is None:
                self._holder = self._held.enter_context(self._store.held())
            while len(self._runs) < self._workers:
                claim = self._store.claim(
                    self._lease_seconds,
                    holder=self._holder,
                    facts={"nice": self._config.nice},
                    base_digest=self._base_digest,
                )
                if claim is None:
                    break
                self._run(claim)
        except Exception:
            log.exception("no_job_claimed")
        self._claim_at = time.monotonic() + CLAIM_SECONDS

    def _run(self, claim: Claim) -> None:
        path = self._store.directory(claim.job_id) / "log.txt"
        try:
            process = WorkerProcess(self._config, claim.job_id, claim.token, path)
        except Exception:
            self._store.release(claim)
            raise
        log.info("job_started", job=claim.job_id, pid=process.pid, nice=self._config.nice)
        self._runs.append(_Run(claim, process, time.monotonic() + self._lease_seconds / 4))

    # --- settling jobs whose process has ended -------------------------------------------------

    def _settle(self, run: _Run, code: int) -> None:
        """Write the job's state if the worker did not; jobs claimed by another are left unchanged."""
        job_id = run.claim.job_id
        try:
            record = self._store.get(job_id)
            if record.state in FINISHED:
                # The outcome counts, however its process ended afterwards.
                log.info("job_ended", job=job_id, state=record.state)
                return
            if record.state == "running":
                self._settle_unfinished(run, record, code)
        except (LeaseLost, JobNotFound):
            log.warning("lease_lost", job=job_id, token=run.claim.token)
        log.info("job_left", job=job_id, how=describe_exit(code))

    def _settle_unfinished(self, run: _Run, record: JobRecord, code: int) -> None:
        claim = run.claim
        done = published_by(self._registry, record)
        if done is not None:
            # It died between publishing and the final write: a published job has succeeded.
            self._store.finish(
                claim, "succeeded", metrics=done.metrics, adapter_version=done.version
            )
        elif record.cancel_requested:
            self._store.finish(claim, "cancelled")
        elif run.ending == "leave":
            self._store.release(claim)
        elif code == EXIT_DISK_FULL:
            error = failures.failed(failures.DISK_FULL, "the disk is full; nothing was published")
            self._store.finish(claim, "failed", error=error)
        else:
            self._store.lose(claim, describe_exit(code))
            self._claim_at = 0.0
