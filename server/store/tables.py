"""The tables of a data directory's database.

Rows only: invariants are maintained by `server.store.registry`, `server.store.jobs`,
`server.store.files` and `server.store.keys`. A change here needs a new file in
`server/store/migrations/versions`.

meta        one row: the schema's version, for code from before migrations
adapters    a name; its last version number (never used again) and the version it is pinned to
blobs       a digest: what is stored under blobs/<digest>, and whether it still matches
versions    (name, version) -> digest, with its metadata
aliases     (name, alias) -> version
jobs        a training job, its state, and the claim on it
job_events  (job, event) -> what happened, in order
files       an uploaded file with training data
keys        an API key: its permissions, and the digest of its text
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    Text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time; SQLite itself stores no time zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Aware time in, naive UTC stored."""
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Naive UTC stored, aware UTC out."""
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """The metadata of all tables."""


class MetaRow(Base):
    """The schema's version; `key` is always "schema".

    Alembic's own table records migrations. This row has been 2 since migrations were introduced, so that
    older code, which reads only this row, refuses the file.
    """

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(String, primary_key=True)
    value: Mapped[int] = mapped_column(Integer)


class AdapterRow(Base):
    """A name that was ever used.

    `last_version` survives deletion, so that NAME@VERSION never refers to different bytes.
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
    recipe: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    job_id: Mapped[str | None] = mapped_column(String)
    metrics: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    tokenization: Mapped[str] = mapped_column(String, server_default="boundary")
    source: Mapped[str] = mapped_column(String, server_default="uploaded")
    source_path: Mapped[str | None] = mapped_column(Text)


class AliasRow(Base):
    """An alias of one version of an adapter; removed with that version."""

    __tablename__ = "aliases"
    __table_args__ = (
        ForeignKeyConstraint(
            ["name", "version"], ["versions.name", "versions.version"], ondelete="CASCADE"
        ),
    )

    name: Mapped[str] = mapped_column(String, primary_key=True)
    alias: Mapped[str] = mapped_column(String, primary_key=True, index=True)
    version: Mapped[int] = mapped_column(Integer)


class JobRow(Base):
    """One training job.

    Attributes:
        number: increases with every job; the order of creation.
        job: a `TrainingJob` as JSON.
        progress: data of the newest step.
        attempts: claims that were not released, counted from the last checkpoint's.
        num_lost: workers that died by themselves since the last checkpoint.
        num_interrupted: times since the last checkpoint that who ran it ended, or let its lease expire.
        token: fencing token, increases with every claim; only the holder of the newest may write.
        lease_until: Unix time at which the lease ends; 0 once its worker is known to be gone; NULL if
            unclaimed.
        holder: who runs it, its folder in holders/; NULL if unknown.
        last_event: id of its newest event.
        skipped_steps: steps since the last one that became an event.
        tuning: request fields of `/v1/fine_tuning/jobs` beside the job; NULL for other jobs.
        owner: the tenant or the key that created it; NULL without authentication.
        num_bytes: size of its files; with its log once it has ended.
    """

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_state_number", "state", "number"),)

    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    id: Mapped[str] = mapped_column(String, unique=True)
    state: Mapped[str] = mapped_column(String)
    job: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    progress: Mapped[dict[str, Any]] = mapped_column(JSON)
    metrics: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    adapter_version: Mapped[int | None] = mapped_column(Integer)
    cancel_requested: Mapped[bool]
    attempts: Mapped[int] = mapped_column(Integer)
    token: Mapped[int] = mapped_column(Integer)
    lease_until: Mapped[float | None] = mapped_column(Float)
    last_event: Mapped[int] = mapped_column(Integer)
    skipped_steps: Mapped[int] = mapped_column(Integer)
    tuning: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    owner: Mapped[str | None] = mapped_column(String)
    holder: Mapped[str | None] = mapped_column(String)
    num_lost: Mapped[int] = mapped_column(Integer, server_default="0")
    num_interrupted: Mapped[int] = mapped_column(Integer, server_default="0")
    num_bytes: Mapped[int] = mapped_column(Integer, server_default="0")


class JobEventRow(Base):
    """One event of a job; `id` counts from 1 within it, without gaps."""

    __tablename__ = "job_events"

    job: Mapped[int] = mapped_column(
        ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True
    )
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    kind: Mapped[str] = mapped_column(String)
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class FileRow(Base):
    """One uploaded file; its bytes lie under files/<id>.

    Attributes:
        number: increases with every file; the order of upload.
        filename: the client's filename; never part of a path.
        purpose: its purpose, in OpenAI's terms.
        num_bytes: its size.
        owner: the tenant or the key that uploaded it; NULL without authentication.
    """

    __tablename__ = "files"

    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    id: Mapped[str] = mapped_column(String, unique=True)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String)
    num_bytes: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    owner: Mapped[str | None] = mapped_column(String)


class KeyRow(Base):
    """One API key, without its text; see `server.store.key`.

    Attributes:
        digest: SHA-256 of its text, in hex.
        adapters: names it may use, and name prefixes ending in `*`; NULL is all.
        revoked_at: NULL unless revoked.
    """

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(String, unique=True)
    scopes: Mapped[list[Any]] = mapped_column(JSON)
    adapters: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    tenant: Mapped[str | None] = mapped_column(String)
    rate: Mapped[str | None] = mapped_column(String)
    tokens: Mapped[str | None] = mapped_column(String)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
