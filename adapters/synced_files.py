"""Durable file writes (fsync), with disk-full errors distinguished from other failures.

Independent of adapters: handles only bytes, directories and `OSError`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import StorageFull, StorageUnavailable

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def full_disk_is_storage_full(what: str) -> Iterator[None]:
    """Raise "no space left" and "quota exceeded" as StorageFull; other errors propagate."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(f"the disk is full: {what} could not be written") from error
        raise


@contextmanager
def disk_failure_is_storage_error(what: str) -> Iterator[None]:
    """Raise a full disk as StorageFull and any other OSError on our own files as StorageUnavailable."""
    try:
        with full_disk_is_storage_full(what):
            yield
    except OSError as error:
        # Leave out the path: the message may be sent to a client.
        raise StorageUnavailable(f"{what} could not be written: {error.strerror}") from error


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until its bytes are on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a new UTF-8 file line by line and wait until its bytes are on the disk."""
    with path.open("x", encoding="utf-8", newline="") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy to a new file and wait until its bytes are on the disk."""
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
