"""A server on a small disk of its own, which fills up, runs out of inodes and turns read-only.

The disk is mounted for the server alone; it is looked at and filled from here through /proc.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.store.registry import Registry
from tests.faults.storage_server import (
    BASE_NAME,
    Served,
    in_namespace_of,
    private_mounts,
    serving,
)
from tests.server.http_server import save_tiny_base

pytestmark = pytest.mark.slow

KIB = 1024
BLOCK = 4096


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("small-disk-base"))


@pytest.fixture(scope="module")
def boxed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose data directory has a disk of 4 MiB and 600 inodes, with one adapter on it."""
    home = tmp_path_factory.mktemp("small-disk")
    disk = home / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4m,nr_inodes=600 tmpfs '{disk}'"
    prefix = (*private_mounts(), "sh", "-c", f'{mount} && exec "$@"', "sh")
    data, log = disk / "data", home / "log"
    with serving(base, data, log, prefix=prefix, in_namespace=True) as served:
        assert served.add(home, "good", 1).status_code == 201
        yield served


@contextlib.contextmanager
def _filled(served: Served, free_bytes: int) -> Iterator[None]:
    """The disk with so much room left, until the end of the block."""
    filler = served.data_dir.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(BLOCK)):
                pass
        file.truncate(max(file.tell() - free_bytes, 0))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def _without_inodes(served: Served) -> Iterator[None]:
    """The disk with room for bytes, but for no file and no folder."""
    folder = served.data_dir.parent / "many"
    folder.mkdir()
    made = []
    with contextlib.suppress(OSError):
        for number in range(1000):
            (folder / str(number)).touch()
            made.append(folder / str(number))
    try:
        yield
    finally:
        for path in made:
            path.unlink()
        folder.rmdir()


def _whole(served: Served) -> bool:
    """Whether rows and bytes are the same adapters, and nothing else lies about."""
    return served.blobs() == served.digests() and served.staging() == []


def test_a_full_disk_refuses_what_does_not_fit_and_loses_nothing(
    boxed: Served, tmp_path: Path
) -> None:
    """How much is left decides what fails first: the upload, its copy, the blob or the database."""
    before = boxed.answer("good")
    outcomes: dict[int, set[str]] = {}
    for version, free_kib in enumerate(range(0, 96, 8), 1):
        seed = 100 + version
        with _filled(boxed, free_kib * KIB):
            reply = boxed.add(tmp_path, "many", seed)
            outcomes.setdefault(reply.status_code, set()).add(reply.json().get("code", ""))
            assert boxed.answer("good") == before
            assert _whole(boxed), free_kib
        if reply.status_code == 507:
            assert "disk is full" in reply.json()["error"]
            # It goes in once there is room; its version was not used up.
            reply = boxed.add(tmp_path, "many", seed)
        assert (reply.status_code, reply.json()["version"]) == (201, version)
    assert outcomes == {201: {""}, 507: {"storage_full"}}
    boxed.answer("many")


def test_words_that_do_not_fit_into_the_database_are_refused_too(
    boxed: Served, tmp_path: Path
) -> None:
    before, listed = boxed.answer("good"), boxed.listed()
    replies = []
    with _filled(boxed, 0):
        # Each writes some pages of the write-ahead log, which has no room to grow.
        for number in range(600):
            reply = boxed.client.put(f"/adapters/good/aliases/a{number}", json={"version": 1})
            replies.append(reply)
            if reply.status_code != 200:
                break
        assert boxed.answer("good") == before
    assert (replies[-1].status_code, replies[-1].json()["code"]) == (507, "storage_full")
    kept = boxed.client.get("/adapters/good").json()["aliases"]
    assert sorted(kept) == sorted(f"a{number}" for number in range(len(replies) - 1))
    assert boxed.listed().keys() == listed.keys()
    assert boxed.client.put("/adapters/good/aliases/later", json={"version": 1}).status_code == 200


def test_a_disk_without_inodes_is_full(boxed: Served, tmp_path: Path) -> None:
    before = boxed.answer("good")
    with _without_inodes(boxed):
        reply = boxed.add(tmp_path, "nameless", 300)
        assert (reply.status_code, reply.json()["code"]) == (507, "storage_full")
        assert boxed.answer("good") == before
    assert boxed.add(tmp_path, "nameless", 300).status_code == 201
    boxed.answer("nameless")


def test_a_directory_that_turns_read_only_refuses_writes_and_is_served(
    boxed: Served, tmp_path: Path
) -> None:
    before = boxed.answer("good")
    data = Path("/", *boxed.data_dir.parts[4:])  # without /proc/PID/root: as the server sees it
    in_namespace_of(boxed.process, "mount", "--bind", str(data), str(data))
    try:
        in_namespace_of(boxed.process, "mount", "-o", "remount,bind,ro", str(data))
        upload = boxed.add(tmp_path, "denied", 400)
        rows = [{"text": "a", "label": "b"}] * 4
        job: dict[str, Any] = {"adapter": "denied", "method": "ia3", "rows": rows}
        job |= {"template": "{text} Label :", "target": "label"}
        train = boxed.client.post("/train", json=job)
        file = boxed.client.post(
            "/v1/files",
            data={"purpose": "fine-tune"},
            files={"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n')},
        )
        assert boxed.answer("good") == before
        assert "denied" not in boxed.listed()
    finally:
        in_namespace_of(boxed.process, "umount", str(data))
    for reply in (upload, train):
        assert (reply.status_code, reply.json()["code"]) == (503, "storage_unavailable")
        assert "Read-only file system" in reply.json()["error"]
    assert (file.status_code, file.json()["error"]["code"]) == (503, "storage_unavailable")
    assert boxed.add(tmp_path, "denied", 400).status_code == 201
    boxed.answer("denied")
    assert boxed.staging() == []


def test_a_read_only_directory_is_refused_at_the_start_in_a_sentence(
    base: Path, tmp_path: Path
) -> None:
    """One that holds adapters, and one in which nothing can be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    data = tmp_path / "data"
    Registry(data).close()
    mount = f"mount -t tmpfs -o ro tmpfs '{disk}' && mount --bind '{data}' '{data}'"
    mount += f" && mount -o remount,bind,ro '{data}'"
    prefix = (*private_mounts(), "sh", "-c", f'{mount} && exec "$@"', "sh")
    for place in (data, disk / "data"):
        command = [*prefix, sys.executable, "-m", "server", "serve", "--base", str(base)]
        command += ["--data-dir", str(place), "--port", "0", "--base-name", BASE_NAME]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "500"},
        )
        assert done.returncode == 2, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("graftwork: ")
        assert str(place) in line
        assert "Traceback" not in done.stderr
