"""The two places where the command line finds adapters: a data directory, or a running server.

    AdapterPlace        what both can do, in the JSON of `GET /adapters`
    |-- DataDirectory   the registry itself; no engine, so nothing is ever on a device
    `-- RunningServer   the routes under /adapters

Raises the library's errors, `ServerRefused` and OSError; prints nothing.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    BaseMismatch,
    RegistryError,
    VersionNotFound,
)
from server.remote import RemoteServer, is_segment
from server.settings import Settings

if TYPE_CHECKING:
    from adapters.base_model import BaseModelSpec
    from adapters.combine import CombinationType
    from adapters.registry import AdapterRecord, Registry
    from server.provenance import Provenance

Shown = dict[str, Any]

# What an upload's form has a field for, of the words that a folder brings along.
_FORM_WORDS = (
    "description",
    "template",
    "labels",
    "target_separator",
    "append_eos",
    "tokenization",
)
_PAGE = 1000
_EVERY = 100_000


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
    from server.provenance import read_provenance

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
    """Fill an empty folder from a PEFT folder or an archive; the names that were left out.

    Raises:
        CheckpointError: as `adapters.archive.stage_upload`, the same door as an upload's.
    """
    from adapters.archive import stage_upload

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


class DataDirectory:
    """The adapters of a data directory. Servers may run on it meanwhile.

    Args:
        settings: which, and the base that what is added must fit.
        create: make the directory if it is not there.

    Raises:
        RegistryError: there is no data directory, and none is to be made.
    """

    def __init__(self, settings: Settings, *, create: bool = False) -> None:
        from adapters.registry import Registry
        from server.base.convert import read_manifest

        self._settings = settings
        if create:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
        else:
            require_data_dir(settings.data_dir)
        manifest = read_manifest(Path(settings.base)) or {}
        self._base_id = settings.base_name or str(manifest.get("name") or settings.base_id)
        self._registry: Registry = Registry(settings.data_dir, reserved=(self._base_id,))
        self._spec: BaseModelSpec | None = None

    def close(self) -> None:
        """Close the database."""
        self._registry.close()

    def list(self) -> list[Shown]:
        """See `AdapterPlace`."""
        return [_json(record) for record in self._registry.list(limit=_EVERY)]

    def show(self, reference: str) -> Shown:
        """See `AdapterPlace`."""
        record = self._registry.lookup(reference)
        versions = self._registry.versions(record.name)
        return {
            **_json(record),
            "recipe": record.recipe,
            "config": self._config(record),
            "versions": [{**_json(one), "recipe": one.recipe} for one in versions],
        }

    def add(self, source: Source) -> Shown:
        """See `AdapterPlace`.

        Raises:
            BaseUnsupported: the base cannot be read, so that nothing can be held against it.
        """
        spec = self.spec()
        with self._registry.staging_dir() as directory:
            ignored = stage(source.path, directory)
            published = self._registry.publish(
                source.name,
                directory,
                spec,
                base_names=(self._base_id, self._settings.base),
                **source.words,
            )
        return {
            **_json(published.record),
            "created": published.created,
            "ignored_files": [*ignored],
        }

    def remove(self, name: str, version: int | None) -> Shown:
        """See `AdapterPlace`."""
        versions = self._registry.versions(name)
        self._registry.delete(name, version)
        gone = [one.version for one in versions if version in (None, one.version)]
        return {"name": name, "deleted_versions": gone}

    def rollback(self, name: str, version: int) -> Shown:
        """See `AdapterPlace`."""
        return _json(self._registry.rollback(name, version))

    def set_alias(self, name: str, alias: str, version: int) -> Shown:
        """See `AdapterPlace`."""
        return _json(self._registry.set_alias(name, alias, version))

    def download(self, reference: str, target: Path) -> Shown:
        """See `AdapterPlace`."""
        record = self._registry.resolve(reference)
        with target.open("xb") as file:
            for block in self._registry.download_zip(record.name, record.version):
                file.write(block)
        return _json(record)

    def combine(
        self,
        parts: Sequence[Weighted],
        name: str,
        combination_type: CombinationType,
        words: dict[str, Any],
    ) -> Shown:
        """See `AdapterPlace`."""
        from server.combining import combine_stored

        published = combine_stored(
            self._registry,
            self.spec(),
            [part.reference for part in parts],
            [part.weight for part in parts],
            name,
            combination_type=combination_type,
            words=words,
            base_names=(self._base_id, self._settings.base),
        )
        return {**_json(published.record), "recipe": published.record.recipe}

    def spec(self) -> BaseModelSpec:
        """The base that adapters must fit, read once.

        Raises:
            BaseUnsupported: it cannot be read.
        """
        if self._spec is None:
            from server.base.load import describe_base

            self._spec = describe_base(self._settings.base, revision=self._settings.revision)
        return self._spec

    def _config(self, record: AdapterRecord) -> dict[str, Any] | None:
        from adapters.checkpoint import CONFIG_FILE, read_config

        try:
            return read_config(self._registry.blob_path(record.digest) / CONFIG_FILE)
        except (AdapterError, OSError):
            return None  # `status` says that the stored bytes are damaged


class RunningServer:
    """The adapters of a running server.

    Args:
        server: closed together with this.
    """

    def __init__(self, server: RemoteServer) -> None:
        self._server = server

    def close(self) -> None:
        """Close all connections."""
        self._server.close()

    def list(self) -> list[Shown]:
        """See `AdapterPlace`."""
        found: list[Shown] = []
        while True:
            page = self._server.get("/adapters", offset=len(found), limit=_PAGE)
            found += page["adapters"]
            if not page["adapters"] or len(found) >= page["total"]:
                return found

    def show(self, reference: str) -> Shown:
        """See `AdapterPlace`; `counters` too, and no `config` of a version that is not default."""
        name, which = split_reference(reference)
        shown: Shown = self._server.get(_path(name))
        if which is None:
            return shown
        for one in shown["versions"]:
            if which in (str(one["version"]), *one["aliases"]):
                config = shown["config"] if one["is_default"] else None
                return {**shown, **one, "config": config}
        raise VersionNotFound(f"adapter {name!r} has no version or alias {which!r}")

    def add(self, source: Source) -> Shown:
        """See `AdapterPlace`.

        Raises:
            BaseMismatch: it was trained here on another base than the server's.
        """
        self._require_base(source.words.get("base_digest"))
        with staged(source.path) as (directory, ignored):
            files = [("files", file.name, file) for file in sorted(directory.iterdir())]
            fields = {"name": source.name, **_form(source.words)}
            status, shown = self._server.upload("/adapters", fields, files)
        return {**shown, "created": status == 201, "ignored_files": [*ignored]}

    def remove(self, name: str, version: int | None) -> Shown:
        """See `AdapterPlace`."""
        gone: Shown = self._server.delete(_path(name), version=version)
        return gone

    def rollback(self, name: str, version: int) -> Shown:
        """See `AdapterPlace`."""
        shown: Shown = self._server.post(f"{_path(name)}/rollback", {"version": version})
        return shown

    def set_alias(self, name: str, alias: str, version: int) -> Shown:
        """See `AdapterPlace`."""
        route = f"{_path(name)}/aliases/{quote(alias, safe='')}"
        shown: Shown = self._server.put(route, {"version": version})
        return shown

    def download(self, reference: str, target: Path) -> Shown:
        """See `AdapterPlace`."""
        shown = self.show(reference)
        route = f"{_path(shown['name'])}/download"
        self._server.download(route, target, version=shown["version"])
        return shown

    def combine(
        self,
        parts: Sequence[Weighted],
        name: str,
        combination_type: CombinationType,
        words: dict[str, Any],
    ) -> Shown:
        """See `AdapterPlace`."""
        body = {
            **words,
            "adapters": [part.reference for part in parts],
            "weights": [part.weight for part in parts],
            "name": name,
            "combination_type": combination_type,
        }
        shown: Shown = self._server.post("/adapters/combine", body)
        return shown

    def move(self, reference: str, where: str) -> Shown:
        """Bring an adapter to the device ("preload") or let it leave ("unload"); its record."""
        name, which = split_reference(reference)
        version = None if which is None else self.show(reference)["version"]
        shown: Shown = self._server.post(f"{_path(name)}/{where}", version=version)
        return shown

    def _require_base(self, digest: str | None) -> None:
        if digest is None:
            return
        served = self._server.get("/info")["base"]["digest"]
        if served != digest:
            raise BaseMismatch(
                f"the adapter was trained on base {digest}, {served} is served there",
                field="base_digest",
                expected=served,
                came=digest,
            )


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


def _path(name: str) -> str:
    if not is_segment(name):
        raise AdapterNotFound(f"there is no adapter {name!r}", field="adapter", came=name)
    return f"/adapters/{quote(name, safe='')}"


def _form(words: dict[str, Any]) -> dict[str, str]:
    """Words as form fields: texts as they are, the others as JSON."""
    return {
        name: words[name] if isinstance(words[name], str) else json.dumps(words[name])
        for name in _FORM_WORDS
        if words.get(name) is not None
    }


def _json(record: AdapterRecord) -> Shown:
    from server.api.adapters import record_json

    return record_json(record)
