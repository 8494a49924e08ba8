"""Any order of calls on the store: one valid claim a job, final ends, events without holes."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from server.errors import JobActive, JobNotFound, LeaseLost, TooManyJobs
from server.store.job_limits import QueueLimits
from server.store.job_states import FINISHED, TRANSITIONS, State
from server.store.jobs import Claim, JobEvent, JobRecord, JobStore
from tests.server.jobs.clock import Clock
from tests.server.jobs.examples import EXAMPLES, a_job

LEASE_SECONDS = 10.0
MAX_QUEUED = 2


class StoreMachine(RuleBasedStateMachine):
    """Remembers what was seen, and who ought to hold what."""

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    @initialize()
    def open(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.store = self.make_store()
        self.alive: dict[str, Claim | None] = {}  # each job there is, and its newest claim
        self.leases: dict[str, float] = {}
        self.seen_events: dict[str, list[JobEvent]] = {}
        self.ends: dict[str, JobRecord] = {}

    def make_store(self) -> JobStore:
        return JobStore(self.root, clock=self.clock, queue=QueueLimits(MAX_QUEUED), max_attempts=2)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.root)

    def in_state(self, state: State) -> list[str]:
        return [job_id for job_id in self.alive if self.store.get(job_id).state == state]

    # --- what may happen ----------------------------------------------------------------

    @rule(target=jobs)
    def create(self):
        if len(self.in_state("queued")) >= MAX_QUEUED:  # more where some were handed back
            with pytest.raises(TooManyJobs):
                self.store.create(a_job(), EXAMPLES)
            return multiple()
        job_id = self.store.create(a_job(), EXAMPLES).id
        assert job_id not in self.alive
        self.alive[job_id] = None
        return job_id

    @rule(target=claims, seconds=st.sampled_from([0.0, LEASE_SECONDS - 3, LEASE_SECONDS + 1]))
    def claim(self, seconds: float):
        self.clock.advance(seconds)
        waiting = self.in_state("queued")
        lost = [i for i in self.in_state("running") if self.leases[i] < self.clock()]
        claim = self.store.claim(LEASE_SECONDS)
        if claim is None:
            assert not waiting
            # What was lost is at an end now: it was to be cancelled, or had its workers.
            assert all(self.store.get(job_id).state in FINISHED for job_id in lost)
            return multiple()
        if claim.job_id not in lost:
            assert claim.job_id == waiting[0]
            assert all(self.store.get(job_id).state in FINISHED for job_id in lost)
        before = self.alive[claim.job_id]
        assert claim.token == (before.token if before else 0) + 1
        self.alive[claim.job_id] = claim
        self.leases[claim.job_id] = self.clock() + LEASE_SECONDS
        return claim

    def is_held(self, claim: Claim) -> bool:
        job_id = claim.job_id
        return self.alive.get(job_id) == claim and self.store.get(job_id).state == "running"

    def attempt(self, claim: Claim, call) -> bool:
        """Do it where the claim is good; see that nothing changes where it is not."""
        if self.is_held(claim):
            call()
            return True
        before = self.everything()
        with pytest.raises(LeaseLost):
            call()
        assert self.everything() == before
        return False

    def everything(self):
        return (
            self.store.list(),
            self.store.running(),
            [self.store.events(job_id) for job_id in self.alive],
        )

    @rule(claim=claims)
    def renew(self, claim: Claim) -> None:
        if self.attempt(claim, lambda: self.store.renew(claim, LEASE_SECONDS)):
            self.leases[claim.job_id] = self.clock() + LEASE_SECONDS

    @rule(claim=claims, kind=st.sampled_from(["step", "evaluation", "checkpoint"]))
    def add_event(self, claim: Claim, kind: str) -> None:
        data = {"step": claim.token}
        if self.attempt(claim, lambda: self.store.add_event(claim, kind, data)):
            newest = self.store.events(claim.job_id)[-1]
            assert (newest.kind, newest.data) == (kind, data)

    @rule(claim=claims, state=st.sampled_from(sorted(FINISHED)))
    def finish(self, claim: Claim, state: State) -> None:
        if self.attempt(claim, lambda: self.store.finish(claim, state)):
            assert self.store.get(claim.job_id).state == state

    @rule(claim=claims)
    def lose(self, claim: Claim) -> None:
        if self.attempt(claim, lambda: self.store.lose(claim, "exit status 1")):
            self.leases[claim.job_id] = 0.0
            assert self.store.get(claim.job_id).interrupted

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        self.attempt(claim, lambda: self.store.release(claim))

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        record = self.store.cancel(job_id)
        assert record.state in FINISHED or (record.state == "running" and record.cancel_requested)

    @rule(job_id=consumes(jobs))
    def delete_or_forget(self, job_id: str) -> None:
        if self.store.get(job_id).state not in FINISHED:
            with pytest.raises(JobActive):
                self.store.delete(job_id)
            return
        self.store.delete(job_id)
        for known in (self.alive, self.seen_events, self.ends):
            known.pop(job_id, None)
        with pytest.raises(JobNotFound):
            self.store.get(job_id)

    @rule()
    def reopen(self) -> None:
        before = self.everything()
        self.store.close()
        self.store = self.make_store()
        assert self.store.sweep().orphans == ()
        assert self.everything() == before

    # --- what always holds --------------------------------------------------------------

    @invariant()
    def one_valid_claim_a_running_job(self) -> None:
        running = {record.id: (token, until) for record, token, until in self.store.running()}
        for job_id, (token, until) in running.items():
            assert self.alive[job_id] == Claim(job_id, token)
            assert until == self.leases[job_id]
        assert running.keys() == set(self.in_state("running"))

    @invariant()
    def states_change_as_the_table_says_and_ends_are_final(self) -> None:
        for job_id in self.alive:
            said = [e.data["state"] for e in self.store.events(job_id) if e.kind == "state"]
            assert said[0] == "queued"
            for before, after in itertools.pairwise(said):
                # A lost job is claimed again without a change of state.
                assert after in TRANSITIONS[before] or (before, after) == ("running", "running")
            record = self.store.get(job_id)
            assert said[-1] == record.state
            assert (record.finished_at is not None) == (record.state in FINISHED)
            if record.state in FINISHED:
                assert self.ends.setdefault(job_id, record) == record

    @invariant()
    def events_have_no_holes_and_are_never_different(self) -> None:
        for job_id in self.alive:
            events = self.store.events(job_id)
            seen = self.seen_events.get(job_id, [])
            assert events[: len(seen)] == seen
            assert [event.id for event in events] == list(range(1, len(events) + 1))
            self.seen_events[job_id] = events

    @invariant()
    def every_job_has_its_files(self) -> None:
        folders = {entry.name for entry in (self.root / "jobs").iterdir()}
        assert folders == self.alive.keys()
        assert {record.id for record in self.store.list()} == folders


StoreMachine.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestStore = StoreMachine.TestCase
