"""A server that is killed while an upload arrives and another lies between its rename and its row.

One server dies of both at once, with a write-ahead log that nobody closed and things in its data
directory that nobody of ours put there; a second one starts on what is left. What it finds, serves
and sweeps is told by the tests below, and that it stands without descriptors and with its clock set
back.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.storage_server import Served, serving, wait_for
from tests.server.http_server import save_tiny_base

pytestmark = pytest.mark.slow

HOUR = 3600
ROWS = [
    {"text": f"{word} {number}", "label": label}
    for number in range(4)
    for word, label in (("lovely", "good"), ("broken", "bad"))
]


@dataclass(frozen=True)
class Left:
    """What the dead server left, and the one that found it."""

    server: Served
    before: dict[str, Any]
    left: dict[str, list[str]]
    children: list[int]
    orphan: str
    faults: Path
    outside: Path


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    home = tmp_path_factory.mktemp("crashed")
    base = save_tiny_base(home / "base")
    faults = home / "faults"
    faults.mkdir()
    data = home / "data"
    with serving(base, data, home / "first.log", faults=faults) as first:
        digests = {
            name: first.add(home, name, seed).json()["digest"]
            for seed, name in ((1, "good"), (2, "moved"))
        }
        before = {name: first.answer(name) for name in digests}
        with _half_an_upload(first):
            wait_for(lambda: _staged_bytes(data) > 100_000)
            (faults / "kill_after_rename").touch()
            children = _children(first.process.pid)
            with pytest.raises(httpx.TransportError):
                first.add(home, "between", 3)
            assert first.process.wait(20) == -signal.SIGKILL
        (faults / "kill_after_rename").unlink()
        orphan = next(iter(first.blobs() - set(digests.values())))
        outside = _plant(data, home, digests["moved"])
        left = {name: os.listdir(data / name) for name in ("blobs", "staging", "files")}
        left["wal"] = [str((data / "registry.db-wal").stat().st_size)]
    with serving(base, data, home / "second.log", faults=faults) as second:
        yield Left(second, before, left, children, orphan, faults, outside)


def _half_an_upload(served: Served) -> socket.socket:
    """A connection over which the first half of an upload came."""
    address = served.client.base_url
    connection = socket.create_connection((address.host, address.port))
    head = (
        f"POST /adapters HTTP/1.1\r\nHost: {address.host}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 10000000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="files"; '
        'filename="adapter_model.safetensors"\r\n\r\n'
    )
    connection.sendall(head.encode() + bytes(300_000))
    return connection


def _staged_bytes(data: Path) -> int:
    return sum(path.stat().st_size for path in (data / "staging").glob("*/*"))


def _children(pid: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(stat.parent.name))
        except OSError:
            continue
    return children


def _plant(data: Path, home: Path, moved: str) -> Path:
    """Things that no code of ours puts into a data directory; the folder that a link leads to."""
    outside = home / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    blobs = data / "blobs"
    (blobs / ("a" * 64)).symlink_to(outside)
    (blobs / ("b" * 64)).symlink_to(home / "nowhere")
    (blobs / ("c" * 64)).write_text("a file under a digest's name")
    (blobs / "notes.txt").write_text("somebody's notes")
    # Somebody moved a blob to another disk and left a link.
    (blobs / moved).rename(home / "moved")
    (blobs / moved).symlink_to(home / "moved")
    (data / "staging" / "link").symlink_to(outside)
    os.mkfifo(data / "staging" / "fifo")
    (data / "staging" / "foreign").write_text("x")
    (data / "files" / "folder").mkdir()
    # What the engine's cache keeps of adapters that were deleted, or was writing.
    (data / "folds").mkdir(exist_ok=True)
    for name in (f"{'d' * 64}-b-float32.safetensors", f"{moved}-b-float32.7.tmp", "notes.txt"):
        (data / "folds" / name).touch()
    return outside


# --- what a start finds and sweeps ----------------------------------------------------------


def test_the_dead_server_did_leave_something(crashed: Left) -> None:
    assert crashed.orphan in crashed.left["blobs"]
    # The upload that was arriving, the one that was being published, and what was planted.
    assert len(crashed.left["staging"]) > 4
    assert int(crashed.left["wal"][0]) > 0


def test_its_processes_are_gone(crashed: Left) -> None:
    assert crashed.children
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in crashed.children), 30)


def test_nothing_is_lost_and_no_orphan_stays(crashed: Left) -> None:
    served = crashed.server
    listed = served.listed()
    assert {"good", "moved"} <= set(listed)
    assert "between" not in listed
    assert served.staging() == []
    assert served.answer("good") == crashed.before["good"]
    # What is not named like a digest is not ours to remove.
    assert served.blobs() - {"notes.txt"} == served.digests()
    assert (served.data_dir / "blobs" / "notes.txt").exists()
    assert (served.data_dir / "files" / "folder").exists()
    assert (crashed.outside / "kept").read_text() == "kept"
    assert os.listdir(served.data_dir / "folds") == ["notes.txt"]


def test_a_link_in_the_place_of_a_blob_is_damage_and_can_be_put_right(
    crashed: Left, tmp_path: Path
) -> None:
    served = crashed.server
    assert served.listed()["moved"]["status"] == "corrupt"
    assert served.client.post("/generate?adapter=moved", json={"inputs": "x"}).status_code == 424
    again = served.add(tmp_path, "moved", 2)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    assert served.answer("moved") == crashed.before["moved"]
    assert not (served.data_dir / "blobs" / again.json()["digest"]).is_symlink()


def test_what_died_between_rename_and_row_can_be_sent_again(crashed: Left, tmp_path: Path) -> None:
    served = crashed.server
    reply = served.add(tmp_path, "between", 3)
    assert (reply.status_code, reply.json()["version"]) == (201, 1)
    assert reply.json()["digest"] == crashed.orphan
    served.answer("between")


# --- no descriptor left ---------------------------------------------------------------------


def test_without_descriptors_uploads_fail_and_serving_goes_on(
    crashed: Left, tmp_path: Path
) -> None:
    served = crashed.server
    pid = served.process.pid
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    served.answer("good")  # over a connection that stays
    used = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, usual[1]))
    try:
        refused = [served.add(tmp_path, "starved", seed) for seed in (40, 41, 42)]
        answers = [served.answer("good") for _ in range(3)]
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    for reply in refused:
        assert (reply.status_code, reply.json()["code"]) == (503, "storage_unavailable")
        assert "Too many open files" in reply.json()["error"]
        assert reply.headers["retry-after"]
    assert answers == [crashed.before["good"]] * 3
    assert served.staging() == []
    assert served.add(tmp_path, "starved", 43).status_code == 201
    served.answer("starved")
    assert served.blobs() - {"notes.txt"} == served.digests()
    assert len(os.listdir(f"/proc/{pid}/fd")) <= used + 8


# --- the clock is set back ------------------------------------------------------------------


def test_a_clock_set_back_an_hour_loses_nothing(crashed: Left, tmp_path: Path) -> None:
    served, client = crashed.server, crashed.server.client
    first = served.add(tmp_path, "timed", 50).json()
    # The clock goes back while a job runs, under a lease of the time before.
    running = _train(client, "running", 3_000)
    wait_for(lambda: client.get(f"/train/{running}").json()["state"] == "running")
    clock = crashed.faults / "clock"
    clock.write_text(str(-HOUR))
    try:
        second = served.add(tmp_path, "timed", 51).json()
        assert second["created_at"] < first["created_at"]
        assert (second["version"], served.listed()["timed"]["version"]) == (2, 2)
        back = client.post("/adapters/timed/rollback", json={"version": 1})
        assert back.json()["version"] == 1
        assert served.answer("good") == crashed.before["good"]
        assert client.post(f"/train/{running}/cancel").status_code == 202
        wait_for(lambda: client.get(f"/train/{running}").json()["state"] == "cancelled", 30)
        after = _train(client, "after", 2)
        wait_for(lambda: client.get(f"/train/{after}").json()["state"] == "succeeded")
        served.answer("after")
        jobs = [job["id"] for job in client.get("/train").json()["jobs"]]
        assert jobs == [after, running]
        events = client.get(f"/train/{running}/events").text
        ids = [int(line[3:]) for line in events.splitlines() if line.startswith("id:")]
        assert ids == list(range(1, len(ids) + 1))
    finally:
        clock.unlink()
    assert served.add(tmp_path, "timed", 52).json()["version"] == 3


def _train(client: httpx.Client, adapter: str, steps: int) -> str:
    job = {
        "adapter": adapter,
        "method": "prompt_tuning",
        "rows": ROWS,
        "template": "{text} Label :",
        "target": "label",
        "config": {"num_virtual_tokens": 4},
        "hyperparameters": {"max_steps": steps, "batch_size": 4},
    }
    reply = client.post("/train", json=job)
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def test_time_goes_on(crashed: Left) -> None:
    """The hook's clock is off again: what comes later is not a test of the hour before."""
    shown = crashed.server.add(crashed.outside.parent, "now", 60).json()["created_at"]
    assert shown[:4] == time.strftime("%Y", time.gmtime())
