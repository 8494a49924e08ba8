"""Checks of what is on disk: the base, the data directory, its database, its adapters.

Nothing is changed: a database of an older version is not migrated, what a sweep would remove stays.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import AdapterError, BaseUnsupported
from server.cli.doctor.finding import Finding
from server.config.settings import Settings

if TYPE_CHECKING:
    from adapters.base_model import BaseModelSpec
    from server.store.registry import AdapterRecord, Registry

_MANY = 5


def check_base(settings: Settings, *, deep: bool) -> tuple[list[Finding], BaseModelSpec | None]:
    """Whether the base can be served, as far as its files say; its spec where it can.

    Args:
        settings: which base.
        deep: load the weights too.
    """
    from server.base.check import check_base as look_at_files
    from server.base.convert import is_prepared, read_manifest
    from server.base.load import describe_base, load_base
    from server.base.tokenizer import load_tokenizer

    directory = Path(settings.base)
    if settings.is_default_base and not is_prepared(directory):
        hint = "graftwork serve makes it; that needs pip's index once"
        there = "is not whole" if directory.exists() else "is not made yet"
        message = f"the default base in {directory} {there}"
        return [Finding("base", "fail" if directory.exists() else "warning", message, hint)], None
    try:
        look_at_files(settings.base, settings.revision)
        spec = describe_base(settings.base, dtype=settings.dtype, revision=settings.revision)
        if directory.is_dir():
            load_tokenizer(directory)
        if deep:
            load_base(settings.base, dtype=settings.dtype, device="cpu", revision=settings.revision)
    except BaseUnsupported as error:
        hint = "name another with --base; graftwork serve --help says what is taken"
        return [Finding("base", "fail", error.message, hint)], None
    name = settings.base_name or str(
        (read_manifest(directory) or {}).get("name") or settings.base_id
    )
    message = f"{name}: {spec.model_type}, {spec.num_layers} layers, digest {spec.digest[:12]}"
    return [Finding("base", "ok", message)], spec


def check_data_dir(settings: Settings, *, deep: bool) -> Iterator[Finding]:
    """Whether the data directory can be written, and its database and blobs are whole.

    Args:
        settings: which directory.
        deep: hash every byte of every adapter.
    """
    directory = settings.data_dir
    if not directory.exists():
        yield Finding("data directory", "ok", f"{directory} will be made on first use")
        return
    yield _writable(directory)
    database = directory / "registry.db"
    if not database.is_file():
        yield Finding("database", "ok", f"{database} will be made on first use")
        return
    finding = _revision(database)
    yield finding
    if finding.status == "ok":
        yield from _sweep(settings, deep=deep)


def check_adapters(settings: Settings, base: BaseModelSpec) -> Iterator[Finding]:
    """Whether every version of every adapter fits the base."""
    from adapters.checkpoint.folder import check_checkpoint

    faults: list[str] = []
    count = 0
    with closing(_registry(settings)) as registry:
        for record in _versions(registry):
            count += 1
            try:
                record.require_base(base)
                check_checkpoint(registry.blob_path(record.digest), base)
            except AdapterError as error:
                faults.append(f"{record.name}@{record.version}: {error.message}")
            except OSError as error:
                faults.append(f"{record.name}@{record.version}: {error.strerror}")
    hint = "serve it on its own base, upload it again, or graftwork adapters remove it"
    for fault in faults[:_MANY]:
        yield Finding("adapters", "fail", fault, hint)
    if len(faults) > _MANY:
        yield Finding("adapters", "fail", f"and {len(faults) - _MANY} more", hint)
    if not faults:
        yield Finding("adapters", "ok", f"{count} versions of adapters fit the base")


def has_adapters(settings: Settings) -> bool:
    """Whether there is a database of this version to read adapters from."""
    database = settings.data_dir / "registry.db"
    return database.is_file() and _revision(database).status == "ok"


def _writable(directory: Path) -> Finding:
    hint = "give this user the right to write there, or name another with --data-dir"
    if not directory.is_dir():
        return Finding("data directory", "fail", f"{directory} is not a folder", hint)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-"):
            pass
    except OSError as error:
        message = f"{directory} cannot be written: {error.strerror}"
        return Finding("data directory", "fail", message, hint)
    return Finding("data directory", "ok", f"{directory} can be written")


def _revision(database: Path) -> Finding:
    """The version of the tables, read without bringing them up to date."""
    from server.store.schema import HEAD

    repair = "restore the data directory from a copy"
    try:
        # Read only, but not immutable: a server may be writing.
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as link:
            broken = link.execute("PRAGMA quick_check(1)").fetchone()[0]
            came = link.execute("SELECT version_num FROM alembic_version").fetchone()[0]
    except (sqlite3.Error, TypeError) as error:
        return Finding("database", "fail", f"{database} cannot be read: {error}", repair)
    if broken != "ok":
        return Finding("database", "fail", f"{database} is damaged: {broken}", repair)
    if came == HEAD:
        return Finding("database", "ok", f"{database} has revision {came}")
    if came < HEAD:
        message = f"{database} has revision {came}; the next start brings it up to {HEAD}"
        return Finding("database", "warning", message, "keep a copy if the older version is in use")
    message = f"{database} has revision {came}, this version knows {HEAD}"
    return Finding("database", "fail", message, "update Graftwork")


def _sweep(settings: Settings, *, deep: bool) -> Iterator[Finding]:
    """What a sweep would find."""
    from adapters.checkpoint.limits import DEFAULT_LIMITS
    from server.store.blobs import BlobStore

    with closing(_registry(settings)) as registry:
        unused = registry.unused_digests()
        digests = {record.digest: record for record in _versions(registry)}
    blobs = BlobStore(settings.data_dir, DEFAULT_LIMITS)
    damaged = [digest for digest in digests if not blobs.is_intact(digest, deep=deep)]
    for digest in damaged:
        record = digests[digest]
        message = f"{record.name}@{record.version}: the stored bytes of {digest[:12]} are damaged"
        hint = f"add it again: graftwork adapters add DIR --name {record.name}"
        yield Finding("blobs", "fail", message, hint)
    if unused:
        message = f"{len(unused)} that no version uses: a server removes them at its next start"
        yield Finding("blobs", "ok", message)
    if not damaged:
        how = "hashed and found" if deep else "of the right form; --deep hashes them"
        yield Finding("blobs", "ok", f"{len(digests)} {how} {'intact' if deep else ''}".rstrip())


def _registry(settings: Settings) -> Registry:
    from server.store.registry import Registry

    return Registry(settings.data_dir)


def _versions(registry: Registry) -> list[AdapterRecord]:
    names = [record.name for record in registry.list(limit=100_000)]
    return [version for name in names for version in registry.versions(name)]
