"""Writes a back-up of a data directory to standard output, as a tar, while a server works on it.

    docker compose -f docker/compose.yaml exec -T server python3 /opt/backup.py > backup.tar
    mkdir data && tar -x -f backup.tar -C data

What is stored lies in the database and in files that never change once they are there. A row comes
after its files and goes before them. So: the files, then the database as it is at one moment, then the
files that came in between. Left out is what is made anew: folds, staging, checkpoints of running
jobs, which begin again, and a hub's cache. API keys are in it as hashes.

Standard library only.
"""

from __future__ import annotations

import argparse
import io
import os
import sqlite3
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

DATABASE = "registry.db"
# Within the data directory; a job's `state` folder is its checkpoints.
FOLDERS = ("blobs", "files", "jobs")
LEFT_OUT = frozenset({"state"})
# The one file that grows after it appeared.
GROWING = "log.txt"


def main() -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="backup.py", description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", nargs="?", type=Path, help="default: $GRAFTWORK_DATA_DIR")
    data_dir = parser.parse_args().data_dir or Path(os.environ.get("GRAFTWORK_DATA_DIR", "/data"))
    if not (data_dir / DATABASE).is_file():
        sys.stderr.write(f"backup.py: {data_dir} is no data directory: it has no {DATABASE}\n")
        return 2
    if sys.stdout.isatty():
        sys.stderr.write("backup.py: standard output is a terminal; send it to a file\n")
        return 2
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
        count = back_up(data_dir, archive)
    sys.stderr.write(f"backup.py: {count} files and the database\n")
    return 0


def back_up(data_dir: Path, archive: tarfile.TarFile) -> int:
    """Add everything that a restore needs; the number of files beside the database."""
    added: set[Path] = set()
    _add_files(data_dir, archive, added)
    with tempfile.TemporaryDirectory(prefix="graftwork-") as work:
        snapshot = Path(work) / DATABASE
        _snapshot(data_dir / DATABASE, snapshot)
        # What came before the snapshot is there by now, and what the first round missed.
        _add_files(data_dir, archive, added)
        archive.add(snapshot, DATABASE)
    return len(added)


def _snapshot(database: Path, target: Path) -> None:
    source, copy = sqlite3.connect(database, timeout=30), sqlite3.connect(target)
    try:
        source.backup(copy)
        # A file by itself: nothing of it is in a log beside it.
        copy.execute("PRAGMA journal_mode = DELETE")
    finally:
        source.close()
        copy.close()


def _add_files(data_dir: Path, archive: tarfile.TarFile, added: set[Path]) -> None:
    for path in _files(data_dir):
        name = path.relative_to(data_dir)
        if name in added:
            continue
        try:
            _add(archive, path, str(name))
        except FileNotFoundError:  # deleted just now, and its row before it
            continue
        added.add(name)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    if path.name != GROWING:
        archive.add(path, name, recursive=False)
        return
    content = path.read_bytes()
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    archive.addfile(info, io.BytesIO(content))


def _files(data_dir: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        for directory, folders, names in os.walk(data_dir / folder):
            folders[:] = sorted(set(folders) - LEFT_OUT)
            yield from (Path(directory) / name for name in sorted(names))


if __name__ == "__main__":
    sys.exit(main())
