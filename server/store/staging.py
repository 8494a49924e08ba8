"""Temporary folders, each locked while its owner lives.

    <root>/staging/<random>/
    <root>/holders/<random>/    one for each process that runs training jobs; always empty
    <root>/serving/<random>/    one for each server, with a file that names its base

Content that must appear atomically is built here, then renamed into place on the same disk. Independent
of the content.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters import synced_files


class StagingArea:
    """The staging folders under one root. Safe between threads and processes.

    Args:
        root: the data directory.
        name: of the folder in it that holds them.

    Attributes:
        path: the folder that holds them.
    """

    def __init__(self, root: Path, name: str = "staging") -> None:
        self.path = root / name
        self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder, locked against `sweep`, and removed on exit if it still exists.

        Raises:
            StorageFull: the disk is full.
            StorageUnavailable: the folder cannot be created.
        """
        with synced_files.disk_failure_is_storage_error("a folder in staging"):
            directory, lock = self._make()
        try:
            yield directory
        finally:
            # First: the following calls need a file descriptor, and this may be the last one.
            os.close(lock)
            _remove(directory)

    def sweep(self) -> int:
        """Remove folders of dead owners. Returns the number of entries removed."""
        removed = 0
        for entry in self.path.iterdir():
            if not entry.is_dir() or entry.is_symlink():
                entry.unlink(missing_ok=True)
                removed += 1
            elif _lock_and_remove(entry):
                removed += 1
        return removed

    def is_abandoned(self, name: str) -> bool:
        """Whether the owner of a folder is dead, or has removed it."""
        try:
            lock = os.open(self.path / name, os.O_RDONLY)
        except FileNotFoundError:
            return True
        except OSError:  # cannot be known at present
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True

    def _make(self) -> tuple[Path, int]:
        while True:
            directory = self.path / uuid.uuid4().hex
            directory.mkdir()
            try:
                lock = os.open(directory, os.O_RDONLY)
            except FileNotFoundError:  # removed by a concurrent sweep
                continue
            except OSError:
                directory.rmdir()
                raise
            if _shared(lock) and directory.exists():
                return directory, lock
            os.close(lock)  # a concurrent sweep owns that folder now


def _remove(directory: Path) -> None:
    """Remove a folder; the next sweep retries what cannot be removed now."""
    try:
        directory.rmdir()  # needs no file descriptor
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)


def _shared(lock: int) -> bool:
    """Take the shared lock unless a sweep holds it exclusively. Returns whether it was taken."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_and_remove(directory: Path) -> bool:
    try:
        lock = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except BlockingIOError:  # the owner is alive
        return False
    finally:
        os.close(lock)
    return True
