"""The supervisor: one worker a job, cancel in every state, an orderly stop, a lost lease."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from server.jobs.supervisor import Supervisor
from server.logs import configure
from server.store.jobs import JobStore
from tests.server.jobs.runs import ENDLESS, has_trained, home, supervised, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def at_home(tiny_base, tmp_path):
    with home(tiny_base, tmp_path / "data") as made:
        yield made


def test_two_supervisors_share_the_jobs(at_home):
    records = [at_home.add(adapter=f"a{number}") for number in range(4)]
    with supervised(at_home), supervised(at_home):
        for record in records:
            at_home.wait_for_state(record, "succeeded")
    for record in records:
        events = at_home.store.events(record.id)
        states = [event.data["state"] for event in events if event.kind == "state"]
        assert states == ["queued", "running", "succeeded"]
        assert at_home.kinds(record).count("started") == 1
        assert len(at_home.registry.versions(record.adapter)) == 1


def test_a_job_says_at_once_that_it_started_and_success_is_no_signal(at_home, capfd):
    """Before its worker has imported anything; a worker that is slow to exit is no failure."""
    configure("console", "info")
    record = at_home.add(steps=1)
    with supervised(at_home) as supervisor:
        wait_for(lambda: supervisor.pids, 5)
        running = at_home.store.events(record.id)[-1]
        assert running.data == {"state": "running", "attempt": 1, "nice": at_home.config.nice}
        assert f"started job={record.id} nice={at_home.config.nice}\n" in at_home.log(record)
        at_home.wait_for_state(record, "succeeded")
        wait_for(lambda: supervisor.pids == {})
    said = capfd.readouterr().err
    assert f"job_ended                      job={record.id} state=succeeded" in said
    assert "signal" not in said


def test_workers_is_how_many_run_at_once(at_home):
    records = [at_home.add(adapter=f"a{number}", steps=ENDLESS) for number in range(3)]
    with supervised(at_home, workers=2) as supervisor:
        wait_for(lambda: len(supervisor.pids) == 2)
        wait_for(lambda: has_trained(at_home, records[0]) and has_trained(at_home, records[1]))
        assert [at_home.state(record) for record in records] == ["running", "running", "queued"]


def test_a_worker_yields_to_the_server(at_home):
    record = at_home.add(steps=ENDLESS)
    with supervised(at_home) as supervisor:
        wait_for(lambda: has_trained(at_home, record))
        pid = supervisor.pids[record.id]
        assert os.getpriority(os.PRIO_PROCESS, pid) == at_home.config.nice > 0
        autogroup = Path(f"/proc/{pid}/autogroup")
        if autogroup.exists():
            # Niceness alone counts only among the processes of one session.
            assert autogroup.read_text().split()[-1] == str(at_home.config.nice)


def test_a_queued_job_is_cancelled_at_once(at_home):
    record = at_home.add()
    assert at_home.store.cancel(record.id).state == "cancelled"
    with supervised(at_home) as supervisor:
        time.sleep(1)
        assert supervisor.pids == {}


def _importing(made, record) -> bool:
    return made.store.running() != []


def _loading(made, record) -> bool:
    return "claimed" in made.log(record)


@pytest.mark.parametrize("when", [_importing, _loading, has_trained])
def test_cancel_takes_less_than_five_seconds(at_home, when):
    record = at_home.add(steps=ENDLESS)
    with supervised(at_home) as supervisor:
        wait_for(lambda: when(at_home, record))
        at_home.store.cancel(record.id)
        supervisor.wake()
        at_home.wait_for_state(record, "cancelled", 5)
        wait_for(lambda: supervisor.pids == {}, 1)
    assert at_home.registry.count() == 0
    assert not (at_home.store.directory(record.id) / "state").exists()


def test_a_worker_that_does_not_listen_is_killed(at_home):
    record = at_home.add(steps=ENDLESS)
    with supervised(at_home) as supervisor:
        wait_for(lambda: has_trained(at_home, record))
        os.kill(supervisor.pids[record.id], signal.SIGSTOP)
        at_home.store.cancel(record.id)
        at_home.wait_for_state(record, "cancelled", 5)


def test_a_stop_keeps_what_was_trained(at_home):
    record = at_home.add(adapter="stopped", steps=600)
    whole = at_home.add(adapter="whole", steps=600)
    with supervised(at_home):
        wait_for(lambda: has_trained(at_home, record))
    after = at_home.store.get(record.id)
    assert (after.state, after.attempts) == ("queued", 0)
    with supervised(at_home):
        at_home.wait_for_state(record, "succeeded")
        at_home.wait_for_state(whole, "succeeded")
    assert "resumed" in at_home.kinds(record)
    assert "resumed" not in at_home.kinds(whole)
    one, other = at_home.tensors("stopped"), at_home.tensors("whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_worker_whose_lease_is_lost_ends_and_publishes_nothing(at_home):
    record = at_home.add(steps=ENDLESS)
    later = JobStore(
        at_home.store.directory(record.id).parents[1], clock=lambda: time.time() + 3600
    )
    with supervised(at_home) as supervisor:
        wait_for(lambda: has_trained(at_home, record))
        pid = supervisor.pids[record.id]
        claim = later.claim(3600)
        assert claim is not None
        wait_for(lambda: pid not in supervisor.pids.values(), 10)
        assert later.renew(claim, 3600) is False
        assert at_home.state(record) == "running"
    later.close()
    assert at_home.registry.count() == 0


def test_without_workers_nothing_is_claimed(at_home):
    record = at_home.add()
    supervisor = Supervisor(at_home.store, at_home.registry, at_home.config, workers=0)
    supervisor.start()
    supervisor.wake()
    supervisor.stop()
    assert at_home.state(record) == "queued"


def test_the_command_runs_jobs_until_a_signal(at_home, tiny_base):
    first = at_home.add(adapter="first")
    command = [sys.executable, "-m", "server", "worker", "--base", str(tiny_base)]
    command += ["--data-dir", at_home.config.data_dir, "--dtype", "float32", "--base-name", "tiny"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        at_home.wait_for_state(first, "succeeded")
        second = at_home.add(adapter="second", steps=ENDLESS)
        wait_for(lambda: has_trained(at_home, second))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0
    assert at_home.state(second) == "queued"


def test_the_command_with_nothing_to_do_says_so(tmp_path):
    command = [sys.executable, "-m", "server", "worker", "--train-workers", "0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert "--train-workers is 0" in result.stderr
