"""What becomes of a training job whose adapter and whose end are apart, on real worker processes.

A worker is caught where it is about to publish, or killed when it has just published; the hooks of
`tests/faults/hooks` do that inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.metadata import AdapterMetadata
from server.store.jobs import JobStore
from server.store.registry import Registry
from tests.adapters.checkpoints import BASE, soft_prompt
from tests.faults.storage_server import HOOKS
from tests.server.http_server import save_tiny_base
from tests.server.jobs.clock import Clock
from tests.server.jobs.examples import EXAMPLES, a_job
from tests.server.jobs.runs import ENDLESS, ROWS, Home, home, make_plan_of, supervised, wait_for

HOUR = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[JobStore]:
    opened = JobStore(tmp_path / "data", clock=clock, max_attempts=1)
    yield opened
    opened.close()


def _published_by(job_id: str, root: Path, tmp_path: Path) -> None:
    registry = Registry(root)
    folder = soft_prompt(tmp_path / "trained", seed=1)
    metadata = AdapterMetadata(job_id=job_id, metrics={"loss": 1.0})
    registry.publish("mine", folder, BASE, metadata)
    registry.close()


# --- server and worker both died -----------------------------------------------------------------


@pytest.mark.parametrize("cancelled", [True, False])
def test_what_is_served_has_succeeded(
    cancelled: bool, store: JobStore, clock: Clock, tmp_path: Path
) -> None:
    """Between publishing and the job's end both die; then somebody cancels, or nobody does."""
    record = store.create(a_job(), EXAMPLES)
    assert store.claim(10) is not None
    _published_by(record.id, tmp_path / "data", tmp_path)
    if cancelled:
        assert store.cancel(record.id).cancel_requested
    clock.advance(11)
    # With one attempt allowed it would be given up, and cancelled it would be so.
    assert store.claim(10) is None
    after = store.get(record.id)
    assert (after.state, after.adapter_version, after.metrics) == ("succeeded", 1, {"loss": 1.0})
    last = store.events(record.id)[-1]
    assert last.data == {"state": "succeeded", "adapter_version": 1}
    # Once the job is too old, its adapter still says where it came from.
    clock.advance(31 * 24 * HOUR)
    assert store.prune() == (record.id,)
    registry = Registry(tmp_path / "data")
    (version,) = registry.versions("mine")
    assert (version.job_id, version.metrics) == (record.id, {"loss": 1.0})
    registry.close()


def test_a_cancel_before_publishing_still_counts(store: JobStore, clock: Clock) -> None:
    record = store.create(a_job(), EXAMPLES)
    assert store.claim(10) is not None
    store.cancel(record.id)
    clock.advance(11)
    assert store.claim(10) is None
    assert store.get(record.id).state == "cancelled"


# --- the clock ------------------------------------------------------------------------------------


def test_a_lease_of_before_the_clock_went_back_ends_soon(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(tmp_path / "data", clock=clock)
    record = store.create(a_job(), EXAMPLES)
    first = store.claim(10)
    assert first is not None
    clock.advance(-HOUR)
    # Not at once: its worker may live, and renew it.
    assert store.claim(10) is None
    clock.advance(11)
    second = store.claim(10)
    assert second is not None
    assert (second.job_id, second.token) == (record.id, first.token + 1)
    assert [event.id for event in store.events(record.id)] == [1, 2, 3, 4]
    store.close()


def test_a_worker_that_lives_keeps_its_job_when_the_clock_goes_back(
    tmp_path: Path, clock: Clock
) -> None:
    store = JobStore(tmp_path / "data", clock=clock)
    store.create(a_job(), EXAMPLES)
    first = store.claim(10)
    assert first is not None
    clock.advance(-HOUR)
    for _ in range(5):
        assert store.claim(10) is None
        assert store.renew(first, 10) is False
        clock.advance(6)
    store.close()


# --- a cancel at the end of a run ------------------------------------------------------------------


@pytest.fixture
def hooked(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Home, Path]]:
    """A home whose workers have the hooks, and the folder that says which fault strikes."""
    faults = tmp_path / "faults"
    faults.mkdir()
    monkeypatch.setenv("FAULTS", str(faults))
    monkeypatch.setenv("PYTHONPATH", str(HOOKS))
    base = save_tiny_base(tmp_path / "base")
    # As nice as the others: on a busy machine it would hardly begin.
    with home(base, tmp_path / "data", nice=0) as made:
        yield made, faults


@pytest.mark.slow
def test_a_cancel_while_publishing_is_a_cancel_or_comes_too_late(
    hooked: tuple[Home, Path],
) -> None:
    made, faults = hooked
    waiting, waits = faults / "wait_in_staging", faults / "waits"
    late, early = made.add(adapter="late"), made.add(adapter="early")
    waiting.touch()
    with supervised(made) as supervisor:
        # Trained, past the last word on whether it may publish, and about to.
        wait_for(waits.exists)
        made.store.cancel(late.id)
        waiting.unlink()
        after = made.wait_for_state(late, "succeeded", 20)
        assert made.registry.resolve("late").version == after.adapter_version == 1
        waits.unlink()
        waiting.touch()
        wait_for(waits.exists)
        made.store.cancel(early.id)
        supervisor.wake()
        # It does not go on, so it is killed: nothing was published.
        made.wait_for_state(early, "cancelled", 10)
        waiting.unlink()
    assert made.registry.count() == 1
    made.registry.sweep()
    assert list((Path(made.config.data_dir) / "staging").iterdir()) == []


@pytest.mark.slow
def test_a_worker_killed_when_it_has_published_has_succeeded_though_cancelled(
    hooked: tuple[Home, Path],
) -> None:
    made, faults = hooked
    record = made.add()
    (faults / "wait_in_staging").touch()
    with supervised(made):
        wait_for((faults / "waits").exists)
        made.store.cancel(record.id)
        (faults / "kill_after_staging").touch()
        (faults / "wait_in_staging").unlink()
        after = made.wait_for_state(record, "succeeded", 20)
    assert after.adapter_version == 1
    assert made.store.get(record.id).cancel_requested
    assert "succeeded" not in made.log(record)  # its supervisor said it, not the worker


@pytest.mark.slow
def test_a_cancel_while_evaluating_publishes_nothing(hooked: tuple[Home, Path]) -> None:
    """After each ten steps come ninety of evaluation: there the cancel finds it."""
    made, _faults = hooked
    split = {"validation_split": 0.9, "early_stopping_patience": None}
    made_plan = make_plan_of(
        made.config, ROWS * 25, adapter="mine", steps=ENDLESS, hyperparameters=split
    )
    record = made.store.create(made_plan.job, made_plan.examples)
    with supervised(made) as supervisor:
        wait_for(lambda: "evaluation" in made.kinds(record))
        made.store.cancel(record.id)
        supervisor.wake()
        made.wait_for_state(record, "cancelled", 10)
    assert made.registry.count() == 0
    assert not (made.store.directory(record.id) / "state").exists()
