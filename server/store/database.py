"""Opens, migrates, reads and writes a data directory's database.

SQLite, configured for durability, with two kinds of transaction: `read`, and `write`, which holds the
write lock from its start. Several processes may open one file concurrently; the first migrates it, the
others wait. Independent of the meaning of the tables.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, event, inspect
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from adapters.errors import RegistryError, StorageFull, StorageUnavailable
from server.store.schema import HEAD, unknown_schema
from server.store.tables import Base, MetaRow

_BUSY_SECONDS = 30
_WRITE = "graftwork_write"
_META_SCHEMA = 2

_OF_THE_DISK = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)

# Alembic stores the running migration in module globals.
_one_migration = threading.Lock()


class Database:
    """One SQLite file with the tables of `server.store.tables`. Safe between threads and processes.

    Args:
        path: created if it does not exist; its folder must exist.

    Raises:
        RegistryError: not a database, or one of an unknown version.
        StorageFull: it could not be created or migrated; an older database is unchanged.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        self._observer: sqlite3.Connection | None = None
        self._engine = _engine(path)
        # A transaction of this view takes the write lock when it begins, so that what it read stays
        # true until it commits, in this process and in others.
        self._writer = self._engine.execution_options(**{_WRITE: True})
        try:
            with self._engine.connect() as connection:
                ready = _revision(connection) == HEAD
            if not ready:
                _bring_up_to_date(path)
        except DatabaseError as error:
            self.close()
            if is_full(error):
                raise StorageFull(f"the disk is full: {path} could not be written") from error
            raise RegistryError(f"{path} cannot be used: {error.orig}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    def version(self) -> int | None:
        """A number that changes with every commit, of this process or another.

        Takes a few microseconds and never waits. Use from one thread.

        Returns:
            None if it cannot be read at this moment.
        """
        # SQLite reports the commits of *other* connections: this one never writes.
        try:
            if self._observer is None:
                self._observer = sqlite3.connect(
                    self._path, timeout=0, isolation_level=None, check_same_thread=False
                )
            return int(self._observer.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            return None

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One transaction that sees the database as it was when it first read.

        Raises:
            StorageUnavailable: the database cannot be read at present.
        """
        with _failure_is_told("read"), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction that holds the write lock from its start (BEGIN IMMEDIATE).

        Raises:
            StorageFull: the disk is full; the transaction was rolled back.
            StorageUnavailable: the database cannot be written at present; likewise rolled back.
        """
        # The lock spares threads SQLite's polling; between processes the polling decides.
        with (
            _failure_is_told("written"),
            self._lock,
            Session(self._writer) as session,
            session.begin(),
        ):
            yield session


def is_full(error: DatabaseError) -> bool:
    """Whether SQLite failed because the disk is full."""
    return _code(error) == sqlite3.SQLITE_FULL


def _code(error: DatabaseError) -> int:
    return int(getattr(error.orig, "sqlite_errorcode", 0)) & 0xFF


@contextmanager
def _failure_is_told(done: str) -> Iterator[None]:
    """Map SQLite's disk errors to StorageFull and StorageUnavailable; statement errors propagate."""
    try:
        yield
    except DatabaseError as error:
        if is_full(error):
            raise StorageFull(f"the disk is full: the database could not be {done}") from error
        if _code(error) in _OF_THE_DISK:
            raise StorageUnavailable(f"the database cannot be {done}: {error.orig}") from error
        raise


def _engine(path: Path, *, migrating: bool = False) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        # The driver's own transactions are off: it would begin them too late.
        connect_args={"timeout": _BUSY_SECONDS, "isolation_level": None},
        **({"poolclass": NullPool} if migrating else {}),
    )
    event.listen(engine, "connect", _prepare)
    if not migrating:
        event.listen(engine, "connect", _enforce_keys)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: sqlite3.Connection, _record: object) -> None:
    for pragma in ("journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}").close()


def _enforce_keys(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA foreign_keys = ON").close()


def _begin(connection: Connection) -> None:
    immediate = connection.get_execution_options().get(_WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


# --- the schema ---------------------------------------------------------------------------


def _bring_up_to_date(path: Path) -> None:
    """Create the tables of a new database, or migrate an old one, in one transaction."""
    # Foreign keys are not enforced here: a migration that has to copy a table drops the old one,
    # which would empty every table that points at it. They are checked before the commit.
    engine = _engine(path, migrating=True)
    with engine.execution_options(**{_WRITE: True}).begin() as connection:
        came = _revision(connection)
        if came == HEAD:  # another process was first
            return
        if came is None:
            Base.metadata.create_all(connection)
            with Session(connection) as session:
                session.add(MetaRow(key="schema", value=_META_SCHEMA))
                session.flush()
            connection.exec_driver_sql(
                "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, "
                "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
            )
            connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (HEAD,))
            return
        with _one_migration:
            from server.store.migrations import upgrade

            upgrade(connection, came)
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            raise RegistryError(f"{path} cannot be migrated: table {broken[0]} lacks a parent row")


def _revision(connection: Connection) -> str | None:
    """The migration revision of a database; None for an empty one.

    Raises:
        RegistryError: it has tables but no revision.
    """
    tables = set(inspect(connection).get_table_names())
    if not tables:
        return None
    if "alembic_version" in tables:
        return str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar())
    came = None
    if MetaRow.__tablename__ in tables:
        came = connection.exec_driver_sql("SELECT value FROM meta WHERE key = 'schema'").scalar()
    if came != 1:
        raise unknown_schema(came)
    return "0001"
