"""Startup checks of a data directory: whether it is writable, and which folds in it are stale.

Without the check, a read-only directory would fail only at the first upload.
"""

from __future__ import annotations

from pathlib import Path

from adapters.errors import AdapterError, StorageUnavailable
from server.store.registry import Registry


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
