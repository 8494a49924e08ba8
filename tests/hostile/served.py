"""`graftwork serve` as a process of its own, and what it holds: files, rows, memory, descriptors.

Reads /proc, so it knows Linux only.
"""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.server.http_server import save_prefix_adapter, upload

BASE_NAME = "tiny-base"
TEMPLATE = "Tweet text : {Tweet text} Label :"
LABELS = '["complaint", "no complaint"]'
MIB = 1 << 20


@dataclass(frozen=True)
class Held:
    """What a server holds at one moment.

    Attributes:
        files: every path below its data directory and its temporary directory.
        rows: rows of every table.
        processes: the server and its descendants: their ids, or what they are where a new one may
            take their place at any time.
        descriptors: what the server and its engine have open, the database apart: its pool opens a
            connection for every thread that asks at once, up to a limit.
    """

    files: frozenset[str]
    rows: tuple[tuple[str, int], ...]
    processes: frozenset[str]
    descriptors: Counter[str]

    def no_more_than(self, before: Held) -> bool:
        """Whether files and rows are the same, and nothing else is there that was not."""
        return (
            (self.files, self.rows) == (before.files, before.rows)
            and self.processes <= before.processes
            and self.descriptors <= before.descriptors
        )


@dataclass(frozen=True)
class Weight:
    """What one process takes: bytes of its own, shared files apart, and threads."""

    private_bytes: int
    threads: int


@dataclass(frozen=True)
class Served:
    """A server that answers.

    Attributes:
        process: the server.
        address: host and port.
        home: its folders: data, tmp, allowed (from which adapters may be loaded).
        log: its words.
    """

    process: subprocess.Popen[bytes]
    address: tuple[str, int]
    home: Path
    log: Path

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    def client(self) -> httpx.Client:
        """A client whose connections end with every reply."""
        headers = {"connection": "close"}
        # No certificates: they take longer to load than a case takes.
        return httpx.Client(base_url=self.url, timeout=60, headers=headers, verify=False)

    def held(self) -> Held:
        ids = _descendants(self.process.pid)
        processes = frozenset(_told(pid) for pid in ids)
        return Held(_paths(self.home), _rows(self.home), processes, _descriptors(ids))

    def settled(self, before: Held, seconds: float = 20) -> Held:
        """What the server holds once that is no more than before, or at the end of the time."""
        end = time.monotonic() + seconds
        while not (now := self.held()).no_more_than(before) and time.monotonic() < end:
            time.sleep(0.02)
        return now

    def weights(self) -> dict[str, Weight]:
        """What every process of the server takes, the checking of grammars as one."""
        found: dict[str, Weight] = {}
        for pid in _descendants(self.process.pid):
            name = "server" if pid == self.process.pid else _told(pid)
            before = found.get(name, Weight(0, 0))
            taken = Weight(_private_bytes(pid), len(list(Path(f"/proc/{pid}/task").iterdir())))
            found[name] = Weight(
                before.private_bytes + taken.private_bytes, before.threads + taken.threads
            )
        return found


@contextmanager
def serving(base: Path, home: Path) -> Iterator[Served]:
    """A server with the adapters `complaints` and `other`, until the end of the block."""
    for name in ("data", "tmp", "allowed"):
        (home / name).mkdir(parents=True)
    (home / "allowed" / "way-out").symlink_to("/etc")
    log = home / "log"
    command = [sys.executable, "-m", "server", "serve", "--base", str(base), "--port", "0"]
    command += ["--data-dir", str(home / "data"), "--base-name", BASE_NAME]
    command += ["--load-dirs", str(home / "allowed"), "--dtype", "float32", "--threads", "1"]
    command += ["--kv-mib", "16", "--max-running", "8", "--train-workers", "0"]
    with log.open("wb") as words:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=words,
            env=os.environ | {"TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )
    try:
        served = Served(process, _address(process, log), home, log)
        with served.client() as client:
            _until(lambda: client.get("/readyz").status_code == 200, 120)
            for seed, name in enumerate(("complaints", "other")):
                folder = save_prefix_adapter(home / "made" / name, seed=seed)
                reply = upload(client, folder, name, template=TEMPLATE, labels=LABELS)
                assert reply.status_code == 201, reply.text
        yield served
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    def found() -> re.Match[str] | None:
        assert process.poll() is None, log.read_text()
        return re.search(r"http://([0-9.]+):(\d+)", log.read_text())

    _until(found, 60)
    match = found()
    assert match is not None
    return match[1], int(match[2])


def _until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {seconds} s")
        time.sleep(0.05)


def _paths(home: Path) -> frozenset[str]:
    return frozenset(
        str(path.relative_to(home)) for part in ("data", "tmp") for path in (home / part).rglob("*")
    )


def _rows(home: Path) -> tuple[tuple[str, int], ...]:
    with closing(sqlite3.connect(f"file:{home / 'data' / 'registry.db'}?mode=ro", uri=True)) as db:
        tables = [
            name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        return tuple(
            (name, db.execute(f"SELECT count(*) FROM '{name}'").fetchone()[0])
            for name in sorted(tables)
        )


def _descendants(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        tasks = Path(f"/proc/{one}/task")
        try:
            children = [(task / "children").read_text() for task in tasks.iterdir()]
        except FileNotFoundError:
            continue
        found.append(one)
        waiting += [int(child) for text in children for child in text.split()]
    return found


def _told(pid: int) -> str:
    # Checks grammars, and may be lost over one.
    checks = b"grammar_check" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return "grammar_check" if checks else str(pid)


def _descriptors(processes: list[int]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for pid in processes:
        folder = Path(f"/proc/{pid}/fd")
        try:
            links = [os.readlink(path) for path in folder.iterdir()]
        except FileNotFoundError:
            continue
        counted.update(link.partition(":")[0] for link in links if "registry.db" not in link)
    return counted


def _private_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kib) for kib in re.findall(r"^Private_\w+: +(\d+)", text, re.MULTILINE))
