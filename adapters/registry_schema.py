"""The registry's tables and how its database is opened.

Rows only: what they mean together is `adapters.registry`'s to keep.

meta      one row: the schema's version
adapters  a name; its last version number (never used again) and the version it is pinned to
blobs     a digest: what is stored under blobs/<digest>, and whether it still matches
versions  (name, version) -> digest, with what was said about it
aliases   (name, alias) -> version
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    String,
    Text,
    create_engine,
    event,
    inspect,
)
from sqlalchemy.engine import URL, Connection, Dialect, Engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from adapters.errors import RegistryError

SCHEMA_VERSION = 1

_BUSY_SECONDS = 30
_WRITE = "graftwork_write"


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time; SQLite itself keeps no zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Aware time in, naive UTC stored."""
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Naive UTC stored, aware UTC out."""
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """The registry's metadata."""


class MetaRow(Base):
    """The schema's version; `key` is always "schema"."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(String, primary_key=True)
    value: Mapped[int] = mapped_column(Integer)


class AdapterRow(Base):
    """A name that was ever used.

    `last_version` outlives deletion, so that NAME@VERSION never means other bytes than before.
    """

    __tablename__ = "adapters"

    name: Mapped[str] = mapped_column(String, primary_key=True)
    last_version: Mapped[int] = mapped_column(Integer, default=0)
    pinned_version: Mapped[int | None] = mapped_column(Integer, default=None)


class BlobRow(Base):
    """A stored checkpoint; `status` is "ok" or "corrupt"."""

    __tablename__ = "blobs"

    digest: Mapped[str] = mapped_column(String, primary_key=True)
    peft_type: Mapped[str] = mapped_column(String)
    num_virtual_tokens: Mapped[int] = mapped_column(Integer)
    uses_scales: Mapped[bool]
    num_bytes: Mapped[int] = mapped_column(Integer)
    status: Mapped[str] = mapped_column(String, default="ok")


class VersionRow(Base):
    """One published version."""

    __tablename__ = "versions"

    name: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("blobs.digest"), index=True)
    description: Mapped[str | None] = mapped_column(Text)
    template: Mapped[str | None] = mapped_column(Text)
    labels: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    target_separator: Mapped[str] = mapped_column(Text)
    append_eos: Mapped[bool | None]
    base_digest: Mapped[str | None] = mapped_column(String)
    base_name: Mapped[str | None] = mapped_column(Text)
    warnings: Mapped[list[Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class AliasRow(Base):
    """A second name for one version of an adapter; leaves with that version."""

    __tablename__ = "aliases"
    __table_args__ = (
        ForeignKeyConstraint(
            ["name", "version"], ["versions.name", "versions.version"], ondelete="CASCADE"
        ),
    )

    name: Mapped[str] = mapped_column(String, primary_key=True)
    alias: Mapped[str] = mapped_column(String, primary_key=True, index=True)
    version: Mapped[int] = mapped_column(Integer)


def open_database(path: Path) -> tuple[Engine, Engine]:
    """Two views of one SQLite file and one pool: for reading, and for writing.

    A transaction of the second takes the write lock when it begins, so that what it read stays
    true until it commits, in this process and in others.
    """
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        # The driver's own transactions are off: it would begin them too late.
        connect_args={"timeout": _BUSY_SECONDS, "isolation_level": None},
    )
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine, engine.execution_options(**{_WRITE: True})


def _prepare(connection: sqlite3.Connection, _record: object) -> None:
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    immediate = connection.get_execution_options().get(_WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def create_or_check_schema(session: Session) -> None:
    """Make the tables of a new database, or hold an old one's version against this code's.

    Raises:
        RegistryError: another version.
    """
    connection = session.connection()
    if not inspect(connection).has_table(MetaRow.__tablename__):
        Base.metadata.create_all(connection)
        session.add(MetaRow(key="schema", value=SCHEMA_VERSION))
        return
    row = session.get(MetaRow, "schema")
    came = None if row is None else row.value
    if came != SCHEMA_VERSION:
        raise RegistryError(
            f"the registry's database has schema {came}, this version reads {SCHEMA_VERSION}",
            field="schema",
            expected=str(SCHEMA_VERSION),
            came=str(came),
        )


def is_full(error: DatabaseError) -> bool:
    """Whether SQLite failed because the disk took no more."""
    code = getattr(error.orig, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_FULL
