"""The store of jobs on a real disk: life, leases, events, restarts, races, kills, a full disk."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from adapters.errors import RegistryError, StorageFull, TrainingError
from server import errors
from server.store.job_limits import QueueLimits, Retention
from server.store.job_states import FINISHED
from server.store.jobs import MAX_INTERRUPTIONS, Claim, JobStore
from server.store.registry import Registry
from tests.full_disk import run_on_a_small_disk
from tests.server.jobs.clock import Clock
from tests.server.jobs.examples import EXAMPLES, a_job, many
from tests.server.store.callers import caller

NO_JOB = "job-" + "0" * 24


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(root: Path, clock: Clock) -> Iterator[JobStore]:
    opened = JobStore(root, clock=clock)
    yield opened
    opened.close()


def claimed(store: JobStore, lease_seconds: float = 10) -> Claim:
    claim = store.claim(lease_seconds)
    assert claim is not None
    return claim


def folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in (root / "jobs").iterdir())


def staging(root: Path) -> list[Path]:
    return list((root / "staging").iterdir())


def states_said(store: JobStore, job_id: str) -> list[str]:
    return [event.data["state"] for event in store.events(job_id) if event.kind == "state"]


# --- in and out -----------------------------------------------------------------------------


def test_what_is_created_can_be_read(store: JobStore, root: Path, clock: Clock) -> None:
    record = store.create(a_job(), EXAMPLES)
    assert record == store.get(record.id)
    assert record.job == a_job()
    assert (record.state, record.adapter, record.method) == ("queued", "mine", "ia3")
    assert record.created_at == datetime.fromtimestamp(clock.now, UTC)
    assert (record.started_at, record.finished_at, record.progress) == (None, None, {})
    assert (record.metrics, record.error, record.adapter_version) == (None, None, None)
    assert (record.cancel_requested, record.attempts) == (False, 0)
    assert store.examples(record.id) == EXAMPLES
    directory = store.directory(record.id)
    assert [path.name for path in directory.iterdir()] == ["examples.jsonl"]
    assert (directory / "examples.jsonl").read_bytes().count(b"\n") == 1 + len(EXAMPLES.train)
    assert staging(root) == []
    assert [(e.id, e.kind, e.data) for e in store.events(record.id)] == [
        (1, "state", {"state": "queued"})
    ]


def test_listing_is_newest_first_whatever_the_clock_says(store: JobStore, clock: Clock) -> None:
    ids = []
    for _ in range(3):
        ids.append(store.create(a_job(), EXAMPLES).id)
        clock.advance(-100)
    assert [record.id for record in store.list()] == ids[::-1]
    assert [record.id for record in store.list(offset=1, limit=1)] == [ids[1]]
    assert store.list(offset=3) == []
    assert store.count() == 3


@pytest.mark.parametrize("job_id", [NO_JOB, "", "job-1", "../jobs", "job-" + "0" * 24 + "\n"])
def test_what_is_not_there_is_said(job_id: str, store: JobStore) -> None:
    for call in (store.get, store.examples, store.events, store.cancel, store.delete):
        with pytest.raises(errors.JobNotFound):
            call(job_id)
    if job_id != NO_JOB:
        with pytest.raises(errors.JobNotFound):
            store.directory(job_id)


def test_too_many_waiting_jobs_are_refused(root: Path) -> None:
    store = JobStore(root, queue=QueueLimits(2))
    first, _ = store.create(a_job(), EXAMPLES), store.create(a_job(), EXAMPLES)
    with pytest.raises(errors.TooManyJobs, match="2 training jobs wait"):
        store.create(a_job(), EXAMPLES)
    assert (store.count(), len(folders(root)), staging(root)) == (2, 2, [])
    assert claimed(store).job_id == first.id
    store.create(a_job(), EXAMPLES)  # a running job waits no more
    store.close()


def test_each_owner_has_a_share_of_the_queue_and_hears_of_no_other(root: Path) -> None:
    everybody = JobStore(root, queue=QueueLimits(4))
    mine, yours, third = (everybody.seen_by(caller(name)) for name in ("mine", "yours", "third"))
    ids = [mine.create(a_job(), EXAMPLES).id for _ in range(2)]
    with pytest.raises(errors.TooManyJobs, match="2 training jobs of yours wait") as caught:
        mine.create(a_job(), EXAMPLES)
    assert (caught.value.came, caught.value.expected) == ("2", "fewer than 2 waiting jobs")
    for _ in range(2):
        yours.create(a_job(), EXAMPLES)
    with pytest.raises(errors.TooManyJobs) as caught:
        third.create(a_job(), EXAMPLES)
    assert not re.search("[0-9]", str(caught.value))
    assert (caught.value.came, caught.value.expected) == (None, None)
    with pytest.raises(errors.TooManyJobs, match="4 training jobs wait"):
        everybody.create(a_job(), EXAMPLES)
    mine.cancel(ids[0])
    third.create(a_job(), EXAMPLES)
    everybody.close()


def test_the_bytes_of_waiting_jobs_are_limited(root: Path) -> None:
    """What has ended, or runs, takes none; a job alone is taken whatever its size."""
    store = JobStore(root, queue=QueueLimits(max_bytes=3000, max_bytes_per_owner=10))
    large = many(50)
    first = store.create(a_job(num_rows=50), large)
    num_bytes = (store.directory(first.id) / "examples.jsonl").stat().st_size
    assert num_bytes > 1500
    with pytest.raises(errors.TooManyJobs, match=f"of {num_bytes} bytes wait"):
        store.create(a_job(num_rows=50), large)
    mine = store.seen_by(caller("mine"))
    with pytest.raises(errors.TooManyJobs, match="queue of training jobs is full"):
        mine.create(a_job(num_rows=50), large)
    claimed(store)
    mine.create(a_job(num_rows=50), large)
    with pytest.raises(errors.TooManyJobs, match=f"of {num_bytes} bytes of yours wait"):
        mine.create(a_job(), EXAMPLES)
    assert (store.count(), len(folders(root)), staging(root)) == (2, 2, [])
    store.close()


def ended(store: JobStore) -> str:
    job_id = store.create(a_job(), EXAMPLES).id
    (store.directory(job_id) / "log.txt").write_bytes(b"x" * 1000)
    store.finish(claimed(store), "succeeded", adapter_version=1)
    return job_id


def test_ended_jobs_are_kept_for_a_time_a_number_and_a_size(root: Path, clock: Clock) -> None:
    """For each owner; what waits or runs is never removed, nor another's."""
    kept = Retention(days=30, max_jobs=3, max_bytes=10**6)
    store = JobStore(root, clock=clock, retention=kept)
    mine, yours = (store.seen_by(caller(name)) for name in ("mine", "yours"))
    old = ended(yours)
    clock.advance(20 * 86_400)
    ids = [ended(mine) for _ in range(4)]
    assert store.prune() == (ids[0],)
    clock.advance(11 * 86_400)
    waits = store.create(a_job(), EXAMPLES).id
    assert store.prune() == (old,)
    assert store.prune() == ()
    for job_id in (ids[0], old):
        with pytest.raises(errors.JobNotFound):
            store.get(job_id)
    assert sorted(folders(root)) == sorted([*ids[1:], waits])
    small = JobStore(root, clock=clock, retention=Retention(max_bytes=3000))
    assert len(small.prune()) == 2  # each has its log, and 200 bytes for each of its three events
    assert sorted(folders(root)) == sorted([ids[3], waits])
    small.close()
    store.close()


def test_a_request_that_is_not_json_leaves_nothing(store: JobStore, root: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.create(a_job(), EXAMPLES, {"x": float("nan")})
    assert (store.count(), folders(root), staging(root)) == (0, [], [])


def test_a_job_of_a_version_that_stored_text_is_refused(store: JobStore) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    path = store.directory(job_id) / "examples.jsonl"
    path.rename(path.with_name("rows.jsonl"))
    with pytest.raises(TrainingError, match="delete the job and send it again"):
        store.examples(job_id)


def test_a_commit_that_fails_takes_the_folder_back(store: JobStore, root: Path) -> None:
    with store._database.write() as session:
        for statement in (
            "CREATE TABLE late (x REFERENCES adapters (name) DEFERRABLE INITIALLY DEFERRED)",
            "CREATE TRIGGER no AFTER INSERT ON jobs BEGIN INSERT INTO late VALUES ('x'); END",
        ):
            session.connection().exec_driver_sql(statement)
    with pytest.raises(IntegrityError):
        store.create(a_job(), EXAMPLES)
    assert (store.count(), folders(root), staging(root)) == (0, [], [])


# --- claims ---------------------------------------------------------------------------------


def test_the_life_of_a_job(store: JobStore, clock: Clock) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    start = clock.now
    clock.advance(5)
    claim = claimed(store)
    assert claim == Claim(job_id, 1)
    record = store.get(job_id)
    assert (record.state, record.attempts) == ("running", 1)
    assert record.started_at == datetime.fromtimestamp(start + 5, UTC)
    assert store.running() == [(record, 1, start + 15)]
    assert store.claim(10) is None
    assert store.add_event(claim, "step", {"step": 1, "loss": 0.5}) == 3
    assert store.add_event(claim, "evaluation", {"accuracy": 1 / 3}) == 4
    assert store.get(job_id).progress == {"step": 1, "loss": 0.5}
    (store.directory(job_id) / "state").mkdir()
    (store.directory(job_id) / "state" / "x").touch()
    clock.advance(5)
    store.finish(claim, "succeeded", metrics={"accuracy": 1 / 3}, adapter_version=7)
    record = store.get(job_id)
    assert (record.state, record.metrics, record.adapter_version, record.error) == (
        "succeeded",
        {"accuracy": 1 / 3},
        7,
        None,
    )
    assert record.finished_at == datetime.fromtimestamp(start + 10, UTC)
    assert store.running() == []
    assert not (store.directory(job_id) / "state").exists()
    assert store.examples(job_id) == EXAMPLES
    events = store.events(job_id)
    assert [(event.id, event.kind) for event in events] == [
        (1, "state"),
        (2, "state"),
        (3, "step"),
        (4, "evaluation"),
        (5, "state"),
    ]
    assert events[1].data == {"state": "running", "attempt": 1}
    assert events[-1].data == {"state": "succeeded", "adapter_version": 7}
    assert events[-1].at == record.finished_at
    assert store.events(job_id, after=3, limit=1) == [events[3]]
    assert store.events(job_id, after=5) == []


def test_a_failure_says_why(store: JobStore) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    error = {"code": "training_diverged", "message": "the loss is NaN"}
    store.finish(claimed(store), "failed", error=error)
    assert store.get(job_id).error == error
    assert store.events(job_id)[-1].data == {"state": "failed", "error": error}


def test_an_interrupted_job_comes_first_then_the_oldest(store: JobStore, clock: Clock) -> None:
    ids = [store.create(a_job(), EXAMPLES).id for _ in range(4)]
    claims = [claimed(store, lease_seconds=1) for _ in range(2)]
    store.lose(claims[1], "signal SIGSEGV")
    assert [claimed(store).job_id for _ in range(2)] == [ids[1], ids[2]]
    clock.advance(2)
    assert store.get(ids[0]).interrupted
    assert [claimed(store).job_id for _ in range(2)] == [ids[0], ids[3]]
    assert store.claim(10) is None
    assert not any(record.interrupted for record in store.list())


def test_a_job_for_another_base_keeps_its_place(store: JobStore, clock: Clock) -> None:
    """A server of another base claims neither what waits nor what is interrupted; it ends what is over."""
    ids = [store.create(a_job(base_digest=one * 64), EXAMPLES).id for one in "bbca"]
    first, second = claimed(store, lease_seconds=1), claimed(store, lease_seconds=1)
    assert [first.job_id, second.job_id] == ids[:2]
    store.cancel(second.job_id)
    clock.advance(2)
    theirs = store.claim(10, base_digest="a" * 64)
    assert theirs is not None
    assert theirs.job_id == ids[3]
    assert store.claim(10, base_digest="a" * 64) is None
    assert [store.get(one).state for one in ids[:3]] == ["running", "cancelled", "queued"]
    mine = store.claim(10, base_digest="b" * 64)
    assert mine is not None
    assert mine.job_id == ids[0]


def test_a_job_of_a_dead_process_is_interrupted_at_once(root: Path, clock: Clock) -> None:
    """Not when its lease ends; a claim of a process that lives is left alone."""
    store = JobStore(root, clock=clock)
    ids = [store.create(a_job(), EXAMPLES).id for _ in range(3)]
    with store.held() as alive:
        assert store.claim(60, holder=alive) is not None
        program = (
            "import os, sys; from pathlib import Path; from server.store.jobs import JobStore\n"
            "store = JobStore(Path(sys.argv[1]), clock=lambda: float(sys.argv[2]))\n"
            "with store.held() as name:\n"
            "    store.claim(60, holder=name, facts={'nice': 19})\n"
            "    os.kill(os.getpid(), 9)"
        )
        subprocess.run([sys.executable, "-c", program, str(root), str(clock())], check=False)
        assert [one.interrupted for one in store.list()] == [False, True, False]
        store.sweep()  # as the next server does when it starts
        assert [one.interrupted for one in store.list()] == [False, True, False]
        kinds = [(event.kind, event.data) for event in store.events(ids[1])]
        assert kinds[1:] == [
            ("state", {"state": "running", "attempt": 1, "nice": 19}),
            ("interrupted", {}),
        ]
        assert [claimed(store).job_id for _ in range(2)] == [ids[1], ids[2]]
        assert [event.kind for event in store.events(ids[1])].count("interrupted") == 1
        assert not store.get(ids[0]).interrupted
    store.close()


def test_a_lease_that_ran_out_can_be_claimed_and_the_old_one_is_dead(
    store: JobStore, clock: Clock
) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    old = claimed(store, lease_seconds=10)
    clock.advance(9)
    assert store.renew(old, 10) is False
    clock.advance(10)
    assert store.claim(10) is None  # to the last moment
    clock.advance(0.001)
    new = claimed(store)
    assert new == Claim(job_id, 2)
    before = (store.get(job_id), store.events(job_id), store.running())
    for call in (
        lambda: store.renew(old, 1000),
        lambda: store.add_event(old, "step", {"step": 9}),
        lambda: store.finish(old, "succeeded", metrics={}),
        lambda: store.release(old),
    ):
        with pytest.raises(errors.LeaseLost, match="token 2, not 1"):
            call()
    assert (store.get(job_id), store.events(job_id), store.running()) == before
    assert states_said(store, job_id) == ["queued", "running", "running"]
    store.renew(new, 10)


def test_a_late_worker_keeps_its_job_while_nobody_else_has_it(
    store: JobStore, clock: Clock
) -> None:
    store.create(a_job(), EXAMPLES)
    claim = claimed(store, lease_seconds=1)
    clock.advance(100)
    store.renew(claim, 10)
    assert store.claim(10) is None


def test_a_job_that_kills_its_workers_fails(store: JobStore) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    for attempt in (1, 2, 3):
        claim = claimed(store)
        assert claim.token == attempt
        store.lose(claim, "signal SIGKILL")
    assert store.claim(10) is None
    record = store.get(job_id)
    assert (record.state, record.attempts) == ("failed", 3)
    assert record.error is not None
    assert record.error["code"] == "worker_lost"
    assert record.finished_at is not None


def test_a_checkpoint_forgives_lost_workers(store: JobStore) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    for _ in range(6):
        claim = claimed(store)
        store.add_event(claim, "checkpoint", {"step": 1})
        store.lose(claim, "exit status 1")
    assert store.get(job_id).state == "running"
    for _ in range(2):
        store.lose(claimed(store), "exit status 1")
    assert store.claim(10) is None
    assert store.get(job_id).state == "failed"


def test_servers_that_end_are_no_lost_workers_but_not_for_ever(
    store: JobStore, clock: Clock
) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    for attempt in range(1, MAX_INTERRUPTIONS + 1):
        claimed(store)
        assert store.get(job_id).attempts == attempt > 0
        clock.advance(11)
    assert store.claim(10) is None
    error = store.get(job_id).error
    assert error is not None
    assert error["code"] == "worker_lost"
    assert f"{MAX_INTERRUPTIONS} servers ended" in error["message"]


def test_a_lost_job_that_fails_makes_way_for_the_next(root: Path, clock: Clock) -> None:
    store = JobStore(root, clock=clock, max_attempts=1)
    ids = [store.create(a_job(), EXAMPLES).id for _ in range(2)]
    claims = [claimed(store), claimed(store)]
    store.lose(claims[0], "exit status 1")
    store.add_event(claims[1], "checkpoint", {})
    assert store.claim(10) is None
    store.lose(claims[1], "exit status 1")
    assert store.claim(10) is None
    assert [store.get(job_id).state for job_id in ids] == ["failed", "failed"]
    store.close()


def test_handing_back_is_no_attempt(store: JobStore) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    for token in range(1, 6):
        claim = claimed(store)
        assert claim.token == token
        store.release(claim)
        assert (store.get(job_id).state, store.get(job_id).attempts) == ("queued", 0)
        with pytest.raises(errors.LeaseLost):
            store.renew(claim, 10)
    first_start = store.get(job_id).started_at
    claimed(store)
    assert store.get(job_id).started_at == first_start


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_job_is_finished_with_a_finished_state(state: Any, store: JobStore) -> None:
    store.create(a_job(), EXAMPLES)
    claim = claimed(store)
    with pytest.raises(ValueError, match=r"cancelled.*failed.*succeeded"):
        store.finish(claim, state)
    assert store.renew(claim, 10) is False


# --- cancel and delete ----------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once(store: JobStore) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    record = store.cancel(job_id)
    assert record == store.get(job_id)
    assert (record.state, record.cancel_requested) == ("cancelled", True)
    assert record.finished_at is not None
    assert record.started_at is None
    assert store.claim(10) is None


def test_a_running_job_is_asked_to_end(store: JobStore) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    claim = claimed(store)
    assert store.cancel(job_id).state == "running"
    assert store.renew(claim, 10) is True
    assert store.cancel(job_id) == store.get(job_id)
    store.finish(claim, "cancelled")
    assert store.get(job_id).state == "cancelled"


@pytest.mark.parametrize("way", ["lost", "released"])
def test_a_cancel_outlives_the_worker(way: str, store: JobStore, clock: Clock) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    claim = claimed(store)
    store.cancel(job_id)
    if way == "lost":
        clock.advance(11)
    else:
        store.release(claim)
    assert store.claim(10) is None
    assert store.get(job_id).state == "cancelled"
    assert states_said(store, job_id) == ["queued", "running", "cancelled"]


@pytest.mark.parametrize("state", sorted(FINISHED))
def test_a_finished_job_never_changes_again(state: Any, store: JobStore, clock: Clock) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    claim = claimed(store)
    store.finish(claim, state)
    before = (store.get(job_id), store.events(job_id))
    assert store.cancel(job_id) == before[0]
    clock.advance(100)
    assert store.claim(10) is None
    for call in (
        lambda: store.renew(claim, 10),
        lambda: store.add_events(claim, [("step", {"step": 1})]),
        lambda: store.finish(claim, "failed"),
        lambda: store.release(claim),
    ):
        with pytest.raises(errors.LeaseLost, match=state):
            call()
    assert (store.get(job_id), store.events(job_id)) == before


def test_only_a_finished_job_is_deleted(store: JobStore, root: Path) -> None:
    job_id, other = store.create(a_job(), EXAMPLES).id, store.create(a_job(), EXAMPLES).id
    with pytest.raises(errors.JobActive, match="queued"):
        store.delete(job_id)
    claim = claimed(store)
    with pytest.raises(errors.JobActive, match="running") as caught:
        store.delete(job_id)
    assert caught.value.came == "running"
    store.finish(claim, "failed")
    store.delete(job_id)
    assert (store.count(), folders(root), staging(root)) == (1, [other], [])
    with pytest.raises(errors.JobNotFound):
        store.events(job_id)
    with pytest.raises(errors.LeaseLost, match="deleted"):
        store.renew(claim, 10)
    with store._database.read() as session:
        count = session.connection().exec_driver_sql("SELECT count(*) FROM job_events").scalar()
    assert count == 1


# --- events ---------------------------------------------------------------------------------


def test_several_events_in_one_transaction(store: JobStore) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    claim = claimed(store)
    added = [("step", {"step": 1}), ("evaluation", {"loss": 0.5}), ("step", {"step": 2})]
    assert store.add_events(claim, added) == 5
    assert [(e.kind, e.data) for e in store.events(job_id, after=2)] == added
    assert store.get(job_id).progress == {"step": 2}
    assert store.add_events(claim, []) == 5


@pytest.mark.parametrize(
    "data", [{"loss": float("nan")}, {"loss": float("inf")}, {"x": {1}}, {"x": "\ud800"}]
)
def test_events_are_json_that_a_client_can_read(data: dict[str, Any], store: JobStore) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    claim = claimed(store)
    with pytest.raises(ValueError, match=r"JSON|surrogates"):
        store.add_events(claim, [("step", {"step": 1}), ("step", data)])
    with pytest.raises(ValueError, match=r"JSON|surrogates"):
        store.finish(claim, "succeeded", metrics=data)
    assert (store.get(job_id).state, store.get(job_id).progress) == ("running", {})
    assert len(store.events(job_id)) == 2


def test_a_worker_does_not_write_events_of_the_store(store: JobStore) -> None:
    store.create(a_job(), EXAMPLES)
    with pytest.raises(ValueError, match="state"):
        store.add_event(claimed(store), "state", {"state": "succeeded"})


def test_steps_are_thinned_and_bounded(root: Path, clock: Clock) -> None:
    store = JobStore(root, clock=clock, max_events=100)
    job_id = store.create(a_job(), EXAMPLES).id
    claim = claimed(store)
    for first in range(0, 200_000, 10_000):
        newest = store.add_events(
            claim, [("step", {"step": step}) for step in range(first, first + 10_000)]
        )
    assert newest == 100
    assert store.add_event(claim, "evaluation", {}) == 100
    assert store.get(job_id).progress == {"step": 199_999}
    store.finish(claim, "succeeded")
    events = store.events(job_id)
    assert [event.id for event in events] == list(range(1, 102))
    assert events[-1].data["state"] == "succeeded"
    steps = [event.data["step"] for event in events if event.kind == "step"]
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert gaps == sorted(gaps)
    assert (gaps[0], gaps[-1]) == (1, 512)
    store.close()


def test_what_is_not_a_step_is_not_thinned(root: Path) -> None:
    store = JobStore(root, max_events=100)
    store.create(a_job(), EXAMPLES)
    claim = claimed(store)
    store.add_events(claim, [("step", {})] * 1000)
    newest = store.add_event(claim, "evaluation", {"n": 0})
    assert store.add_event(claim, "evaluation", {"n": 1}) == newest + 1
    store.close()


# --- restarts, races, kills -----------------------------------------------------------------


def test_everything_survives_a_restart(root: Path, clock: Clock) -> None:
    first = JobStore(root, clock=clock)
    ids = [first.create(a_job(f"a{n}"), EXAMPLES).id for n in range(3)]
    claim = claimed(first)
    first.add_event(claim, "step", {"step": 1})
    seen = (first.list(), [first.events(job_id) for job_id in ids], first.running())
    first.close()
    second = JobStore(root, clock=clock)
    report = second.sweep()
    assert (report.orphans, report.states, report.staging_removed) == ((), (), 0)
    assert (second.list(), [second.events(job_id) for job_id in ids], second.running()) == seen
    assert second.examples(ids[2]) == EXAMPLES
    second.renew(claim, 10)  # the server is new, the worker may be the old one
    second.close()


def test_the_registry_and_the_store_share_a_directory(store: JobStore, root: Path) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    registry = Registry(root)
    registry.sweep()
    assert store.sweep().orphans == ()
    assert store.get(job_id).state == "queued"
    assert registry.count() == 0
    registry.close()


def test_a_sweep_removes_what_a_crash_left(store: JobStore, root: Path) -> None:
    finished, waiting = (store.create(a_job(), EXAMPLES).id for _ in range(2))
    claim = claimed(store)
    store.finish(claim, "failed")
    for job_id in (finished, waiting):
        (store.directory(job_id) / "state").mkdir()
    orphan = "job-" + "f" * 24  # a kill between the rename and the row
    shutil.copytree(root / "jobs" / waiting, root / "jobs" / orphan)
    (root / "jobs" / "notes").mkdir()  # not ours
    (root / "staging" / "abandoned").mkdir()
    report = store.sweep()
    assert (report.orphans, report.states, report.staging_removed) == ((orphan,), (finished,), 1)
    assert folders(root) == sorted([finished, waiting, "notes"])
    assert (store.directory(waiting) / "state").exists()
    assert store.examples(finished) == EXAMPLES


def test_sweeping_never_takes_a_job_that_is_being_created(store: JobStore, root: Path) -> None:
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            store.sweep()

    with ThreadPoolExecutor(5) as pool:
        sweeping = pool.submit(sweep)
        ids = list(pool.map(lambda _: store.create(a_job(), EXAMPLES).id, range(20)))
        done.set()
        sweeping.result()
    assert folders(root) == sorted(ids)
    assert all(store.examples(job_id) == EXAMPLES for job_id in ids)


def _claim_all(root: Path, start: Any, out: Any) -> None:
    store = JobStore(root)
    start.wait()
    claims = []
    while (claim := store.claim(600)) is not None:
        claims.append((claim.job_id, claim.token))
        store.add_event(claim, "step", {"step": 1})
        if len(claims) == 1:
            start.wait()  # until the other has one as well
    out.put(claims)
    store.close()


def test_two_processes_claim_each_job_once(root: Path) -> None:
    store = JobStore(root)
    ids = [store.create(a_job(), EXAMPLES).id for _ in range(30)]
    context = multiprocessing.get_context("spawn")
    start, out = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_claim_all, args=(root, start, out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert sorted(claim for claims in found for claim in claims) == sorted((i, 1) for i in ids)
    for job_id in ids:
        assert [event.id for event in store.events(job_id)] == [1, 2, 3]
    store.close()


_CREATOR = """
    import sys
    from pathlib import Path
    from server.store.job_limits import QueueLimits
    from server.store.jobs import JobStore
    from tests.server.jobs.examples import EXAMPLES, a_job, many
    store = JobStore(Path(sys.argv[1]), queue=QueueLimits(10**6))
    store.create(a_job(num_rows=100), many(50))
    print("ready", flush=True)
    while True:
        job_id = store.create(a_job(num_rows=100), many(50)).id
        store.cancel(job_id)
        if job_id.endswith("0"):
            store.delete(job_id)
"""


def test_a_kill_at_any_moment_leaves_nothing_half_done(root: Path) -> None:
    for delay in (0.05, 0.2):
        command = [sys.executable, "-c", textwrap.dedent(_CREATOR), str(root)]
        creator = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert creator.stdout is not None
        assert creator.stdout.readline() == "ready\n"
        time.sleep(delay)
        creator.send_signal(signal.SIGKILL)
        creator.communicate()
    store = JobStore(root)
    store.sweep()
    records = store.list(limit=10**6)
    assert records
    assert folders(root) == sorted(record.id for record in records)
    assert staging(root) == []
    for record in records:
        assert store.examples(record.id) == many(50)
        said = states_said(store, record.id)
        assert said == ["queued", "cancelled"][: len(said)]
        assert said[-1] == record.state
    store.close()


def test_what_is_not_a_database_is_refused(root: Path) -> None:
    root.mkdir()
    (root / "registry.db").write_bytes(b"not a database, " * 100)
    with pytest.raises(RegistryError, match="cannot be used"):
        JobStore(root)


# --- a full disk ----------------------------------------------------------------------------

# Fills a small disk of its own to within some blocks and queues a job: the failure strikes the
# rows, the folders or the database, depending on what is left.
_ON_A_FULL_DISK = """
    import sys
    from pathlib import Path
    from adapters.errors import StorageFull
    from server.store.job_limits import QueueLimits
    from server.store.jobs import JobStore
    from tests.server.jobs.examples import EXAMPLES, a_job, many
    disk = Path(sys.argv[1])
    store = JobStore(disk / "data", queue=QueueLimits(1000))
    first = store.create(a_job(), EXAMPLES).id
    claim = store.claim(600)
    outcomes = set()
    def attempt(call):
        try:
            call()
            outcomes.add("done")
        except StorageFull:
            outcomes.add("full")
    for free_kib in range(0, 160, 4):
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
            file.truncate(max(file.tell() - free_kib * 1024, 0))
        attempt(lambda: store.create(a_job(num_rows=200), many(100)))
        attempt(lambda: store.add_event(claim, "step", {"step": free_kib, "x": "y" * 5000}))
        filler.unlink()
        folders = {path.name for path in (disk / "data" / "jobs").iterdir()}
        assert folders == {record.id for record in store.list()}, (free_kib, folders)
        assert not list((disk / "data" / "staging").iterdir()), free_kib
        for record in store.list():
            if record.id != first:
                store.cancel(record.id)
                store.delete(record.id)
    events = store.events(first)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    store.finish(claim, "succeeded")
    assert outcomes == {"done", "full"}, outcomes
    store.close()
    print("held")
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    run_on_a_small_disk(_ON_A_FULL_DISK, tmp_path, "6m")


def test_a_full_database_is_storage_full_and_changes_nothing(store: JobStore, root: Path) -> None:
    job_id = store.create(a_job(), EXAMPLES).id
    claim = claimed(store)
    with store._database.read() as session:
        session.connection().exec_driver_sql("PRAGMA max_page_count = 1")
    with pytest.raises(StorageFull):
        store.add_events(claim, [("evaluation", {"x": "y" * 1000})] * 100)
    with pytest.raises(StorageFull):
        store.create(a_job(description="y" * 10_000), EXAMPLES)
    assert folders(root) == sorted(record.id for record in store.list())
    assert len(store.events(job_id)) == 2
    assert json.loads((store.directory(job_id) / "examples.jsonl").read_bytes().splitlines()[0])
