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
- Aliases belong to one adapter (NAME@ALIAS). A bare alias works while only one adapter has it. An
  alias and an adapter share a name only if who published the adapter could not see the alias; who
  sees both is asked which of them is meant.
- A caller may be restricted to some names (`seen_by`). All other names behave as nonexistent in every
  operation, and cannot be created.

Threads and processes may share one root: every write holds SQLite's write lock from before it touches
`blobs/` until its commit. Independent of HTTP, the meaning of tensors, and the engine.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, func, select
from sqlalchemy.exc import DatabaseError

from adapters import synced_files
from adapters.base_model import BaseModelSpec
from adapters.checkpoint.archive import zip_blocks
from adapters.checkpoint.folder import CheckedCheckpoint, check_checkpoint, shorten
from adapters.checkpoint.limits import DEFAULT_LIMITS, CheckpointLimits
from adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    NameInvalid,
)
from adapters.field_errors import quoted
from adapters.metadata import AdapterMetadata, Source
from server.store import adapter_rows as rows
from server.store.adapter_names import check_name, slug_of
from server.store.adapter_rows import AdapterRecord
from server.store.blobs import BlobStore
from server.store.caller import PerCaller
from server.store.database import Database
from server.store.tables import AdapterRow, AliasRow, BlobRow, VersionRow

__all__ = ["AdapterRecord", "Published", "Registry", "SweepReport"]

_NO_METADATA = AdapterMetadata()
MAX_ALIASES = 100


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


class FolderVersion(NamedTuple):
    """A version that came from a folder; `status` is "ok" or "corrupt"."""

    name: str
    version: int
    folder: Path
    status: str


class Registry(PerCaller):
    """All adapters under one root.

    Args:
        root: created if it does not exist.
        reserved: names that adapters cannot have (the base's id).
        limits: limits on new checkpoints; not applied to stored ones.
        max_aliases: maximum aliases of one adapter.

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
        max_aliases: int = MAX_ALIASES,
    ) -> None:
        self._limits = limits
        self._max_aliases = max_aliases
        self._reserved = frozenset(name.casefold() for name in reserved)
        # Lowering a limit must not invalidate stored adapters.
        self._blobs = BlobStore(root, DEFAULT_LIMITS)
        self._database = Database(root / "registry.db")

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

    def limit_virtual_tokens(self, most: int) -> None:
        """Accept no new adapter of more virtual tokens than the engine has memory for."""
        if most < self._limits.virtual_tokens:
            words = "fit into the engine's memory for keys and values, so no request could use it"
            self._limits = replace(self._limits, virtual_tokens=most, virtual_tokens_words=words)

    def data_version(self) -> int | None:
        """See `Database.version`."""
        return self._database.version()

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
        admitted: bool = False,
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
            admitted: `require_free` found the name free for who asked, so that an alias that this caller
                sees is no reason to refuse it.
            base_names: names of `base`; a config that names another base gets a warning.

        Raises:
            CheckpointError: the checkpoint or its metadata is refused.
            BaseMismatch: the metadata names another base.
            NameInvalid: not a valid name, reserved, or an alias of another adapter that is visible.
            AdapterNotFound: the name is not visible to the caller.
            AdapterExists: `create_only`, and the name is in use.
            StorageFull, StorageUnavailable: nothing was stored.
        """
        self._check_name(name)
        self._require_visible(name, is_new=True)
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
                    visible = (name,) if admitted else self._caller.adapters
                    rows.check_free(session, name, visible, create_only=create_only)
                    with synced_files.disk_failure_is_storage_error("the adapter"):
                        placed = self._blobs.place(staged, checked.digest)
                    version, created = rows.insert(session, name, checked, metadata, all_warnings)
                    # Read before the commit: afterwards it may be deleted at any moment.
                    record = rows.one(session, name, version)
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
        self._require_visible(name, is_new=True)
        with self._database.read() as session:
            rows.check_free(session, name, self._caller.adapters, create_only=create_only)

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
            return rows.one(session, *rows.locate(session, reference, self._caller.adapters))

    def list(self, offset: int = 0, limit: int = 100) -> tuple[AdapterRecord, ...]:
        """The default version of every adapter, by name."""
        with self._database.read() as session:
            default = rows.default_versions().subquery()
            statement = (
                rows.versions()
                .join(
                    default,
                    (default.c.name == VersionRow.name) & (default.c.version == VersionRow.version),
                )
                .where(rows.among(self._caller.adapters))
                .order_by(VersionRow.name)
                .offset(offset)
                .limit(limit)
            )
            return rows.records(session, statement)

    def count(self) -> int:
        """Number of adapters that have a version."""
        with self._database.read() as session:
            names = select(func.count(VersionRow.name.distinct()))
            return session.scalar(names.where(rows.among(self._caller.adapters))) or 0

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
            statement = rows.versions().where(VersionRow.name == name).order_by(VersionRow.version)
            return rows.records(session, statement) or rows.no_adapter(
                name, session, self._caller.adapters
            )

    def from_source(self, source: Source) -> tuple[AdapterRecord, ...]:
        """Every version from one source, by name, oldest first."""
        with self._database.read() as session:
            statement = rows.versions().where(
                VersionRow.source == source, rows.among(self._caller.adapters)
            )
            return rows.records(session, statement.order_by(VersionRow.name, VersionRow.version))

    def from_folders(self, source: Source) -> tuple[FolderVersion, ...]:
        """Every version from one source that came from a folder; cheaper than `from_source`."""
        statement = (
            select(VersionRow.name, VersionRow.version, VersionRow.source_path, BlobRow.status)
            .join(BlobRow, BlobRow.digest == VersionRow.digest)
            .where(VersionRow.source == source, VersionRow.source_path.is_not(None))
            .where(rows.among(self._caller.adapters))
            .order_by(VersionRow.name, VersionRow.version)
        )
        with self._database.read() as session:
            found = session.execute(statement).all()
        return tuple(
            FolderVersion(name, number, Path(path or ""), status)
            for name, number, path, status in found
        )

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
                rows.require_version(session, name, version, self._caller.adapters)
                mine.append(VersionRow.version == version)
            digests = set(session.scalars(select(VersionRow.digest).where(*mine)))
            if not digests:
                rows.no_adapter(name, session, self._caller.adapters)
            session.execute(delete(VersionRow).where(*mine))
            adapter = session.get_one(AdapterRow, name)
            if version is None or adapter.pinned_version == version:
                adapter.pinned_version = None
            return tuple(sorted(digests - rows.used(session, digests)))

    def set_alias(self, name: str, alias: str, version: int) -> AdapterRecord:
        """Point NAME@ALIAS at a version; an existing alias is moved.

        Raises:
            NameInvalid: not an alias name, a number, reserved, or an adapter's own name.
            AdapterNotFound, VersionNotFound: nothing to point at.
            TooManyAliases: the adapter has as many as it may.
        """
        self._check_name(alias, "alias")
        # Aliases too: a conflict would reveal which adapters exist.
        self._require_visible(name, alias)
        with self._database.write() as session:
            if alias.isdigit() or rows.newest(session, alias):
                raise NameInvalid(
                    f"{alias!r} cannot be an alias: it is a number or an adapter's name",
                    field="alias",
                    expected="a name that is neither a number nor an adapter",
                    came=alias,
                )
            rows.require_version(session, name, version, self._caller.adapters)
            rows.check_alias_fits(session, name, alias, self._max_aliases)
            session.merge(AliasRow(name=name, alias=alias, version=version))
            return rows.one(session, name, version)

    def remove_alias(self, name: str, alias: str) -> AdapterRecord:
        """Remove NAME@ALIAS; the record of the version that it named.

        Raises:
            AdapterNotFound, VersionNotFound: no such adapter, or it has no such alias.
        """
        self._require_visible(name)
        with self._database.write() as session:
            return rows.one(
                session, name, rows.remove_alias(session, name, alias, self._caller.adapters)
            )

    def free_name(self, prefix: str) -> str:
        """Draw an unused name that the caller may use.

        Args:
            prefix: what it starts with, as far as the caller's names allow.

        Raises:
            NameInvalid: the caller may use only some names, and each has an adapter or is reserved.
        """
        visible = self._caller.adapters
        drawn = f"{prefix}{secrets.token_hex(12)}"
        if rows.is_among(drawn, visible):
            return drawn
        candidates = [f"{one[:-1]}{drawn}" for one in visible or () if one.endswith("*")]
        # A long prefix leaves room for less: eight random digits are what it needs at least.
        candidates += [f"{one[:-1]}{drawn[-8:]}" for one in visible or () if one.endswith("*")]
        candidates += [one for one in visible or () if not one.endswith("*")]
        for name in candidates:
            with suppress(AdapterError):
                self.require_free(name, create_only=True)
                return name
        raise NameInvalid(
            "this key may use only some names, and each of them has an adapter already; name one to make "
            "a new version of it",
            field="name",
            expected=", ".join(visible or ())[:200],
            came="no name",
        )

    def rollback(self, name: str, version: int) -> AdapterRecord:
        """Make a bare NAME resolve to this version until a new one is published.

        Raises:
            AdapterNotFound, VersionNotFound: nothing to roll back to.
        """
        self._require_visible(name)
        with self._database.write() as session:
            rows.require_version(session, name, version, self._caller.adapters)
            session.get_one(AdapterRow, name).pinned_version = version
            return rows.one(session, name, version)

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
                rows.no_adapter(digest)
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
            return frozenset(stored - rows.used(session, stored))

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
                length only, which detects truncation but not changed weights, and read only files
                that have changed since they were checked.
        """
        staging_removed = self._blobs.staging.sweep()
        removed = self.collect_garbage()
        with self._database.read() as session:
            used = select(BlobRow.digest, BlobRow.status).join(
                VersionRow, VersionRow.digest == BlobRow.digest
            )
            statuses = {digest: status for digest, status in session.execute(used.distinct())}
        if deep:
            intact = frozenset(one for one in statuses if self._blobs.is_intact(one))
        else:
            intact = self._blobs.intact(statuses)
        corrupt = []
        for digest, status in statuses.items():
            is_intact = digest in intact
            if is_intact != (status == "ok"):
                # What was damaged once must match to the last byte.
                is_intact = self.verify(digest, deep=deep or is_intact)
            if not is_intact:
                corrupt.append(digest)
        return SweepReport(removed, tuple(corrupt), staging_removed)

    # --- inside -----------------------------------------------------------------------

    def _collect(self, digests: Iterable[str]) -> tuple[str, ...]:
        with self._database.write() as session:
            wanted = set(digests)
            unused = sorted(wanted - rows.used(session, wanted))
            for digest in unused:
                self._blobs.discard(digest)
                session.execute(delete(BlobRow).where(BlobRow.digest == digest))
            return tuple(unused)

    def _require_visible(self, *names: str, is_new: bool = False) -> None:
        """Raise AdapterNotFound for a hidden name as for a missing one; `is_new` suggests no other."""
        visible = self._caller.adapters
        for name in names:
            if rows.is_among(name, visible):
                continue
            if is_new:
                rows.no_adapter(name)
            with self._database.read() as session:
                rows.no_adapter(name, session, visible)

    def _check_name(self, name: str, field: str = "name") -> None:
        if name.casefold() in self._reserved:
            raise NameInvalid(
                f"{quoted(name)} is reserved: it is the base's name; try "
                f"{(slug_of(name) or 'my') + '-adapter'!r}",
                field=field,
                expected="another name than the base's",
                came=name[:80],
            )
        check_name(name, field)


def _is_same(one: str, other: str) -> bool:
    """Whether two names of a base are the same, or two paths of the same folder."""
    try:
        return one == other or os.path.samefile(one, other)
    except (OSError, ValueError):
        return False  # one of them is no path here


def _base_warnings(checked: CheckedCheckpoint, base_names: Collection[str]) -> list[str]:
    named = checked.base_name
    if named is None or not base_names or any(_is_same(named, one) for one in base_names):
        return []
    return [
        f"adapter_config.json names the base {shorten(named)!r}, this server's is "
        f"{sorted(base_names)[0]!r}; names and shapes of the tensors fit, so it was accepted"
    ]
