"""Every failure named in the issue of training, with real worker processes and a real server.

A killed worker, a killed server, a loss that is no number, a full disk, too little memory: the job
resumes or fails with the reason, nothing is published by halves, and generation goes on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import torch

from tests.acceptance.real_base import BASE_DIR, needs_base
from tests.server.conftest import make_settings
from tests.server.http_server import running_server
from tests.server.jobs.runs import (
    BASE_NAME,
    ENDLESS,
    Home,
    has_checkpoint,
    has_trained,
    home,
    supervised,
    wait_for,
)

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
# Its checkpoint takes 12 MiB and more: weights and AdamW's two moments of a million numbers.
LARGE = {
    "method": "p_tuning",
    "config": {
        "num_virtual_tokens": 4,
        "encoder_hidden_size": 1024,
        "encoder_reparameterization_type": "MLP",
    },
}
BODY = {"inputs": "lovely 1 Label :", "parameters": {"max_new_tokens": 2}}


@pytest.fixture
def at_home(tiny_base, tmp_path):
    with home(tiny_base, tmp_path / "data") as made:
        yield made


# --- processes that are killed ------------------------------------------------------------------


def test_a_killed_worker_resumes_and_ends_bit_identical(at_home):
    record = at_home.add(adapter="killed", steps=800)
    whole = at_home.add(adapter="whole", steps=800)
    with supervised(at_home) as supervisor:
        wait_for(lambda: has_checkpoint(at_home, record))
        os.kill(supervisor.pids[record.id], signal.SIGKILL)
        at_home.wait_for_state(record, "succeeded")
        at_home.wait_for_state(whole, "succeeded")
    kinds = at_home.kinds(record)
    assert kinds.index("worker_lost") < kinds.index("resumed")
    assert "worker_lost" not in at_home.kinds(whole)
    one, other = at_home.tensors("killed"), at_home.tensors("whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_worker_that_dies_again_and_again_is_given_up(at_home):
    record = at_home.add(steps=ENDLESS)
    lost = 0
    with supervised(at_home) as supervisor:
        while at_home.state(record) in ("queued", "running"):
            # As soon as it is there: it never gets as far as a checkpoint.
            pid = supervisor.pids.get(record.id)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                lost += 1
                wait_for(lambda pid=pid: supervisor.pids.get(record.id) != pid)
        after = at_home.wait_for_state(record, "failed")
    assert lost == 3
    assert after.error is not None
    assert after.error["code"] == "worker_lost"
    assert at_home.registry.count() == 0


@contextmanager
def _serving(made: Home) -> Iterator[tuple[subprocess.Popen, str]]:
    """`graftwork serve` as a process of its own, ready, with its address; killed after the block."""
    command = [sys.executable, "-m", "server", "serve", "--base", made.config.base, "--port", "0"]
    command += ["--data-dir", made.config.data_dir, "--dtype", "float32", "--threads", "1"]
    command += ["--base-name", BASE_NAME, "--kv-mib", "16"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            said = ""
            while (address := re.search(r" on (http\S+),", said)) is None:
                line = process.stderr.readline()
                assert line, f"the server ended: {said}"
                said += line
            yield process, address.group(1)
        finally:
            process.kill()


def test_a_killed_server_finds_its_jobs_again(at_home):
    """Interrupted at the next start, claimed before what waits, and three kills cost no attempt."""
    record, waits = at_home.add(steps=2_000), at_home.add(adapter="waits", steps=1)
    with _serving(at_home) as (process, _address):
        wait_for(lambda: has_trained(at_home, record))
        process.send_signal(signal.SIGKILL)
        process.wait()
    worker = int(re.search(r"pid=(\d+)", at_home.log(record)).group(1))
    wait_for(lambda: not _runs(worker), 5)
    assert at_home.state(record) == "running"
    for _ in range(2):  # as a server that is killed before its job's first checkpoint
        with at_home.store.held() as holder:
            assert at_home.store.claim(60, holder=holder).job_id == record.id
    at_home.store.sweep()
    assert at_home.store.get(record.id).interrupted
    with _serving(at_home) as (_process, address):
        at_home.wait_for_state(record, "succeeded")
        later = at_home.wait_for_state(waits, "succeeded")
        assert later.started_at > at_home.store.get(record.id).finished_at
        states = [one.data for one in at_home.store.events(record.id) if one.kind == "state"]
        assert [one["state"] for one in states].count("running") == 4
        assert sum("nice" in one for one in states) == 2
        assert at_home.kinds(record).count("interrupted") == 3
        assert httpx.post(f"{address}/generate?adapter=mine", json=BODY).status_code == 200


# --- jobs that fail, while a server answers ----------------------------------------------------


@contextmanager
def _server(made: Home, **settings) -> Iterator[httpx.Client]:
    changes = {"base_name": BASE_NAME, "train_threads": 1, **settings}
    with running_server(
        make_settings(Path(made.config.base), Path(made.config.data_dir), **changes)
    ) as client:
        yield client


def _answers_until(client: httpx.Client, made: Home, record, state: str) -> dict:
    """Ask for generations until a job has ended so; every one is answered. The job's error."""
    num_answers = 0
    while made.state(record) in ("queued", "running"):
        assert client.post("/generate", json=BODY).status_code == 200
        num_answers += 1
    after = made.store.get(record.id)
    assert after.state == state, (after.error, made.log(record))
    assert num_answers > 1
    assert client.post("/generate", json=BODY).status_code == 200
    return after.error or {}


def test_generation_goes_on_beside_jobs_that_succeed_and_fail(at_home):
    with _server(at_home) as client:
        good = at_home.add()
        _answers_until(client, at_home, good, "succeeded")
        # At once, without a restart.
        reply = client.post("/generate?adapter=mine", json=BODY)
        assert reply.status_code == 200
        assert reply.headers["x-adapter-version"] == "1"
        # The encoder's products overflow at the second step.
        options = {"learning_rate": 1e20, "max_grad_norm": 0.0, "warmup_ratio": 0.0}
        diverging = at_home.add(**LARGE, adapter="diverged", steps=1000, hyperparameters=options)
        error = _answers_until(client, at_home, diverging, "failed")
        assert error["code"] == "training_diverged"
        assert client.post("/generate?adapter=diverged", json=BODY).status_code == 404
        assert at_home.registry.count() == 1


def test_too_little_memory_fails_the_job(at_home):
    # The encoder's largest matrix alone takes 1 GiB.
    config = {**LARGE["config"], "encoder_hidden_size": 16_000}
    with _server(at_home, train_memory_mib=700) as client:
        record = at_home.add(**{**LARGE, "config": config})
        error = _answers_until(client, at_home, record, "failed")
        assert error["code"] == "out_of_memory"
        assert at_home.registry.count() == 0
        # What fits trains under the same limit.
        small = at_home.add()
        _answers_until(client, at_home, small, "succeeded")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MiB; needs a Linux where the test may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_checkpoint_that_does_not_fit_fails_the_job(tiny_base, small_disk):
    with home(tiny_base, small_disk / "data", checkpoint_seconds=0.0) as made, supervised(made):
        record = made.add(steps=ENDLESS, **LARGE)
        after = made.wait_for_state(record, "failed")
        assert after.error["code"] == "disk_full"
        assert made.registry.count() == 0
        assert not (made.store.directory(record.id) / "state").exists()
        # The disk has room again for what fits.
        made.wait_for_state(made.add(adapter="small", steps=3), "succeeded")


def test_a_disk_that_takes_nothing_fails_the_job_once_it_takes_a_word(tiny_base, small_disk):
    ballast = small_disk / "ballast"
    with home(tiny_base, small_disk / "data") as made, _server(made) as client:
        record = made.add(steps=ENDLESS)
        wait_for(lambda: has_trained(made, record))
        _fill(ballast)
        # No word of it fits into the database: the worker can only tell its parent.
        supervisor = client.app_services().supervisor
        pid = supervisor.pids[record.id]
        wait_for(lambda: not _runs(pid), 30)
        assert client.post("/generate", json=BODY).status_code == 200
        ballast.unlink()
        error = _answers_until(client, made, record, "failed")
        assert error["code"] == "disk_full"
        assert made.registry.count() == 0


def _fill(path: Path) -> None:
    """Write a file until the disk takes no more byte."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def _runs(pid: int) -> bool:
    """Whether a process is there and not only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- memory -----------------------------------------------------------------------------------

_MEASURE = """
    import re, sys
    from pathlib import Path
    from server.base.load import load_base

    def anonymous_bytes():
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return 1024 * int(re.search(r"^Anonymous: +([0-9]+)", rollup, re.M).group(1))

    before = anonymous_bytes()
    base = load_base(sys.argv[1], dtype=sys.argv[2])
    weights = [parameter for parameter in base.model.parameters()]
    for weight in weights:
        weight.max().item()  # every page is read
    num_bytes = sum(weight.nbytes for weight in weights)
    print(anonymous_bytes() - before, num_bytes)
"""


@needs_base
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_holds_no_copy_of_a_base_in_its_own_format():
    """What `_MEASURE` counts is what a worker does before its first step."""

    def measured(dtype: str) -> tuple[int, int]:
        command = [sys.executable, "-c", textwrap.dedent(_MEASURE), str(BASE_DIR), dtype]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        grown, weights = done.stdout.split()
        return int(grown), int(weights)

    stored, weights = measured("bfloat16")
    print(f"anonymous memory grew by {stored / MIB:.0f} MiB, the weights are {weights / MIB:.0f}")
    assert stored < weights / 3
    # The measure does see a copy where there is one.
    converted, weights = measured("float32")
    assert converted > weights
