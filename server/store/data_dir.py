"""Startup checks of a data directory: whether it is writable, who else serves it, which folds are stale.

Without the first, a read-only directory would fail only at the first upload. A server holds a folder in
`serving/` that says which base it serves: two bases on one directory would refuse each other's adapters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.errors import AdapterError, StorageUnavailable
from server.store.registry import Registry
from server.store.staging import StagingArea

_SERVER_FILE = "server.json"


@dataclass(frozen=True)
class ServerMark:
    """What a server says of itself to others on its data directory.

    Attributes:
        base: the name of its base.
        digest: of its base, hex.
        pid: its process.
    """

    base: str
    digest: str
    pid: int


@contextmanager
def held_by_server(directory: Path, base: str, digest: str) -> Iterator[list[ServerMark]]:
    """Hold a data directory as a server of a base; yields the others that hold it, of the same base.

    Raises:
        StorageUnavailable: a live server of another base holds it.
        StorageFull: the disk takes no mark.
    """
    area = StagingArea(directory, "serving")
    area.sweep()
    with area.folder() as mine:
        mark = ServerMark(base, digest, os.getpid())
        (mine / _SERVER_FILE).write_text(json.dumps(asdict(mark)), "utf-8")
        # After the mark: of two that start at once, none misses the other.
        others = _live_servers(area, mine)
        for one in others:
            if one.digest != digest:
                raise StorageUnavailable(
                    f"a server of another base, {one.base} ({one.digest[:12]}), process {one.pid}, uses "
                    f"the data directory {directory}; this one serves {base} ({digest[:12]}): end that "
                    "server, or give this one a directory of its own with --data-dir",
                    field="data_dir",
                    expected="a data directory that no server of another base uses",
                    came=one.base,
                )
        yield others


def _live_servers(area: StagingArea, mine: Path) -> list[ServerMark]:
    found = []
    for entry in sorted(area.path.iterdir()):
        if entry == mine or area.is_abandoned(entry.name):
            continue
        with suppress(OSError, ValueError, TypeError):  # it has just ended, or just begun
            found.append(ServerMark(**json.loads((entry / _SERVER_FILE).read_text("utf-8"))))
    return found


def require_writable(directory: Path) -> None:
    """Create a data directory if it does not exist, and check that it is usable.

    Raises:
        StorageUnavailable: it cannot be created, written or opened; with the reason and the path.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        registry = Registry(directory)
        try:
            with registry.staging_dir():
                pass
        finally:
            registry.close()
    except (AdapterError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageUnavailable(
            f"the data directory {directory} cannot be used: {reason}",
            field="data_dir",
            expected="a directory that can be written",
        ) from error


def sweep_folds(directory: Path, registry: Registry) -> int:
    """Remove folded prompts of deleted adapters, and partial files. Returns the number removed.

    A fold is named <digest>-<base>-<dtype>.safetensors. The engine recreates a missing fold.
    """
    removed = 0
    for path in (directory / "folds").glob("*"):
        digest = path.name.partition("-")[0]
        try:
            stale = path.suffix == ".tmp" or not registry.blob_path(digest).exists()
        except ValueError:  # not our naming scheme: leave it
            continue
        if stale:
            path.unlink(missing_ok=True)
            removed += 1
    return removed
