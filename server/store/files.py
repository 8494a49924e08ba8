"""Files that clients uploaded to train on, in the data directory.

    <root>/files/<id>   the uploaded bytes

The row is the commit point: the bytes are complete and synced under their id before the row exists, and
are removed after it. A crash between the two leaves a file without a row, which `sweep` removes. The
client's filename is stored in the row only and never part of a path. A caller with a key
(`server.store.caller`) sees only the files of its owner. Independent of HTTP and of the content.
"""

from __future__ import annotations

import builtins
import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import ColumnElement, delete, func, select, true
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from adapters import synced_files
from adapters.errors import AdapterError
from server.errors import FilesFull, UploadNotFound
from server.store.caller import PerCaller
from server.store.database import Database
from server.store.job_limits import half
from server.store.tables import FileRow

MAX_FILES = 1_000
MAX_FILES_BYTES = 2**30
MAX_FILENAME_CHARACTERS = 255

_ID = re.compile(r"file-[0-9a-f]{24}")


@dataclass(frozen=True)
class FileRecord:
    """One uploaded file.

    Attributes:
        id: "file-" and 24 hex digits.
        filename: the client's filename.
        purpose: its purpose, in OpenAI's terms.
        num_bytes: its size.
        created_at: aware UTC time.
    """

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: datetime


class FileStore(PerCaller):
    """All uploaded files of one data directory. Safe between threads and processes.

    Args:
        root: the data directory, created if it does not exist.
        max_files: maximum number of files.
        max_bytes: maximum total bytes.
        max_files_per_owner: maximum number of one owner's; None is half of all.
        max_bytes_per_owner: maximum bytes of one owner's; None is half of all.
        clock: Unix time.

    Raises:
        RegistryError: the database cannot be used.
        StorageFull: the database could not be created.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_files: int = MAX_FILES,
        max_bytes: int = MAX_FILES_BYTES,
        max_files_per_owner: int | None = None,
        max_bytes_per_owner: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._all = _Room(max_files, max_bytes)
        self._own = _Room(
            half(max_files, max_files_per_owner), half(max_bytes, max_bytes_per_owner)
        )
        self._clock = clock
        self._files = root / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        self._database = Database(root / "registry.db")

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

    # --- in ---------------------------------------------------------------------------

    def add(self, staged: Path, filename: str, purpose: str) -> FileRecord:
        """Store a file.

        Args:
            staged: its bytes, on the data directory's disk; moved from there.
            filename: the client's filename; its last 255 characters are stored.
            purpose: its purpose.

        Raises:
            FilesFull: the file or byte limit, for all or for the caller's own, would be exceeded;
                nothing was stored.
            StorageFull: the disk is full; nothing was stored.
        """
        num_bytes = staged.stat().st_size
        file_id = f"file-{secrets.token_hex(12)}"
        with synced_files.full_disk_is_storage_full("the uploaded file"):
            synced_files.sync(staged)
            try:
                with self._database.write() as session:
                    self._check_room(session, num_bytes)
                    row = FileRow(
                        id=file_id,
                        filename=filename[-MAX_FILENAME_CHARACTERS:],
                        purpose=purpose,
                        num_bytes=num_bytes,
                        created_at=datetime.fromtimestamp(self._clock(), UTC),
                        owner=self._caller.owner,
                    )
                    session.add(row)
                    session.flush()
                    staged.rename(self._files / file_id)
                    synced_files.sync(self._files)
                    return _record(row)
            except BaseException:
                # If this fails too, the next sweep finds it.
                with contextlib.suppress(AdapterError, OSError, DatabaseError):
                    self._remove_orphans([file_id])
                raise

    # --- out --------------------------------------------------------------------------

    def get(self, file_id: str) -> FileRecord:
        """The record of a file.

        Raises:
            UploadNotFound: no such file.
        """
        with self._database.read() as session:
            return _record(self._row(session, file_id))

    def path(self, file_id: str) -> Path:
        """The path of a file's bytes, which never change and are removed when it is deleted.

        Raises:
            UploadNotFound: no such file.
        """
        self.get(file_id)
        return self._files / file_id

    def list(
        self,
        after: str | None = None,
        limit: int = 100,
        *,
        purpose: str | None = None,
        newest_first: bool = True,
    ) -> builtins.list[FileRecord]:
        """Files after the one with the id `after`, in upload order.

        Raises:
            UploadNotFound: there is no file `after`.
        """
        number = FileRow.number
        order = number.desc() if newest_first else number
        statement = select(FileRow).where(self._seen()).order_by(order)
        if purpose is not None:
            statement = statement.where(FileRow.purpose == purpose)
        with self._database.read() as session:
            if after is not None:
                last = self._row(session, after).number
                statement = statement.where(number < last if newest_first else number > last)
            return [_record(row) for row in session.scalars(statement.limit(limit))]

    # --- change -----------------------------------------------------------------------

    def delete(self, file_id: str) -> None:
        """Remove a file; jobs created from it have their own copy of the rows.

        Raises:
            UploadNotFound: no such file.
        """
        with self._database.write() as session:
            session.execute(
                delete(FileRow).where(FileRow.number == self._row(session, file_id).number)
            )
        (self._files / file_id).unlink(missing_ok=True)

    def sweep(self) -> tuple[str, ...]:
        """Remove files that a crash left without a row. Returns the removed names."""
        # Folders are not created by this store and are left in place.
        found = (
            path.name for path in self._files.iterdir() if path.is_symlink() or not path.is_dir()
        )
        return self._remove_orphans(sorted(found))

    # --- inside -----------------------------------------------------------------------

    def _seen(self) -> ColumnElement[bool]:
        """Filter for the files visible to the caller."""
        only = self._caller.only_owner
        return true() if only is None else FileRow.owner == only

    def _row(self, session: Session, file_id: str) -> FileRow:
        row = None
        if _ID.fullmatch(file_id):
            row = session.scalars(
                select(FileRow).where(FileRow.id == file_id, self._seen())
            ).first()
        if row is None:
            raise no_upload(file_id)
        return row

    def _remove_orphans(self, names: Iterable[str]) -> tuple[str, ...]:
        # Under the write lock: a file and its row appear within one transaction.
        with self._database.write() as session:
            known = set(session.scalars(select(FileRow.id)))
            orphans = tuple(name for name in names if name not in known)
            for name in orphans:
                (self._files / name).unlink(missing_ok=True)
        return orphans

    def _check_room(self, session: Session, num_bytes: int) -> None:
        counts = select(func.count(), func.coalesce(func.sum(FileRow.num_bytes), 0))
        stored, owner = counts.select_from(FileRow), self._caller.owner
        if owner is not None:
            count, taken = session.execute(stored.where(FileRow.owner == owner)).one()
            _check_room(self._own, count, taken, num_bytes, "your", "a caller's files")
        count, taken = session.execute(stored).one()
        try:
            _check_room(self._all, count, taken, num_bytes, "the", "all")
        except FilesFull:
            if self._caller.only_owner is None:
                raise
            # How many files others have is theirs to know.
            raise FilesFull(
                "the server has no room for this file at present; delete some of yours, or try again later",
                field="file",
            ) from None


@dataclass(frozen=True)
class _Room:
    max_files: int
    max_bytes: int


def _check_room(room: _Room, count: int, taken: int, num_bytes: int, whose: str, of: str) -> None:
    if count >= room.max_files:
        raise FilesFull(
            f"{count} files are stored, and the limit for {of} is {room.max_files}; delete some first",
            field="file",
            expected=f"fewer than {room.max_files} files",
            came=str(count),
        )
    if taken + num_bytes > room.max_bytes:
        raise FilesFull(
            f"{whose} stored files have {taken} bytes, this one has {num_bytes}, and the limit for {of} is "
            f"{room.max_bytes}; delete some first",
            field="file",
            expected=f"at most {room.max_bytes} bytes in all",
            came=str(taken + num_bytes),
        )


def no_upload(file_id: str) -> UploadNotFound:
    """The error for an id that no file has."""
    shown = ascii(file_id)[1:-1][:80]
    return UploadNotFound(f"there is no file {shown!r}", field="file_id", came=shown)


def _record(row: FileRow) -> FileRecord:
    return FileRecord(row.id, row.filename, row.purpose, row.num_bytes, row.created_at)
