"""Adapters from the operator's folders: those that clients may load by path, and a watched directory.

All symlinks in a path are resolved first; the result, and each file in the folder, must lie inside an
allowed directory. Folders are validated and published like uploads, with the provenance that
`graftwork train` wrote beside PEFT's files.

The watched directory: every direct subfolder with an adapter_config.json is an adapter of the folder's
name, or of the nearest one that an adapter can have. An archive there is logged, once. A folder is
published once two consecutive scans found the same files, and again when they change; a refused folder is
logged once and retried when it changes. When two scans have missed a folder, its versions are removed;
other versions of the name stay. What was published is recorded in a file, so that the next start reads no
folder that has not changed. Calls may block and belong off the event loop. Independent of HTTP and the
engine.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import structlog

from adapters.base_model import BaseModelSpec
from adapters.checkpoint.archive import stage_upload
from adapters.checkpoint.folder import CONFIG_FILE, FILES, PICKLE_SUFFIXES, digest_of
from adapters.errors import AdapterError, AdapterExists, AdapterNotFound, StorageFull
from adapters.metadata import AdapterMetadata
from adapters.training.provenance import PROVENANCE_FILE, read_provenance
from server.errors import FolderNotFound
from server.store.adapter_names import is_name, slug_of
from server.store.registry import AdapterRecord, FolderVersion, Published, Registry

log = structlog.get_logger(__name__)

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")

Managed = Literal["loaded", "watched"]
# Name, size, times and path of every relevant file.
Stamp = tuple[tuple[str | int, ...], ...]


def find_folder(path: str, allowed: Sequence[Path]) -> Path:
    """Resolve a client's path to a folder, following all symlinks.

    Args:
        path: absolute, or relative to one of `allowed`.
        allowed: the directories that the operator allows.

    Raises:
        FolderNotFound: no such folder inside them; the same error if it exists elsewhere.
    """
    roots = [root.resolve() for root in allowed]
    for root in roots:
        try:
            folder = (root / path).resolve(strict=True)
            is_folder = folder.is_dir()
        except (OSError, ValueError, RuntimeError):  # missing, a NUL byte, or a symlink loop
            continue
        if is_folder and _lies_inside(folder, roots):
            return folder
    raise FolderNotFound(
        "lora_path: there is no such folder in the directories that may be loaded from",
        field="lora_path",
        expected="a PEFT folder inside a directory of the setting load_dirs",
    )


def publish_folder(
    registry: Registry,
    base: BaseModelSpec,
    name: str,
    folder: Path,
    *,
    source: Managed,
    allowed: Sequence[Path],
    create_only: bool = False,
    base_names: Collection[str] = (),
) -> Published:
    """Publish a folder under a name, with the checks of an upload.

    Args:
        registry: the destination.
        base: the base it must fit.
        name: see `Registry.publish`.
        folder: a PEFT folder.
        source: the recorded source.
        allowed: directories that must contain its files, symlinks resolved.
        create_only: refuse a name that is in use.
        base_names: see `Registry.publish`.

    Raises:
        FolderNotFound: a file is not a regular file, or lies outside the allowed directories.
        AdapterError: as for an upload.
    """
    with registry.staging_dir() as staged:
        _stage(folder, allowed, staged)
        provenance = read_provenance(folder)
        metadata = AdapterMetadata() if provenance is None else provenance.metadata()
        return registry.publish(
            name,
            staged,
            base,
            replace(metadata, source=source, source_path=str(folder)),
            create_only=create_only,
            base_names=base_names,
        )


def _stage(folder: Path, allowed: Sequence[Path], staged: Path) -> None:
    files = [path for path in _files(folder, allowed) if path.name != PROVENANCE_FILE]
    stage_upload([(path.name, path.resolve()) for path in files], staged)


def _lies_inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _matters(name: str) -> bool:
    """Whether a file is read, or refused (a pickle); other files are ignored."""
    return name in FILES or name == PROVENANCE_FILE or Path(name).suffix.lower() in PICKLE_SUFFIXES


def _files(folder: Path, allowed: Sequence[Path]) -> list[Path]:
    """The relevant files of a folder, each a regular file inside the allowed directories."""
    roots = [root.resolve() for root in allowed]
    found = sorted(path for path in folder.iterdir() if _matters(path.name))
    for path in found:
        # Opening a pipe would block, and a symlink may point anywhere.
        if not path.is_file() or not _lies_inside(path.resolve(), roots):
            raise FolderNotFound(
                f"{path.name} is not a plain file inside the directories that may be read",
                field="lora_path",
                expected="plain files inside the allowed directories",
                came=path.name,
            )
    return found


@dataclass
class Changes:
    """What `AdapterDirectory.sync` did.

    Attributes:
        published: new versions.
        removed: names with removed versions.
        unused: digests that no version uses any longer; the engine may unload them.
    """

    published: list[AdapterRecord] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


class AdapterDirectory:
    """A directory whose folders are adapters. Not thread-safe.

    Args:
        directory: the watched directory.
        registry: destination of its adapters.
        also_allowed: directories that symlinks in it may point into.
        base_names: see `Registry.publish`.
        record: the file that remembers what was published; it may be lost, and costs a read of every
            folder then. None remembers nothing.
    """

    def __init__(
        self,
        directory: Path,
        registry: Registry,
        *,
        also_allowed: Sequence[Path] = (),
        base_names: Collection[str] = (),
        record: Path | None = None,
    ) -> None:
        self._directory = directory.resolve()
        self._registry = registry
        self._allowed = (self._directory, *also_allowed)
        self._base_names = base_names
        self._seen: dict[str, Stamp] = {}
        self._dealt_with: dict[str, Stamp] = {}
        self._record = record
        self._has_synced = False
        self._missing: set[str] = set()
        self._archives: set[str] = set()
        self._is_unreadable = False

    def look(self) -> None:
        """Record the current state, so that the next `sync` publishes what has not changed since."""
        self._seen = self._folders() or {}

    def sync(self, base: BaseModelSpec) -> Changes:
        """Publish new, settled folders and remove the versions of missing ones."""
        changes = Changes()
        found = self._folders()
        if found is None:
            return changes
        before, self._seen = self._seen, found
        is_first = not self._has_synced
        if is_first:
            self._remember(found, base)
        for name, stamp in found.items():
            is_settled = before.get(name) == stamp
            if is_settled and self._dealt_with.get(name) != stamp:
                self._take(name, base, changes)
                self._dealt_with[name] = stamp
        self._let_go(found, changes)
        if is_first or changes.published or changes.removed:
            self._write_record(base)
        self._has_synced = True
        return changes

    def _remember(self, found: Mapping[str, Stamp], base: BaseModelSpec) -> None:
        """Pass over what an earlier start published for this base, if it is still there and intact."""
        recorded = _read_record(self._record)
        newest = {one.folder.name: one for one in self._published()}
        for name, version in newest.items():
            stamp = found.get(name)
            if stamp is None or version.status != "ok":
                continue
            if recorded.get(name) == _key(stamp, version, base):
                self._dealt_with[name] = stamp

    def _write_record(self, base: BaseModelSpec) -> None:
        if self._record is None:
            return
        newest = {one.folder.name: one for one in self._published()}
        record = {
            name: _key(self._dealt_with[name], version, base)
            for name, version in newest.items()
            if name in self._dealt_with
        }
        scratch = self._record.with_suffix(".tmp")
        with suppress(OSError):  # a full disk costs the next start its reads
            scratch.write_text(json.dumps(record), "utf-8")
            scratch.replace(self._record)

    def _published(self) -> list[FolderVersion]:
        """The versions that came from folders of this directory."""
        found = self._registry.from_folders("watched")
        return [one for one in found if one.folder.parent == self._directory]

    def _folders(self) -> dict[str, Stamp] | None:
        """Folder name -> stamp; None where the directory cannot be read."""
        try:
            entries = sorted(self._directory.iterdir())
        except OSError as error:
            if not self._is_unreadable:
                # Its adapters stay: an unmounted directory is not a request to remove them.
                log.warning("adapter_dir_unreadable", error=str(error))
            self._is_unreadable = True
            return None
        self._is_unreadable = False
        self._log_archives(entries)
        stamps = {entry.name: _stamp(entry) for entry in entries if entry.name[0] != "."}
        return {name: stamp for name, stamp in stamps.items() if stamp is not None}

    def _log_archives(self, entries: Sequence[Path]) -> None:
        """Log each archive once: it is not served, and whoever put it there may expect it to be."""
        found = {entry.name for entry in entries if entry.name.lower().endswith(_ARCHIVES)}
        for name in sorted(found - self._archives):
            hint = "only folders are adapters here: unpack it, or use graftwork adapters add"
            log.warning("adapter_archive_skipped", file=name, hint=hint)
        self._archives = found

    def _take(self, title: str, base: BaseModelSpec, changes: Changes) -> None:
        folder = self._directory / title
        # A title without a letter stays as it is, and is refused as a name.
        name = title if is_name(title) else slug_of(title) or title
        try:
            mine, newest = self._versions(name, folder)
            if mine is not None and mine != newest and self._holds(folder, mine.digest):
                return  # a newer version was published over an unchanged folder: it stays
            published = publish_folder(
                self._registry,
                base,
                name,
                folder,
                source="watched",
                allowed=self._allowed,
                create_only=mine is None,
                base_names=self._base_names,
            )
        except StorageFull:
            raise
        except (AdapterError, FolderNotFound, OSError) as error:
            log.warning("adapter_folder_refused", folder=title, error=str(error))
            return
        if name != title:
            log.info("adapter_folder_named", folder=title, name=name)
        if published.created:
            changes.published.append(published.record)

    def _holds(self, folder: Path, digest: str) -> bool:
        with self._registry.staging_dir() as staged:
            _stage(folder, self._allowed, staged)
            return digest_of(staged) == digest

    def _versions(
        self, name: str, folder: Path
    ) -> tuple[AdapterRecord | None, AdapterRecord | None]:
        """The newest version from this folder, and the newest of all.

        Raises:
            AdapterExists: the name is in use by adapters from elsewhere.
        """
        try:
            versions = self._registry.versions(name)
        except AdapterNotFound:
            return None, None
        mine = [one for one in versions if is_from(one, "watched", folder)]
        if not mine:
            raise AdapterExists(
                f"there is an adapter {name!r} already that did not come from this folder; "
                "give the folder another name",
                field="name",
                came=name,
            )
        return mine[-1], versions[-1]

    def _let_go(self, found: Collection[str], changes: Changes) -> None:
        """Remove the versions of folders missing from this scan and the previous one."""
        gone = {one.name: one.folder for one in self._published() if one.folder.name not in found}
        for name in gone.keys() & self._missing:
            folder = gone.pop(name)
            self._dealt_with.pop(folder.name, None)
            changes.unused += remove_versions(
                self._registry, name, functools.partial(_is_watched, folder)
            )
            changes.removed.append(name)
        self._missing = set(gone)
        # Also forget refused folders that are gone.
        kept = {folder.name for folder in gone.values()}.union(found)
        self._dealt_with = {n: s for n, s in self._dealt_with.items() if n in kept}


def is_from(record: AdapterRecord, source: Managed, folder: Path | None = None) -> bool:
    """Whether a version has this source, and came from this folder if one is given."""
    return record.source == source and folder in (None, Path(record.source_path or ""))


def _is_watched(folder: Path, record: AdapterRecord) -> bool:
    return is_from(record, "watched", folder)


def remove_versions(
    registry: Registry, name: str, chosen: Callable[[AdapterRecord], bool]
) -> tuple[str, ...]:
    """Delete some versions of an adapter. Returns the digests that no version uses any longer.

    Raises:
        AdapterNotFound: the adapter has no version.
    """
    unused: set[str] = set()
    for record in registry.versions(name):
        if chosen(record):
            unused.update(registry.delete(name, record.version))
    return tuple(sorted(unused))


def _read_record(path: Path | None) -> dict[str, str]:
    """Folder name -> key of the stamp; empty if there is no such file, or another one."""
    try:
        record = {} if path is None else json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _key(stamp: Stamp, newest: FolderVersion, base: BaseModelSpec) -> str:
    """What a record says of a folder whose files, newest version and base are these."""
    text = repr((base.digest, newest.name, newest.version, stamp))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _stamp(folder: Path) -> Stamp | None:
    """Fingerprint of a folder's state; None if it is not a PEFT folder."""
    try:
        if not (folder / CONFIG_FILE).is_file():
            return None
        files = sorted(path for path in folder.iterdir() if _matters(path.name))
        stats = [(path.name, path.stat()) for path in files]
    except OSError:  # being moved, or not readable
        return None
    return tuple(
        (name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        for name, stat in stats
    )
