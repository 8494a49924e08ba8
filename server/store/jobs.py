"""Training jobs in the data directory's database: states, events and worker claims.

The row is the commit point: a job's folder is complete on disk before its row exists, and is removed
after the row is gone. A crash between the two leaves a folder that `sweep` removes.

A worker holds a claim on its job: a lease that must be renewed, and a fencing token that increases with
every claim of that job. A worker that has lost its lease may not know it, so every write carries the
token, and a stale token is rejected (LeaseLost). A job therefore has at most one effective worker.

Guarantees:

- States change as `server.store.job_states` says; a finished job never changes again.
- Event ids of a job are 1, 2, 3, ...; events are immutable.
- A job whose workers die by themselves `max_attempts` times without a new checkpoint fails with code
  "worker_lost". A worker that hands its job back does not count, nor one that ends with its server:
  such a job is interrupted, and only `MAX_INTERRUPTIONS` of these in a row fail it.
- An interrupted job is claimed before all that wait, and as soon as its server is known to be dead: a
  supervisor locks a folder while it lives (`held`), and the system releases the lock of a dead process.
- A caller with a key (`server.store.caller`) sees only the jobs of its owner.
- A cancellation is not lost: a running job that was asked to stop is cancelled even if its worker dies.
- A published job has succeeded: if its worker is lost after publishing and before the final write, the
  job succeeds, even if it was cancelled since.

Threads and processes may share one root: every write holds SQLite's write lock from its start to its
commit. Independent of HTTP, tensors, and the way workers are started.
"""

from __future__ import annotations

import builtins
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from sqlalchemy import ColumnElement, delete, func, select, true, update
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from adapters import synced_files
from adapters.errors import AdapterError
from adapters.training.examples import Examples
from adapters.training.job import TrainingJob
from server.errors import JobActive, LeaseLost
from server.store.adapter_names import MOST_COMPARED, did_you_mean, is_name, near_names
from server.store.caller import PerCaller
from server.store.database import Database
from server.store.job_files import JobFiles, no_job
from server.store.job_limits import EVENT_BYTES, EndedJob, QueueLimits, Retention
from server.store.job_states import FINISHED, TRANSITIONS, State, check_transition
from server.store.tables import JobEventRow, JobRow, VersionRow

QUEUE_LIMITS = QueueLimits()
RETENTION = Retention()
MAX_ATTEMPTS = 3
# A job that takes its server down with it every time must not do so for ever.
MAX_INTERRUPTIONS = 10
MAX_EVENTS = 20_000
# Supervisors and workers request at most half of it.
MAX_LEASE_SECONDS = 60.0


@dataclass(frozen=True)
class JobRecord:
    """A snapshot of a job.

    Attributes:
        id: "job-" and 24 hex digits.
        state: see `server.store.job_states`.
        adapter: the name it will be published under.
        method: such as "ia3".
        job: the job without its rows.
        created_at: aware UTC time, as are the next two.
        started_at: time of the first claim; None before.
        finished_at: None until finished.
        progress: data of the newest step; empty before the first.
        metrics: training metrics, once it has succeeded.
        error: {"code", "message"}, if it failed.
        adapter_version: the published version.
        cancel_requested: whether cancellation was requested.
        attempts: claims that were not released, counted from the one that made the last checkpoint.
        interrupted: whether it is running and has no worker at present; it is the next to be claimed.
        tuning: request fields stored beside the job; None for a job of Graftwork's own API.
    """

    id: str
    state: State
    adapter: str
    method: str
    job: TrainingJob
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    progress: dict[str, Any]
    metrics: dict[str, Any] | None
    error: dict[str, Any] | None
    adapter_version: int | None
    cancel_requested: bool
    attempts: int
    interrupted: bool
    tuning: dict[str, Any] | None


@dataclass(frozen=True)
class Claim:
    """The right to work on a job, for as long as its token is the job's newest."""

    job_id: str
    token: int


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; `id` counts from 1 within it, `at` is aware UTC time."""

    id: int
    kind: str
    data: dict[str, Any]
    at: datetime


@dataclass(frozen=True)
class JobSweep:
    """What a sweep removed: folders without a job, checkpoints of finished jobs, staging entries."""

    orphans: tuple[str, ...]
    states: tuple[str, ...]
    staging_removed: int


class JobStore(PerCaller):
    """All training jobs of one data directory.

    Args:
        root: the data directory, made if it is not there.
        queue: limits on queued jobs.
        retention: how long `prune` leaves jobs that have ended.
        max_attempts: workers of a job that may die without a new checkpoint.
        max_events: approximate number of events stored per job, see `add_events`.
        clock: Unix time, shared by all processes of one root. It may jump in either direction.

    Raises:
        RegistryError: the database there cannot be used.
        StorageFull: it could not be made.
    """

    def __init__(
        self,
        root: Path,
        *,
        queue: QueueLimits = QUEUE_LIMITS,
        retention: Retention = RETENTION,
        max_attempts: int = MAX_ATTEMPTS,
        max_events: int = MAX_EVENTS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._queue = queue
        self._retention = retention
        self._max_attempts = max_attempts
        self._max_events = max_events
        self._clock = clock
        self._files = JobFiles(root)
        self._database = Database(root / "registry.db")

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

    # --- in ---------------------------------------------------------------------------

    def create(
        self, job: TrainingJob, examples: Examples, tuning: Mapping[str, Any] | None = None
    ) -> JobRecord:
        """Queue a job.

        Args:
            job: the job without its rows.
            examples: its rows as token ids.
            tuning: request fields stored unchanged beside the job; JSON.

        Raises:
            TooManyJobs: the queue is full, or the caller's share of it.
            StorageFull: the disk is full; nothing was stored.
            ValueError: `tuning` is not plain JSON.
        """
        said = None if tuning is None else _plain(tuning)
        with self._database.read() as session:  # before a large file is written for nothing
            self._check_queue(session, 0)
        job_id = f"job-{secrets.token_hex(12)}"
        with (
            synced_files.full_disk_is_storage_full("the training data"),
            self._files.staged(examples) as staged,
        ):
            num_bytes = self._files.size_of(staged)
            try:
                with self._database.write() as session:
                    self._check_queue(session, num_bytes)
                    row = self._insert(session, job_id, job, said)
                    row.num_bytes = num_bytes
                    self._files.place(staged, job_id)
                    # Read before the commit: afterwards it may change at any moment.
                    return self._record(row)
            except BaseException:
                # If this fails too, the next sweep finds the orphan.
                with suppress(AdapterError, OSError, DatabaseError):
                    self._remove_orphans([job_id])
                raise

    # --- out --------------------------------------------------------------------------

    def get(self, job_id: str) -> JobRecord:
        """A snapshot of a job.

        Raises:
            JobNotFound: no such job.
        """
        with self._database.read() as session:
            return self._record(self._row(session, job_id))

    def list(self, offset: int = 0, limit: int = 100) -> list[JobRecord]:
        """Jobs, newest first."""
        statement = select(JobRow).where(self._seen()).order_by(JobRow.number.desc())
        with self._database.read() as session:
            return [
                self._record(row) for row in session.scalars(statement.offset(offset).limit(limit))
            ]

    def find(self, reference: str) -> str:
        """The id of a job: its own, or that of the newest job of an adapter.

        Args:
            reference: "job-…", or an adapter's name.

        Raises:
            JobNotFound: neither.
        """
        if not is_name(reference):
            raise no_job(reference)
        mine = JobRow.job["adapter"].as_string() == reference
        statement = select(JobRow.id).where(self._seen(), (JobRow.id == reference) | mine)
        # An adapter may be called like another one's job: the id means the job.
        newest = statement.order_by((JobRow.id == reference).desc(), JobRow.number.desc()).limit(1)
        with self._database.read() as session:
            found = session.scalar(newest)
            if found is None:
                raise no_job(reference, self._instead_of(session, reference))
        return found

    def _instead_of(self, session: Session, reference: str) -> str:
        """What to ask for where neither a job nor an adapter with one is called so."""
        adapter = JobRow.job["adapter"].as_string().label("adapter")
        jobs = select(adapter).where(self._seen()).order_by(JobRow.number.desc())
        recent = jobs.limit(MOST_COMPARED).subquery()
        names = sorted(session.scalars(select(recent.c.adapter).distinct()))
        # Ids resemble one another, so that a near one is not what was meant.
        near = [] if reference.startswith("job-") else near_names(reference, names)
        return did_you_mean(near) or "; GET /train lists the jobs"

    def list_after(
        self,
        after: str | None,
        limit: int,
        metadata: Mapping[str, str] | None = None,
        *,
        without_metadata: bool = False,
    ) -> builtins.list[JobRecord]:
        """Jobs older than the one with the id `after`, newest first.

        Args:
            after: a job's id; None starts with the newest.
            limit: maximum number of jobs.
            metadata: only jobs whose `tuning["metadata"]` contains these items.
            without_metadata: only jobs without `tuning["metadata"]`.

        Raises:
            JobNotFound: no job `after`.
        """
        statement = select(JobRow).where(self._seen()).order_by(JobRow.number.desc()).limit(limit)
        for name, value in (metadata or {}).items():
            # Not a JSON path, in which names would need quoting.
            said = func.json_each(JobRow.tuning, "$.metadata").table_valued("key", "value")
            found = select(said.c.key).where(said.c.key == name, said.c.value == value)
            statement = statement.where(found.exists())
        if without_metadata:
            statement = statement.where(JobRow.tuning["metadata"].as_string().is_(None))
        with self._database.read() as session:
            if after is not None:
                statement = statement.where(JobRow.number < self._row(session, after).number)
            return [self._record(row) for row in session.scalars(statement)]

    def count(self) -> int:
        """Jobs in all states."""
        with self._database.read() as session:
            return session.scalar(select(func.count()).select_from(JobRow).where(self._seen())) or 0

    def count_by_state(self) -> dict[State, int]:
        """Number of jobs in each state, for all owners; includes zeros."""
        statement = select(JobRow.state, func.count()).group_by(JobRow.state)
        with self._database.read() as session:
            found = {str(state): number for state, number in session.execute(statement)}
        return {state: found.get(state, 0) for state in TRANSITIONS}

    def examples(self, job_id: str) -> Examples:
        """The job's rows as token ids.

        Raises:
            JobNotFound: no such job.
            TrainingError: they are missing (an older version did not store them) or damaged.
        """
        return self._files.examples(job_id, self.get(job_id).job)

    def directory(self, job_id: str) -> Path:
        """The job's folder, see `server.store.job_files`.

        Raises:
            JobNotFound: not a valid job id.
        """
        return self._files.directory(job_id)

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> builtins.list[JobEvent]:
        """Events with an id above `after`, oldest first.

        Raises:
            JobNotFound: no such job.
        """
        with self._database.read() as session:
            number = self._row(session, job_id).number
            statement = (
                select(JobEventRow)
                .where(JobEventRow.job == number, JobEventRow.id > after)
                .order_by(JobEventRow.id)
                .limit(limit)
            )
            return [
                JobEvent(event.id, event.kind, event.data, event.at)
                for event in session.scalars(statement)
            ]

    def events_before(
        self, job_id: str, before: int | None = None, limit: int = 1000
    ) -> builtins.list[JobEvent]:
        """Events with an id below `before` (None: all), newest first.

        Raises:
            JobNotFound: no such job.
        """
        with self._database.read() as session:
            number = self._row(session, job_id).number
            statement = select(JobEventRow).where(JobEventRow.job == number)
            if before is not None:
                statement = statement.where(JobEventRow.id < before)
            newest = session.scalars(statement.order_by(JobEventRow.id.desc()).limit(limit))
            return [JobEvent(event.id, event.kind, event.data, event.at) for event in newest]

    def running(self) -> builtins.list[tuple[JobRecord, int, float]]:
        """Running jobs, oldest first, each with its token and the Unix time at which its lease ends."""
        statement = select(JobRow).where(JobRow.state == "running").order_by(JobRow.number)
        with self._database.read() as session:
            return [
                (self._record(row), row.token, row.lease_until or 0.0)
                for row in session.scalars(statement)
            ]

    # --- a worker's side --------------------------------------------------------------

    def held(self) -> AbstractContextManager[str]:
        """The name of a new holder of jobs, alive until the block ends or the process dies.

        Raises:
            StorageFull, StorageUnavailable: as `StagingArea.folder`.
        """
        return self._files.held()

    def claim(
        self,
        lease_seconds: float,
        *,
        holder: str | None = None,
        facts: Mapping[str, Any] | None = None,
        base_digest: str | None = None,
    ) -> Claim | None:
        """Claim the next job; None if there is none.

        Takes the oldest interrupted job, whose lease has expired or whose holder is dead, else the oldest
        queued one. An interrupted job that has published succeeds here, one whose cancellation was
        requested is cancelled, and one that lost too many workers fails.

        Args:
            lease_seconds: duration of the lease.
            holder: who claims it, of `held`; None is unknown: its end shows only when the lease expires.
            facts: more data of the event that the job runs; JSON.
            base_digest: claim only jobs that were planned for this base; others keep their place. None
                claims any.
        """
        with self._database.write() as session:
            now = self._clock()
            _shorten_leases(session, now, lease_seconds)
            self._note_dead_holders(session)
            row = self._next(session, now, base_digest)
            if row is None:
                return None
            if row.state == "queued":
                check_transition("queued", "running")
            row.state = "running"
            row.attempts += 1
            row.token += 1
            row.lease_until = now + lease_seconds
            row.holder = holder
            row.started_at = row.started_at or self._now()
            said = {"state": "running", "attempt": row.attempts, **(facts or {})}
            self._add(session, row, "state", said)
            return Claim(row.id, row.token)

    def lose(self, claim: Claim, how: str) -> None:
        """Record that a job's worker died by itself. The next claim resumes the job, or fails it.

        Raises:
            LeaseLost: the claim is no longer valid; nothing was changed.
        """
        with self._database.write() as session:
            row = _held(session, claim)
            row.num_lost += 1
            row.lease_until = 0.0
            self._add(session, row, "worker_lost", {"how": how})

    def renew(self, claim: Claim, lease_seconds: float) -> bool:
        """Extend the lease to `lease_seconds` from now. Returns whether cancellation was requested.

        An expired lease can be renewed until another worker claims the job.

        Raises:
            LeaseLost: the claim is no longer valid.
        """
        with self._database.write() as session:
            row = _held(session, claim)
            row.lease_until = self._clock() + lease_seconds
            return row.cancel_requested

    def add_event(self, claim: Claim, kind: str, data: Mapping[str, Any]) -> int:
        """As `add_events`, for one event."""
        return self.add_events(claim, [(kind, data)])

    def add_events(self, claim: Claim, events: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
        """Append events in one transaction. Returns the id of the job's newest event.

        The data of a "step" also becomes the job's `progress`; a "checkpoint" resets the count of lost
        workers. Steps are thinned out: the first tenth of `max_events` stores each step, and every
        further tenth fills at half the rate. Beyond `max_events` only state changes are stored.

        Raises:
            LeaseLost: the claim is no longer valid; nothing was added.
            ValueError: kind "state", which is reserved for the store, or data that is not plain JSON.
        """
        plain = [(kind, _plain(data)) for kind, data in events]
        if any(kind == "state" for kind, _ in plain):
            raise ValueError("events of kind 'state' are the store's own")
        with self._database.write() as session:
            row = _held(session, claim)
            for kind, data in plain:
                if kind == "step":
                    row.progress = data
                if kind == "checkpoint":
                    row.attempts = 1
                    row.num_lost = row.num_interrupted = 0
                if self._keeps(row, kind):
                    self._add(session, row, kind, data)
            return row.last_event

    def finish(
        self,
        claim: Claim,
        state: State,
        *,
        error: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        adapter_version: int | None = None,
    ) -> None:
        """Finish a job and remove its checkpoints.

        Args:
            claim: see `claim`.
            state: one of the finished ones.
            error: {"code", "message"}, if it failed.
            metrics: training metrics.
            adapter_version: the published version.

        Raises:
            LeaseLost: the claim is no longer valid; nothing was changed.
            ValueError: not a finished state, or values that are not plain JSON.
        """
        if state not in FINISHED:
            raise ValueError(f"expected one of {sorted(FINISHED)}, came {state!r}")
        plain_error = None if error is None else _plain(error)
        plain_metrics = None if metrics is None else _plain(metrics)
        with self._database.write() as session:
            row = _held(session, claim)
            row.metrics = plain_metrics
            row.adapter_version = adapter_version
            self._end(session, row, state, plain_error)
        self._files.discard_state(claim.job_id)

    def release(self, claim: Claim) -> None:
        """Release a job so that another worker can resume it at once; does not count as an attempt.

        A job whose cancellation was requested is cancelled instead.

        Raises:
            LeaseLost: the claim is no longer valid; nothing was changed.
        """
        with self._database.write() as session:
            row = _held(session, claim)
            if row.cancel_requested:
                self._end(session, row, "cancelled")
                return
            check_transition("running", "queued")
            row.state = "queued"
            row.attempts -= 1
            row.lease_until = None
            self._add(session, row, "state", {"state": "queued"})

    # --- change -----------------------------------------------------------------------

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a queued job, request cancellation of a running one, leave a finished one unchanged.

        Raises:
            JobNotFound: no such job.
        """
        with self._database.write() as session:
            row = self._row(session, job_id)
            if row.state == "queued":
                row.cancel_requested = True
                self._end(session, row, "cancelled")
            elif row.state == "running":
                row.cancel_requested = True
            record = self._record(row)
        if record.state == "cancelled":
            self._files.discard_state(job_id)
        return record

    def delete(self, job_id: str) -> None:
        """Remove a finished job, its events and its files.

        Raises:
            JobNotFound: no such job.
            JobActive: it is not finished; nothing was removed.
        """
        with self._database.write() as session:
            row = self._row(session, job_id)
            if row.state not in FINISHED:
                raise JobActive(
                    f"{job_id} is {row.state}; cancel it and wait until it has ended",
                    field="state",
                    expected=", ".join(sorted(FINISHED)),
                    came=row.state,
                )
            session.execute(delete(JobRow).where(JobRow.number == row.number))
        self._files.discard(job_id)

    def sweep(self) -> JobSweep:
        """Clean up at start: folders without a job, checkpoints of finished jobs, staging.

        Jobs whose holder is dead are interrupted from here on.
        """
        with self._database.write() as session:
            self._note_dead_holders(session)
        staging_removed = self._files.sweep_staging()
        orphans = self._remove_orphans(self._files.ids())
        with self._database.read() as session:
            finished = session.scalars(select(JobRow.id).where(JobRow.state.in_(FINISHED))).all()
        states = tuple(job_id for job_id in finished if self._files.discard_state(job_id))
        self._measure_unmeasured()
        return JobSweep(orphans, states, staging_removed)

    def prune(self) -> tuple[str, ...]:
        """Remove jobs that ended too long ago, or that are too many or too large for their owner.

        Their events, rows and logs go with them; a published adapter keeps its recipe, its metrics and the
        job's id.

        Returns:
            Their ids.
        """
        removed = []
        for job_id in self._retention.expired(self._ended(), self._now()):
            with self._database.write() as session:
                mine = (JobRow.id == job_id, JobRow.state.in_(FINISHED))
                gone = session.execute(delete(JobRow).where(*mine).returning(JobRow.id)).all()
            if gone:
                self._files.discard(job_id)
                removed.append(job_id)
        return tuple(removed)

    # --- inside -----------------------------------------------------------------------

    def _ended(self) -> builtins.list[EndedJob]:
        columns = (JobRow.id, JobRow.owner, JobRow.finished_at, JobRow.num_bytes, JobRow.last_event)
        ended = select(*columns).where(JobRow.state.in_(FINISHED)).order_by(JobRow.number.desc())
        with self._database.read() as session:
            return [
                EndedJob(row.id, row.owner, row.finished_at, _size(row))
                for row in session.execute(ended)
            ]

    def _measure_unmeasured(self) -> None:
        """Sizes of jobs from before they were stored."""
        with self._database.write() as session:
            for row in session.scalars(select(JobRow).where(JobRow.num_bytes == 0)).all():
                row.num_bytes = self._files.num_bytes(row.id)

    def _record(self, row: JobRow) -> JobRecord:
        gone = row.state == "running" and (
            (row.lease_until or 0.0) < self._clock()
            or (row.holder is not None and self._files.is_dead(row.holder))
        )
        return _record(row, interrupted=gone)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    def _check_queue(self, session: Session, new_bytes: int) -> None:
        owner = self._caller.owner
        counts = select(func.count(), func.coalesce(func.sum(JobRow.num_bytes), 0))
        queued = counts.select_from(JobRow).where(JobRow.state == "queued")
        if owner is not None:
            num_jobs, num_bytes = session.execute(queued.where(JobRow.owner == owner)).one()
            self._queue.check_owner(num_jobs, num_bytes, new_bytes)
        num_jobs, num_bytes = session.execute(queued).one()
        sees_all = self._caller.only_owner is None
        self._queue.check_all(num_jobs, num_bytes, new_bytes, counts_shown=sees_all)

    def _seen(self) -> ColumnElement[bool]:
        """Filter for the jobs visible to the caller."""
        only = self._caller.only_owner
        return true() if only is None else JobRow.owner == only

    def _row(self, session: Session, job_id: str) -> JobRow:
        row = session.scalars(select(JobRow).where(JobRow.id == job_id, self._seen())).first()
        if row is None:
            raise no_job(job_id)
        return row

    def _insert(
        self, session: Session, job_id: str, job: TrainingJob, tuning: dict[str, Any] | None
    ) -> JobRow:
        row = JobRow(
            id=job_id,
            state="queued",
            job=job.model_dump(mode="json"),
            created_at=self._now(),
            progress={},
            cancel_requested=False,
            attempts=0,
            num_lost=0,
            num_interrupted=0,
            num_bytes=0,
            token=0,
            last_event=0,
            skipped_steps=0,
            tuning=tuning,
            owner=self._caller.owner,
        )
        session.add(row)
        session.flush()  # parents first: the tables have foreign keys, the classes no relationships
        said = {"warnings": job.warnings} if job.warnings else {}
        self._add(session, row, "state", {"state": "queued", **said})
        session.flush()
        return row

    def _add(self, session: Session, row: JobRow, kind: str, data: dict[str, Any]) -> None:
        row.last_event += 1
        session.add(
            JobEventRow(job=row.number, id=row.last_event, kind=kind, data=data, at=self._now())
        )

    def _keeps(self, row: JobRow, kind: str) -> bool:
        """Whether to store an event; counts skipped steps."""
        if row.last_event >= self._max_events:
            return False
        if kind != "step":
            return True
        stride = 2 ** (10 * row.last_event // self._max_events)
        row.skipped_steps = (row.skipped_steps + 1) % stride
        return row.skipped_steps == 0

    def _end(
        self, session: Session, row: JobRow, state: State, error: dict[str, Any] | None = None
    ) -> None:
        check_transition(cast(State, row.state), state)
        row.state = state
        row.error = error
        row.lease_until = None
        row.num_bytes = self._files.num_bytes(row.id)
        row.finished_at = self._now()
        warning = (row.metrics or {}).get("warning")
        facts = {
            "error": row.error,
            "adapter_version": row.adapter_version,
            "warning": warning,
        }
        said = {key: value for key, value in facts.items() if value is not None}
        self._add(session, row, "state", {"state": state, **said})

    def _next(self, session: Session, now: float, base_digest: str | None) -> JobRow | None:
        """The job to claim next; interrupted ones that are over are finished on the way."""
        over = (JobRow.state == "running", JobRow.lease_until < now)
        for row in session.scalars(select(JobRow).where(*over).order_by(JobRow.number)).all():
            self._note_interruption(session, row)
            is_mine = base_digest in (None, row.job["base_digest"])
            if not self._end_lost(session, row) and is_mine:
                return row
        waiting = JobRow.state == "queued"
        if base_digest is None:
            return _first(session, waiting)
        return _first(session, waiting, JobRow.job["base_digest"].as_string() == base_digest)

    def _note_dead_holders(self, session: Session) -> None:
        held = select(JobRow).where(
            JobRow.state == "running", JobRow.lease_until > 0, JobRow.holder.is_not(None)
        )
        for row in session.scalars(held.order_by(JobRow.number)).all():
            if row.holder is not None and self._files.is_dead(row.holder):
                self._note_interruption(session, row)

    def _note_interruption(self, session: Session, row: JobRow) -> None:
        """End a lease, and say so once."""
        if row.lease_until:
            row.lease_until = 0.0
            row.num_interrupted += 1
            self._add(session, row, "interrupted", {})
            session.flush()

    def _end_lost(self, session: Session, row: JobRow) -> bool:
        """Finish a job that has no worker any more, unless another worker should resume it."""
        published = session.scalars(select(VersionRow).where(VersionRow.job_id == row.id)).first()
        if published is not None:
            row.metrics = published.metrics
            row.adapter_version = published.version
            self._end(session, row, "succeeded")
        elif row.cancel_requested:
            self._end(session, row, "cancelled")
        elif row.num_lost >= self._max_attempts:
            self._give_up(
                session,
                row,
                f"{row.num_lost} workers were lost, one after another, before any of them",
            )
        elif row.num_interrupted >= MAX_INTERRUPTIONS:
            self._give_up(
                session,
                row,
                f"{row.num_interrupted} servers ended while they trained it, before one",
            )
        else:
            return False
        session.flush()
        return True

    def _give_up(self, session: Session, row: JobRow, what: str) -> None:
        message = f"{what} got as far as a checkpoint; the job's log may say why"
        self._end(session, row, "failed", {"code": "worker_lost", "message": message})

    def _remove_orphans(self, job_ids: Iterable[str]) -> tuple[str, ...]:
        # Under the write lock: a folder and its row appear within one transaction.
        with self._database.write() as session:
            known = set(session.scalars(select(JobRow.id)))
            orphans = tuple(job_id for job_id in job_ids if job_id not in known)
            for job_id in orphans:
                self._files.discard(job_id)
            return orphans


# --- rules over rows ----------------------------------------------------------------------


def _first(session: Session, *conditions: Any) -> JobRow | None:
    return session.scalars(select(JobRow).where(*conditions).order_by(JobRow.number)).first()


def _shorten_leases(session: Session, now: float, lease_seconds: float) -> None:
    """Shorten leases that end far in the future: they predate a backward jump of the clock.

    A live holder renews its lease long before the new end.
    """
    too_late = now + lease_seconds + MAX_LEASE_SECONDS
    of_before = update(JobRow).where(JobRow.state == "running", JobRow.lease_until > too_late)
    session.execute(of_before.values(lease_until=now + lease_seconds))


def _held(session: Session, claim: Claim) -> JobRow:
    """The row of a claim; raises unless the claim is valid."""
    row = session.scalars(select(JobRow).where(JobRow.id == claim.job_id)).first()
    if row is None:
        raise LeaseLost(f"{claim.job_id} was deleted")
    if row.state != "running":
        raise LeaseLost(f"{claim.job_id} is {row.state}")
    if row.token != claim.token:
        raise LeaseLost(f"{claim.job_id} was claimed again: token {row.token}, not {claim.token}")
    return row


def _size(row: Any) -> int:
    return int(row.num_bytes) + EVENT_BYTES * int(row.last_event)


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data as the database will return it: JSON that is encodable as UTF-8.

    Raises:
        ValueError: not plain JSON; NaN and lone surrogates are refused too.
    """
    try:
        text = json.dumps(dict(data), ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except TypeError as error:
        raise ValueError(str(error)) from error
    return cast(dict[str, Any], json.loads(text))


def _record(row: JobRow, *, interrupted: bool) -> JobRecord:
    job = TrainingJob.model_validate(row.job)
    return JobRecord(
        id=row.id,
        state=cast(State, row.state),
        adapter=job.adapter,
        method=job.method,
        job=job,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        progress=row.progress,
        metrics=row.metrics,
        error=row.error,
        adapter_version=row.adapter_version,
        cancel_requested=row.cancel_requested,
        attempts=row.attempts,
        interrupted=interrupted,
        tuning=row.tuning,
    )
