"""Content-addressed checkpoint folders on disk.

    <root>/blobs/<digest>/adapter_config.json, adapter_model.safetensors

A folder under `blobs/` appears by one rename, complete and synced, and is never written to again.
Independent of names, versions and the database; the registry decides when to remove a blob.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters import synced_files
from adapters.checkpoint.folder import (
    CONFIG_FILE,
    FILES,
    TENSORS_FILE,
    check_file_set,
    digest_of,
    read_config,
    read_header,
)
from adapters.checkpoint.limits import CheckpointLimits
from adapters.errors import AdapterError
from server.store.checked_blobs import CheckedBlobs
from server.store.staging import StagingArea

_DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """The folders under one root. Safe between threads and processes, see each method.

    Attributes:
        staging: area where a folder is prepared before it becomes a blob.
    """

    def __init__(self, root: Path, limits: CheckpointLimits) -> None:
        self._blobs = root / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self.staging = StagingArea(root)
        self._limits = limits
        self._checked = CheckedBlobs(root, FILES)

    def path(self, digest: str) -> Path:
        """The path of a digest's folder, which may not exist.

        Raises:
            ValueError: not a sha256 in lower-case hex.
        """
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a digest: {digest!r}")
        return self._blobs / digest

    def digests(self) -> list[str]:
        """Every digest that has a folder."""
        return sorted(e.name for e in self._blobs.iterdir() if _DIGEST.fullmatch(e.name))

    @contextmanager
    def taken_in(self, directory: Path) -> Iterator[Path]:
        """A checkpoint folder in staging: the given one if it is already there, else a copy.

        Raises what `check_file_set` raises: nothing is copied but the two files.
        """
        check_file_set(directory)
        if directory.parent == self.staging.path:
            yield directory
            return
        with self.staging.folder() as copy:
            for name in sorted(FILES):
                synced_files.copy_file(directory / name, copy / name)
            yield copy

    def place(self, staged: Path, digest: str) -> bool:
        """Move a staged folder to its digest; False if an intact blob exists already.

        A blob that no longer matches its digest is replaced. The caller must serialise this with
        `discard`.
        """
        target = self.path(digest)
        if os.path.lexists(target):
            if self.is_intact(digest):
                return False
            self.discard(digest)
        for name in FILES:
            synced_files.sync(staged / name)
        synced_files.sync(staged)
        staged.rename(target)
        synced_files.sync(self._blobs)
        self._checked.add(digest, target)
        return True

    def discard(self, digest: str) -> None:
        """Remove a blob; it leaves `blobs/` by one rename. Files already open stay readable."""
        with self.staging.folder() as grave:
            try:
                self.path(digest).rename(grave / digest)
            except FileNotFoundError:
                return
            synced_files.sync(self._blobs)

    def intact(self, digests: Iterable[str]) -> frozenset[str]:
        """Those of the digests whose folders are intact, not `deep`: read only where files have changed."""
        known = self._checked.load()
        now: dict[str, str] = {}
        for digest in digests:
            stamp = self._checked.stamp(self.path(digest))  # before it is read
            if stamp is None:
                continue
            if known.get(digest) == stamp or self.is_intact(digest, deep=False):
                now[digest] = stamp
        if now != known:
            self._checked.replace(now)
        return frozenset(now)

    def is_intact(self, digest: str, *, deep: bool = True) -> bool:
        """Whether the folder's content still matches its digest.

        Args:
            digest: the digest.
            deep: hash every byte; otherwise files, config, header and length only.
        """
        directory = self.path(digest)
        if directory.is_symlink():  # not created by this store, and its target may change
            return False
        try:
            if deep:
                return digest_of(directory, self._limits) == digest
            check_file_set(directory)
            read_config(directory / CONFIG_FILE, self._limits)
            read_header(directory / TENSORS_FILE, self._limits)
        except (AdapterError, OSError):
            return False
        return True
