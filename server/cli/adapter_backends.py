"""The two places where the command line finds adapters: a data directory, or a running server.

    AdapterPlace                          what both can do, in the JSON of `GET /adapters`
    |-- local_adapters.DataDirectory      the registry itself; nothing is ever on a device there
    `-- remote_adapters.RunningServer     the routes under /adapters

Raises the library's errors, `ServerRefused` and OSError; prints nothing.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapters.errors import (
    RegistryError,
)

if TYPE_CHECKING:
    from adapters.combine import CombinationType
    from adapters.training.provenance import Provenance

Shown = dict[str, Any]


@dataclass(frozen=True)
class Weighted:
    """One part of a combination: NAME, NAME@VERSION or NAME@ALIAS, and its weight."""

    reference: str
    weight: float


@dataclass(frozen=True)
class Source:
    """An adapter on this machine that is to be added.

    Attributes:
        path: a PEFT folder, or a .zip or .tar of one.
        name: what it will be called.
        words: what `Registry.publish` is to store with it.
    """

    path: Path
    name: str
    words: dict[str, Any] = field(default_factory=dict)


class AdapterPlace(Protocol):
    """Where adapters are. A record is a dict as `GET /adapters/{name}` has it."""

    def list(self) -> list[Shown]:
        """The default version of every adapter, by name."""
        ...

    def show(self, reference: str) -> Shown:
        """One version, with `recipe`, `config` and all `versions` of its adapter."""
        ...

    def add(self, source: Source) -> Shown:
        """Register an adapter; the record, with `created` and `ignored_files`."""
        ...

    def remove(self, name: str, version: int | None) -> Shown:
        """Remove a version, or all of them; `name` and `deleted_versions`."""
        ...

    def rollback(self, name: str, version: int) -> Shown:
        """Make a bare name mean an older version; its record."""
        ...

    def set_alias(self, name: str, alias: str, version: int) -> Shown:
        """Name a version; its record."""
        ...

    def download(self, reference: str, target: Path) -> Shown:
        """Write the zip of a version into a new file; its record."""
        ...

    def combine(
        self,
        parts: Sequence[Weighted],
        name: str,
        combination_type: CombinationType,
        words: dict[str, Any],
    ) -> Shown:
        """Register a weighted sum, with `words` about it; its record with `recipe`."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


def split_reference(reference: str) -> tuple[str, str | None]:
    """NAME and what stands after an @, a version or an alias; None where there is no @."""
    name, at, which = reference.partition("@")
    return name, which if at else None


def read_words(path: Path) -> Provenance | None:
    """What a folder that was trained here says of itself; None for any other, or an archive.

    Raises:
        ConfigInvalid: its file is not as it is written here.
    """
    from adapters.training.provenance import read_provenance

    return read_provenance(path) if path.is_dir() else None


@contextmanager
def staged(path: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A fresh folder with the two files of a PEFT folder or an archive, and what was left out.

    Raises:
        CheckpointError: they are not there, or refused.
    """
    with tempfile.TemporaryDirectory(prefix="graftwork-") as work:
        directory = Path(work)
        yield directory, stage(path, directory)


def stage(path: Path, directory: Path) -> tuple[str, ...]:
    """Fill an empty folder from a PEFT folder or an archive. Returns the ignored names.

    Raises:
        CheckpointError: as `adapters.checkpoint.archive.stage_upload`, which uploads use too.
    """
    from adapters.checkpoint.archive import stage_upload

    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    return stage_upload([(file.name, file) for file in files], directory)


def download_to(place: AdapterPlace, reference: str, out: Path) -> Shown:
    """Write the PEFT folder of a version, or with a name that ends in .zip its zip; the record.

    It appears whole or not at all.

    Raises:
        FileExistsError: it is there already, and no empty folder.
    """
    if out.exists() and (out.suffix == ".zip" or not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            errno.EEXIST, "is there already; name a new one, or an empty folder", str(out)
        )
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    # Beside its place: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".graftwork-", dir=parent) as work:
        archive = Path(work) / "adapter.zip"
        record = place.download(reference, archive)
        if out.suffix == ".zip":
            os.replace(archive, out)
        else:
            folder = Path(work) / "folder"
            folder.mkdir()
            stage(archive, folder)
            os.replace(folder, out)
    return record


def require_data_dir(directory: Path) -> None:
    """Refuse a folder that no server and no command has made.

    Raises:
        RegistryError: it is not there, or something else.
    """
    if not directory.is_dir():
        raise RegistryError(
            f"there is no data directory {directory}; name another with --data-dir, or a running "
            "server with --url"
        )
    if not (directory / "registry.db").is_file():
        raise RegistryError(
            f"{directory} is no data directory: it holds no registry.db; name another with "
            "--data-dir, or a running server with --url"
        )
