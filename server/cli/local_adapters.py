"""The adapters of a data directory, for the command line: the registry, and the base they must fit.

Servers may run on the directory meanwhile. Knows no HTTP and prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterError
from server.cli.adapter_backends import Shown, Source, Weighted, require_data_dir, stage
from server.config.settings import Settings

if TYPE_CHECKING:
    from adapters.base_model import BaseModelSpec
    from adapters.combine import CombinationType
    from server.store.registry import AdapterRecord, Registry

_EVERY = 100_000


class DataDirectory:
    """The adapters of a data directory. Servers may run on it meanwhile.

    Args:
        settings: which, and the base that what is added must fit.
        create: make the directory if it is not there.

    Raises:
        RegistryError: there is no data directory, and none is to be made.
    """

    def __init__(self, settings: Settings, *, create: bool = False) -> None:
        from server.base.convert import read_manifest
        from server.store.registry import Registry

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
        from server.store.combining import combine_stored

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
        from adapters.checkpoint.folder import CONFIG_FILE, read_config

        try:
            return read_config(self._registry.blob_path(record.digest) / CONFIG_FILE)
        except (AdapterError, OSError):
            return None  # `status` says that the stored bytes are damaged


def _json(record: AdapterRecord) -> Shown:
    from server.api.adapters.versions import AdapterVersion

    return AdapterVersion.of(record).model_dump(by_alias=True)
