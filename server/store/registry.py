"""Names and versions of adapters, on a content-addressed store.

    name -> versions -> digest -> blobs/<digest>

The database row is the commit point: bytes are synced and renamed to their digest first, then one
transaction records them. A crash between the two leaves an orphan that `sweep` removes. A row without
bytes occurs only after damage to the disk, and marks that adapter as "corrupt".

Guarantees:

- A version number is never used again, not even after its adapter was deleted: NAME@VERSION means
  the same bytes for ever, or an error.
- A bare NAME is its newest version, or the one it was rolled back to. Publishing a new version
  ends a rollback.
- Publishing the newest version's bytes again, with the same metadata, changes nothing.
  The same bytes with another template, labels or description are a new version of one digest.
- Deleting removes rows, never files: a request that resolved the adapter before may still load
  it. Files are removed by `sweep` (at start) or `collect_garbage` (any time, given what is in use).
- Aliases belong to one adapter (NAME@ALIAS). A bare alias works while only one adapter has it;
  an alias and an adapter never share a name.
- A caller may be restricted to some names (`seen_by`). All other names behave as nonexistent in every
  operation, and cannot be created.

Threads and processes may share one root: every write holds SQLite's write lock from before it touches
`blobs/` until its commit. Independent of HTTP, the meaning of tensors, and the engine.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NoReturn

from sqlalchemy import ColumnElement, Select, delete, func, or_, select, true
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from adapters import synced_files
from adapters.base_model import BaseModelSpec
from adapters.checkpoint.archive import zip_blocks
from adapters.checkpoint.folder import CheckedCheckpoint, check_checkpoint, shorten
from adapters.checkpoint.limits import DEFAULT_LIMITS, CheckpointLimits
from adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    NameInvalid,
    VersionNotFound,
)
from adapters.metadata import METADATA_FIELDS, AdapterMetadata, Source
from server.store.blobs import BlobStore
from server.store.caller import UNRESTRICTED, Caller
from server.store.database import Database
from server.store.tables import AdapterRow, AliasRow, BlobRow, VersionRow

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_NAME_RULE = "[a-z0-9][a-z0-9._-]{0,62} without '..'"
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

Status = Literal["ok", "corrupt"]
_NO_METADATA = AdapterMetadata()


@dataclass(frozen=True, kw_only=True)
class AdapterRecord(AdapterMetadata):
    """One version of one adapter: its metadata, and what the registry knows of it.

    Attributes:
        name: the adapter.
        version: from 1.
        digest: content digest (hex), the name of its blob and the key of every cache.
        peft_type: PEFT's name of the method, such as "IA3".
        num_virtual_tokens: positions taken before the prompt.
        uses_scales: True for IA3.
        num_bytes: both files together.
        warnings: sentences for the uploader.
        base_name: `base_model_name_or_path` of its config.
        created_at: aware UTC time.
        status: "corrupt" if the stored bytes no longer match the digest.
        aliases: aliases of this version, sorted.
        is_default: whether a bare NAME resolves to this version.
    """

    name: str
    version: int
    digest: str
    peft_type: str
    num_virtual_tokens: int
    uses_scales: bool
    num_bytes: int
    warnings: tuple[str, ...]
    base_name: str | None
    created_at: datetime
    status: Status
    aliases: tuple[str, ...]
    is_default: bool


@dataclass(frozen=True)
class Published:
    """Result of `publish`; `created` is False if that version existed already."""

    record: AdapterRecord
    created: bool


@dataclass(frozen=True)
class SweepReport:
    """Result of a sweep: removed digests, corrupt digests, number of staging entries removed."""

    removed: tuple[str, ...]
    corrupt: tuple[str, ...]
    staging_removed: int


class Registry:
    """All adapters under one root.

    Args:
        root: created if it does not exist.
        reserved: names that adapters cannot have (the base's id).
        limits: limits on new checkpoints; not applied to stored ones.

    Raises:
        RegistryError: the file is not a database, or has a newer schema.
        StorageFull: the database could not be created or migrated.
    """

    def __init__(
        self,
        root: Path,
        *,
        reserved: Collection[str] = (),
        limits: CheckpointLimits = DEFAULT_LIMITS,
    ) -> None:
        self._limits = limits
        self._caller = UNRESTRICTED
        self._reserved = frozenset(name.casefold() for name in reserved)
        # Lowering a limit must not invalidate stored adapters.
        self._blobs = BlobStore(root, DEFAULT_LIMITS)
        self._database = Database(root / "registry.db")

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

    def data_version(self) -> int | None:
        """See `Database.version`."""
        return self._database.version()

    def seen_by(self, caller: Caller) -> Registry:
        """This registry as a caller sees it; both share the database."""
        view = copy.copy(self)
        view._caller = caller
        return view

    # --- in ---------------------------------------------------------------------------

    def staging_dir(self) -> AbstractContextManager[Path]:
        """A new temporary folder on the store's disk, removed on exit."""
        return self._blobs.staging.folder()

    def publish(
        self,
        name: str,
        directory: Path,
        base: BaseModelSpec,
        metadata: AdapterMetadata = _NO_METADATA,
        *,
        warnings: Sequence[str] = (),
        create_only: bool = False,
        base_names: Collection[str] = (),
    ) -> Published:
        """Check a checkpoint folder against the base and publish it under a name.

        Args:
            name: see the module docstring for names and versions.
            directory: exactly the two files. Consumed if it is a `staging_dir`, else copied.
            base: the base it must fit.
            metadata: what to store with it.
            warnings: warnings to prepend to those of the checks.
            create_only: refuse a name that is in use.
            base_names: names of `base`; a config that names another base gets a warning.

        Raises:
            CheckpointError: the checkpoint or its metadata is refused.
            BaseMismatch: the metadata names another base.
            NameInvalid: not a valid name, reserved, or an alias of another adapter.
            AdapterNotFound: the name is not visible to the caller.
            AdapterExists: `create_only`, and the name is in use.
            StorageFull, StorageUnavailable: nothing was stored.
        """
        self._check_name(name)
        self._require_visible(name)
        metadata.require_base(base)
        metadata = metadata.checked()
        with (
            synced_files.full_disk_is_storage_full("the adapter"),
            self._blobs.taken_in(directory) as staged,
        ):
            checked = check_checkpoint(staged, base, self._limits)
            all_warnings = [
                *warnings,
                *checked.warnings,
                *_base_warnings(checked, base_names),
            ]
            placed = False
            try:
                with self._database.write() as session:
                    _check_free(session, name, create_only)
                    with synced_files.disk_failure_is_told("the adapter"):
                        placed = self._blobs.place(staged, checked.digest)
                    version, created = _insert(session, name, checked, metadata, all_warnings)
                    # Read before the commit: afterwards it may be deleted at any moment.
                    record = _one(session, name, version)
            except BaseException:
                if placed:
                    # If this fails too, the next sweep finds the orphan.
                    with suppress(AdapterError, OSError, DatabaseError):
                        self._collect([checked.digest])
                raise
        return Published(record, created)

    def require_free(self, name: str, *, create_only: bool = False) -> None:
        """Check a name as `publish` would, before there is anything to publish.

        Raises:
            NameInvalid, AdapterExists, AdapterNotFound: as `publish`.
        """
        self._check_name(name)
        self._require_visible(name)
        with self._database.read() as session:
            _check_free(session, name, create_only)

    # --- out --------------------------------------------------------------------------

    def resolve(self, reference: str) -> AdapterRecord:
        """Resolve NAME, NAME@VERSION, NAME@ALIAS or a bare alias to a servable version.

        Raises:
            AdapterNotFound: no adapter, and no alias that only one adapter has.
            VersionNotFound: the adapter has no such version or alias.
            AdapterCorrupt: its stored bytes are damaged.
        """
        record = self.lookup(reference)
        if record.status != "ok":
            raise AdapterCorrupt(
                f"the stored bytes of {record.name}@{record.version} are damaged; upload it again",
                field="adapter",
                expected=record.digest,
            )
        return record

    def lookup(self, reference: str) -> AdapterRecord:
        """As `resolve`, but also returns corrupt adapters."""
        with self._database.read() as session:
            return _one(session, *_locate(session, reference, self._caller.adapters))

    def list(self, offset: int = 0, limit: int = 100) -> tuple[AdapterRecord, ...]:
        """The default version of every adapter, by name."""
        with self._database.read() as session:
            default = _default_versions().subquery()
            statement = (
                _versions()
                .join(
                    default,
                    (default.c.name == VersionRow.name) & (default.c.version == VersionRow.version),
                )
                .where(_among(self._caller.adapters))
                .order_by(VersionRow.name)
                .offset(offset)
                .limit(limit)
            )
            return _records(session, statement)

    def count(self) -> int:
        """Number of adapters that have a version."""
        with self._database.read() as session:
            names = select(func.count(VersionRow.name.distinct()))
            return session.scalar(names.where(_among(self._caller.adapters))) or 0

    def gone(self, names: Collection[str]) -> frozenset[str]:
        """The subset of names that have no version."""
        with self._database.read() as session:
            there = set(session.scalars(select(VersionRow.name).distinct()))
        return frozenset(names) - there

    def versions(self, name: str) -> tuple[AdapterRecord, ...]:
        """Every version of an adapter, oldest first.

        Raises:
            AdapterNotFound: it has none.
        """
        self._require_visible(name)
        with self._database.read() as session:
            statement = _versions().where(VersionRow.name == name).order_by(VersionRow.version)
            return _records(session, statement) or _no_adapter(name)

    def from_source(self, source: Source) -> tuple[AdapterRecord, ...]:
        """Every version from one source, by name, oldest first."""
        with self._database.read() as session:
            statement = _versions().where(
                VersionRow.source == source, _among(self._caller.adapters)
            )
            return _records(session, statement.order_by(VersionRow.name, VersionRow.version))

    def blob_path(self, digest: str) -> Path:
        """The folder of a digest, which may not exist."""
        return self._blobs.path(digest)

    def download_zip(self, name: str, version: int | None = None) -> Iterator[bytes]:
        """The PEFT folder of a version (default: the version of NAME) as the blocks of a zip.

        The zip of a digest is byte-identical every time. Names are resolved before the first block is
        requested.

        Raises:
            AdapterNotFound, VersionNotFound, AdapterCorrupt: as `resolve`.
        """
        record = self.resolve(name if version is None else f"{name}@{version}")
        return zip_blocks(self._blobs.path(record.digest))

    # --- change -----------------------------------------------------------------------

    def delete(self, name: str, version: int | None = None) -> tuple[str, ...]:
        """Remove a version, or all of them, with its aliases. Files stay, see the module docstring.

        A rollback to the deleted version ends.

        Returns:
            Digests that no version uses any longer; the engine may unload them.

        Raises:
            AdapterNotFound, VersionNotFound: nothing was removed.
        """
        self._require_visible(name)
        with self._database.write() as session:
            mine = [VersionRow.name == name]
            if version is not None:
                _require_version(session, name, version)
                mine.append(VersionRow.version == version)
            digests = set(session.scalars(select(VersionRow.digest).where(*mine)))
            if not digests:
                _no_adapter(name)
            session.execute(delete(VersionRow).where(*mine))
            adapter = session.get_one(AdapterRow, name)
            if version is None or adapter.pinned_version == version:
                adapter.pinned_version = None
            return tuple(sorted(digests - _used(session, digests)))

    def set_alias(self, name: str, alias: str, version: int) -> AdapterRecord:
        """Point NAME@ALIAS at a version; an existing alias is moved.

        Raises:
            NameInvalid: not an alias name, a number, reserved, or an adapter's own name.
            AdapterNotFound, VersionNotFound: nothing to point at.
        """
        self._check_name(alias, "alias")
        # Aliases too: a conflict would reveal which adapters exist.
        self._require_visible(name, alias)
        with self._database.write() as session:
            if alias.isdigit() or _newest(session, alias):
                raise NameInvalid(
                    f"{alias!r} cannot be an alias: it is a number or an adapter's name",
                    field="alias",
                    expected="a name that is neither a number nor an adapter",
                    came=alias,
                )
            _require_version(session, name, version)
            session.merge(AliasRow(name=name, alias=alias, version=version))
            return _one(session, name, version)

    def rollback(self, name: str, version: int) -> AdapterRecord:
        """Make a bare NAME resolve to this version until a new one is published.

        Raises:
            AdapterNotFound, VersionNotFound: nothing to roll back to.
        """
        self._require_visible(name)
        with self._database.write() as session:
            _require_version(session, name, version)
            session.get_one(AdapterRow, name).pinned_version = version
            return _one(session, name, version)

    # --- care -------------------------------------------------------------------------

    def verify(self, digest: str, *, deep: bool = True) -> bool:
        """Check a blob against its digest and record the result.

        Raises:
            AdapterNotFound: no version ever had this digest.
        """
        intact = self._blobs.is_intact(digest, deep=deep)
        with self._database.write() as session:
            # Again under the lock: an upload may have replaced the bytes meanwhile.
            intact = intact or self._blobs.is_intact(digest, deep=deep)
            blob = session.get(BlobRow, digest)
            if blob is None:
                _no_adapter(digest)
            blob.status = "ok" if intact else "corrupt"
        return intact

    def mark_corrupt(self, digest: str) -> None:
        """Record that a reader found this digest damaged; unknown digests are ignored."""
        with self._database.write() as session:
            blob = session.get(BlobRow, digest)
            if blob is not None:
                blob.status = "corrupt"

    def unused_digests(self) -> frozenset[str]:
        """Digests of blobs that no version uses."""
        stored = set(self._blobs.digests())
        with self._database.read() as session:
            return frozenset(stored - _used(session, stored))

    def collect_garbage(
        self, in_use: Collection[str] = (), *, among: Collection[str] | None = None
    ) -> tuple[str, ...]:
        """Remove blobs that no version uses, except those in use. Returns the removed digests.

        Also removes staging folders of dead owners.

        Args:
            in_use: digests that a running request may still have to load.
            among: consider only these digests. If requests arrive concurrently, call `unused_digests`
                first and determine `in_use` afterwards: a digest without a version gains no new users.
        """
        candidates = self._blobs.digests() if among is None else among
        removed = self._collect(set(candidates) - set(in_use))
        self._blobs.staging.sweep()
        return removed

    def sweep(self, *, deep: bool = True) -> SweepReport:
        """Clean up at start, before anything is served from this root.

        Removes orphan blobs and abandoned staging folders, and marks adapters whose blob is
        missing or damaged.

        Args:
            deep: hash every stored byte (about a second per gigabyte); otherwise check files, header and
                length only, which detects truncation but not changed weights.
        """
        staging_removed = self._blobs.staging.sweep()
        removed = self.collect_garbage()
        with self._database.read() as session:
            digests = list(session.scalars(select(VersionRow.digest).distinct()))
        corrupt = tuple(digest for digest in digests if not self.verify(digest, deep=deep))
        return SweepReport(removed, corrupt, staging_removed)

    # --- inside -----------------------------------------------------------------------

    def _collect(self, digests: Iterable[str]) -> tuple[str, ...]:
        with self._database.write() as session:
            wanted = set(digests)
            unused = sorted(wanted - _used(session, wanted))
            for digest in unused:
                self._blobs.discard(digest)
                session.execute(delete(BlobRow).where(BlobRow.digest == digest))
            return tuple(unused)

    def _require_visible(self, *names: str) -> None:
        visible = self._caller.adapters
        for name in names:
            if not _is_among(name, visible):
                _no_adapter(name)

    def _check_name(self, name: str, field: str = "name") -> None:
        if not _NAME.fullmatch(name) or ".." in name:
            raise NameInvalid(
                f"{name[:80]!r} is not an adapter name: expected {_NAME_RULE}",
                field=field,
                expected=_NAME_RULE,
                came=name[:80],
            )
        if name.casefold() in self._reserved:
            raise NameInvalid(f"{name!r} is reserved", field=field, came=name)


# --- rules over rows ----------------------------------------------------------------------


def _no_adapter(name: str) -> NoReturn:
    raise AdapterNotFound(
        f"there is no adapter {shorten(name)!r}", field="adapter", came=shorten(name)
    )


def _no_version(name: str, version: str) -> NoReturn:
    raise VersionNotFound(
        f"adapter {name!r} has no version or alias {shorten(version)!r}",
        field="adapter",
        came=shorten(f"{name}@{version}"),
    )


def _newest(session: Session, name: str) -> int | None:
    return session.scalar(select(func.max(VersionRow.version)).where(VersionRow.name == name))


def _require_version(session: Session, name: str, version: int) -> None:
    if session.get(VersionRow, (name, version)) is None:
        if _newest(session, name) is None:
            _no_adapter(name)
        _no_version(name, str(version))


def _default_versions() -> Select[str, int]:
    """(name, version) that each bare name resolves to: the pinned version, else the newest."""
    version = func.coalesce(AdapterRow.pinned_version, func.max(VersionRow.version))
    return (
        select(AdapterRow.name, version.label("version"))
        .join(VersionRow, VersionRow.name == AdapterRow.name)
        .group_by(AdapterRow.name)
    )


def _is_among(name: str, visible: Collection[str] | None) -> bool:
    """Whether a name matches one of these names or `*` prefixes; None matches all."""
    return visible is None or any(
        name.startswith(one[:-1]) if one.endswith("*") else name == one for one in visible
    )


def _among(visible: Collection[str] | None) -> ColumnElement[bool]:
    """`_is_among` as a filter on rows of versions."""
    if visible is None:
        return true()
    beginnings = [one[:-1] for one in visible if one.endswith("*")]
    return or_(
        VersionRow.name.in_([one for one in visible if not one.endswith("*")]),
        *(VersionRow.name.startswith(one, autoescape=True) for one in beginnings),
    )


def _locate(session: Session, reference: str, visible: Collection[str] | None) -> tuple[str, int]:
    """(name, version) of NAME, NAME@VERSION, NAME@ALIAS or a bare alias."""
    name, at, which = reference.partition("@")
    default = None
    if _is_among(name, visible):
        default = session.execute(_default_versions().where(AdapterRow.name == name)).first()
    if default is None:
        return _no_adapter(reference) if at else _locate_bare_alias(session, name, visible)
    if not at:
        return name, default.version
    found: VersionRow | AliasRow | None
    if _VERSION.fullmatch(which):
        found = session.get(VersionRow, (name, int(which)))
    else:
        found = session.get(AliasRow, (name, which))
    return (name, found.version) if found is not None else _no_version(name, which)


def _locate_bare_alias(
    session: Session, alias: str, visible: Collection[str] | None
) -> tuple[str, int]:
    named = session.scalars(select(AliasRow).where(AliasRow.alias == alias))
    found = [row for row in named if _is_among(row.name, visible)]
    if not found:
        _no_adapter(alias)
    if len(found) > 1:
        full = ", ".join(sorted(f"{row.name}@{alias}" for row in found)[:5])
        raise AdapterNotFound(
            f"{alias!r} is an alias of {len(found)} adapters; say which: {full}",
            field="adapter",
            expected=full,
            came=alias,
        )
    return found[0].name, found[0].version


def _check_free(session: Session, name: str, create_only: bool) -> None:
    if _newest(session, name) is not None:
        if create_only:
            raise AdapterExists(f"there is an adapter {name!r} already", field="name", came=name)
    elif session.scalars(select(AliasRow.name).where(AliasRow.alias == name)).first():
        raise NameInvalid(f"{name!r} is an alias of another adapter", field="name", came=name)


def _insert(
    session: Session,
    name: str,
    checked: CheckedCheckpoint,
    metadata: AdapterMetadata,
    warnings: Sequence[str],
) -> tuple[int, bool]:
    """The version number of these bytes and metadata under a name, and whether it is new."""
    session.merge(
        BlobRow(
            digest=checked.digest,
            peft_type=checked.peft_type,
            num_virtual_tokens=checked.facts.num_virtual_tokens,
            uses_scales=checked.facts.uses_scales,
            num_bytes=checked.num_bytes,
            status="ok",
        )
    )
    adapter = session.get(AdapterRow, name)
    if adapter is None:
        adapter = AdapterRow(name=name, last_version=0)
        session.add(adapter)
    newest = session.get(VersionRow, (name, _newest(session, name) or 0))
    if (
        newest is not None
        and newest.digest == checked.digest
        and not _metadata(newest).differs_from(metadata)
    ):
        return newest.version, False
    adapter.last_version += 1
    adapter.pinned_version = None
    session.flush()  # parents first: the tables have foreign keys, the classes no relationships
    session.add(
        VersionRow(
            name=name,
            version=adapter.last_version,
            digest=checked.digest,
            base_name=checked.base_name,
            created_at=datetime.now(UTC),
            warnings=[*warnings],
            **metadata.columns(),
        )
    )
    return adapter.last_version, True


def _metadata(row: VersionRow) -> AdapterMetadata:
    return AdapterMetadata.from_columns({name: getattr(row, name) for name in METADATA_FIELDS})


def _used(session: Session, digests: Collection[str]) -> set[str]:
    """The subset of digests that a version uses."""
    return set(session.scalars(select(VersionRow.digest).distinct())).intersection(digests)


def _versions() -> Select[VersionRow, BlobRow]:
    return select(VersionRow, BlobRow).join(BlobRow, BlobRow.digest == VersionRow.digest)


def _records(session: Session, statement: Select[VersionRow, BlobRow]) -> tuple[AdapterRecord, ...]:
    rows = session.execute(statement).all()
    names = {row.name for row, _ in rows}
    statement_defaults = _default_versions().where(AdapterRow.name.in_(names))
    defaults = {row.name: row.version for row in session.execute(statement_defaults)}
    aliases: dict[tuple[str, int], list[str]] = {}
    for alias in session.scalars(select(AliasRow).where(AliasRow.name.in_(names))):
        aliases.setdefault((alias.name, alias.version), []).append(alias.alias)
    return tuple(
        _record(
            row,
            blob,
            aliases=tuple(sorted(aliases.get((row.name, row.version), ()))),
            is_default=defaults[row.name] == row.version,
        )
        for row, blob in rows
    )


def _one(session: Session, name: str, version: int) -> AdapterRecord:
    """A version that is known to exist, including the session's pending changes."""
    statement = _versions().where(VersionRow.name == name, VersionRow.version == version)
    return _records(session, statement)[0]


def _record(
    row: VersionRow, blob: BlobRow, *, aliases: tuple[str, ...], is_default: bool
) -> AdapterRecord:
    return AdapterRecord(
        **vars(_metadata(row)),
        name=row.name,
        version=row.version,
        digest=row.digest,
        peft_type=blob.peft_type,
        num_virtual_tokens=blob.num_virtual_tokens,
        uses_scales=blob.uses_scales,
        num_bytes=blob.num_bytes,
        warnings=tuple(row.warnings),
        base_name=row.base_name,
        created_at=row.created_at,
        status="ok" if blob.status == "ok" else "corrupt",
        aliases=aliases,
        is_default=is_default,
    )


def _base_warnings(checked: CheckedCheckpoint, base_names: Collection[str]) -> list[str]:
    named = checked.base_name
    if named is None or not base_names or named in base_names:
        return []
    return [
        f"adapter_config.json names the base {shorten(named)!r}, this server's is "
        f"{sorted(base_names)[0]!r}; names and shapes of the tensors fit, so it was accepted"
    ]
