"""Adapters that a command line names: in the data directory, or as PEFT folders.

Finds their files and their stored metadata. Independent of the engine; prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterNotFound, BaseMismatch
from server.config.settings import Settings

if TYPE_CHECKING:
    from adapters.base_model import BaseModelSpec
    from server.store.registry import Registry

# Metadata about how rows become prompts and labels; each is an option of `graftwork eval` as well.
RENDERING = (
    "template",
    "target",
    "labels",
    "label_names",
    "target_separator",
    "append_eos",
    "tokenization",
)


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter that is on this machine.

    Attributes:
        given: as it stands on the command line.
        name: its name in the output, NAME@VERSION or the folder.
        directory: where its two files are.
        metadata: stored with it, of `RENDERING`, `max_length` and `on_too_long`.
        base_digest: of the base that it was trained on here.
    """

    given: str
    name: str
    directory: Path
    metadata: dict[str, Any]
    base_digest: str | None


def find_adapters(names: Sequence[str], settings: Settings) -> list[FoundAdapter]:
    """Find adapters by name in the data directory, or as PEFT folders; in their order.

    Raises:
        AdapterNotFound: neither an adapter of the data directory nor a folder.
        AdapterCorrupt, ConfigInvalid: it is there, and damaged.
    """
    from server.store.registry import Registry

    with ExitStack() as stack:
        registry = None
        if (settings.data_dir / "registry.db").is_file():
            registry = Registry(settings.data_dir)
            stack.callback(registry.close)
        return [_find_one(name, registry, settings) for name in names]


def _find_one(given: str, registry: Registry | None, settings: Settings) -> FoundAdapter:
    """A name of the data directory first; what has a slash is a folder."""
    if registry is not None and "/" not in given:
        try:
            return _stored(given, registry)
        except AdapterNotFound:
            if not Path(given).is_dir():
                raise
    directory = Path(given)
    if not directory.is_dir():
        raise AdapterNotFound(
            f"{given}: expected an adapter in {settings.data_dir} or a PEFT folder; there is neither"
        )
    return _folder(given, directory)


def _stored(given: str, registry: Registry) -> FoundAdapter:
    record = registry.resolve(given)
    from_recipe = ("target", "label_names", "max_length", "on_too_long")
    metadata: dict[str, Any] = {name: (record.recipe or {}).get(name) for name in from_recipe}
    metadata |= {
        "template": record.template,
        "labels": None if record.labels is None else list(record.labels),
        "target_separator": record.target_separator,
        "append_eos": bool(record.append_eos),
        "tokenization": record.tokenization,
    }
    return FoundAdapter(
        given,
        f"{record.name}@{record.version}",
        registry.blob_path(record.digest),
        metadata,
        record.base_digest,
    )


def _folder(given: str, directory: Path) -> FoundAdapter:
    from adapters.training.provenance import read_provenance

    provenance = read_provenance(directory)
    if provenance is None:
        return FoundAdapter(given, given, directory, {}, None)
    job = provenance.job.model_dump()
    metadata = {name: job[name] for name in (*RENDERING, "max_length", "on_too_long")}
    return FoundAdapter(given, given, directory, metadata, job["base_digest"])


def require_base(found: FoundAdapter, base: BaseModelSpec) -> None:
    """Refuse an adapter that was trained here on another base.

    Raises:
        BaseMismatch: it was.
    """
    if found.base_digest not in (None, base.digest):
        raise BaseMismatch(
            f"{found.name} was trained on another base (digest {str(found.base_digest)[:12]}) than this "
            f"one ({base.digest[:12]}); name its base with --base",
            field="base_digest",
            expected=found.base_digest,
            came=base.digest,
        )
