"""A worker: what it tells of its steps and its failures, what it publishes, how it ends."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from adapters import errors as library
from adapters.training.loop import TrainingEvent
from server.api import error_replies as api
from server.base.load import load_base
from server.config.settings import Settings
from server.jobs import failures, publishing
from server.jobs.config import EXIT_ORPHANED, WorkerConfig
from server.jobs.task import EventWriter
from server.jobs.worker_process import MAX_LOG_BYTES, WorkerProcess, describe_exit
from tests.server.jobs.runs import ENDLESS, has_trained, home, supervised, wait_for


@pytest.fixture
def at_home(tiny_base, tmp_path):
    with home(tiny_base, tmp_path / "data") as made:
        yield made


# --- events and failures: no process --------------------------------------------------------


def _step(number: int) -> TrainingEvent:
    return TrainingEvent("step", {"step": number})


def test_steps_are_thinned_and_the_last_one_is_told():
    told: list[tuple[str, dict]] = []
    writer = EventWriter(lambda kind, data: told.append((kind, data)), seconds=60)
    for number in (1, 2, 3):
        writer(_step(number))
    writer(TrainingEvent("evaluation", {"step": 3}))
    writer(_step(4))
    writer.flush()
    writer.flush()
    assert [(kind, data["step"]) for kind, data in told] == [
        ("step", 1),
        ("step", 3),
        ("evaluation", 3),
        ("step", 4),
    ]


def test_without_a_pause_every_step_is_told():
    told: list[int] = []
    writer = EventWriter(lambda _kind, data: told.append(data["step"]), seconds=0)
    for number in (1, 2, 3):
        writer(_step(number))
    assert told == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (library.TrainingDiverged("the loss is nan"), "training_diverged"),
        (library.DataInvalid("row 3", row=3), "data_invalid"),
        (library.HeaderInvalid("no header"), "checkpoint_invalid"),
        (library.StorageFull("full"), "disk_full"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (RuntimeError("shapes differ"), "internal_error"),
        (library.DataInvalid("row 1: 'out of memory'", row=1), "data_invalid"),
    ],
)
def test_a_failure_has_a_code(error, code):
    assert failures.describe(error)["code"] == code


def test_a_refusal_that_wraps_a_lack_of_memory_is_one():
    error = library.BaseUnsupported("the weights do not load")
    error.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    assert failures.describe(error)["code"] == "out_of_memory"


def test_what_nobody_foresaw_keeps_its_words_for_the_log():
    assert "secret" not in failures.describe(ValueError("secret"))["message"]


@pytest.mark.parametrize("kind", failures.CODES)
def test_codes_are_those_of_the_api(kind):
    assert failures.CODES[kind] == api.TABLE[kind].code


def test_the_settings_resolve_what_a_worker_needs(tmp_path):
    config = Settings(data_dir=tmp_path, dtype="float32", train_memory_mib=3).worker_config("b")
    assert (config.dtype, config.base_name, config.memory_bytes) == ("float32", "b", 3 << 20)
    assert 1 <= config.threads <= max(1, (os.cpu_count() or 1) // 2)
    assert Settings(dtype="float32", train_dtype="bfloat16").worker_config("b").dtype == "bfloat16"
    assert WorkerConfig.from_json(config.to_json()) == config


def test_an_exit_is_told_in_words():
    assert describe_exit(-9) == "signal SIGKILL"
    assert "parent" in describe_exit(EXIT_ORPHANED)
    assert describe_exit(1) == "exit status 1"


# --- one process --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_ends_in_an_adapter_with_its_story(at_home):
    record = at_home.add(description="two words")
    with supervised(at_home):
        after = at_home.wait_for_state(record, "succeeded")
    adapter = at_home.registry.resolve("mine")
    assert (adapter.job_id, adapter.version) == (record.id, after.adapter_version)
    assert adapter.recipe == record.job.model_dump(mode="json") | {"default_temperature": 0.0}
    assert adapter.metrics == after.metrics
    assert adapter.template == record.job.template
    assert adapter.labels == ("complaint", "no complaint")
    assert adapter.base_digest == record.job.base_digest
    assert adapter.description == "two words"
    assert adapter.warnings == ()
    assert after.progress["step"] == 12
    kinds = at_home.kinds(record)
    assert kinds[:3] == ["state", "state", "started"]
    assert kinds[-1] == "state"
    assert not (at_home.store.directory(record.id) / "state").exists()
    assert "succeeded" in at_home.log(record)


@pytest.mark.slow
def test_another_base_fails_the_job(at_home):
    record = at_home.add(job={"base_digest": "0" * 64})
    with supervised(at_home):
        after = at_home.wait_for_state(record, "failed")
    assert after.error is not None
    assert after.error["code"] == "base_mismatch"
    assert at_home.registry.count() == 0
    assert "Traceback" in at_home.log(record)
    assert "Traceback" not in after.error["message"]


@pytest.mark.slow
def test_a_supervisor_leaves_jobs_for_another_base_in_the_queue(at_home):
    theirs = at_home.add(job={"base_digest": "0" * 64})
    mine = at_home.add(adapter="later")
    with supervised(at_home, base_digest=mine.job.base_digest):
        at_home.wait_for_state(mine, "succeeded")
    assert at_home.state(theirs) == "queued"
    assert at_home.store.get(theirs.id).attempts == 0


class _Copied:
    """What a worker had trained when it died: the files of a finished adapter."""

    def __init__(self, directory: Path, metrics: dict) -> None:
        self._directory = directory
        self.metrics = metrics

    def write(self, directory: Path) -> None:
        shutil.copytree(self._directory, directory, dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("if_exists", ["new_version", "error"])
def test_a_worker_that_died_after_publishing_publishes_nothing_twice(at_home, if_exists):
    done = at_home.add(adapter="first")
    with supervised(at_home):
        at_home.wait_for_state(done, "succeeded")
    folder = at_home.registry.blob_path(at_home.registry.resolve("first").digest)
    record = at_home.add(if_exists=if_exists)
    claim = at_home.store.claim(0.0)  # a lease that is over already
    assert claim is not None
    spec = load_base(at_home.config.base, dtype="float32").spec
    before = publishing.publish(
        at_home.registry, at_home.config, record, spec, _Copied(folder, {"loss": 1.0})
    )
    with supervised(at_home):
        after = at_home.wait_for_state(record, "succeeded")
    assert len(at_home.registry.versions("mine")) == 1
    assert (after.adapter_version, after.metrics) == (before.version, {"loss": 1.0})
    assert "started" not in at_home.kinds(record)


@pytest.mark.slow
def test_a_worker_ends_with_its_parent(at_home):
    record = at_home.add(steps=ENDLESS)
    claim = at_home.store.claim(60)
    assert claim is not None
    log = at_home.store.directory(record.id) / "log.txt"
    process = WorkerProcess(at_home.config, record.id, claim.token, log)
    wait_for(lambda: has_trained(at_home, record))
    # The end of the pipe is all that a worker sees of a parent that was killed.
    process._process.stdin.close()
    wait_for(lambda: process.poll() is not None, 5)
    assert process.poll() == EXIT_ORPHANED
    assert at_home.state(record) == "running"


@pytest.mark.slow
def test_a_log_does_not_grow_for_ever(at_home):
    record = at_home.add(job={"base_digest": "0" * 64})
    log = at_home.store.directory(record.id) / "log.txt"
    log.write_bytes(b"x" * (MAX_LOG_BYTES - 10))
    with supervised(at_home):
        at_home.wait_for_state(record, "failed")
    assert log.stat().st_size < MAX_LOG_BYTES + 100
    assert log.read_text().endswith("the rest is dropped]\n")
