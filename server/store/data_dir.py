"""A data directory as a whole, at the start: can it be used, and which folds in it are stale.

A server that cannot write there would find out at its first upload.
"""

from __future__ import annotations

from pathlib import Path

from adapters.errors import AdapterError, StorageUnavailable
from server.store.registry import Registry


def require_writable(directory: Path) -> None:
    """Make a data directory if it is not there, and try it out.

    Raises:
        StorageUnavailable: it cannot be made, written or opened, with the reason and its path.
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
    """Remove folded prompts of adapters that are gone, and halves of files; how many there were.

    A fold is named <digest>-<base>-<dtype>.safetensors. The engine makes it again where it is missed.
    """
    removed = 0
    for path in (directory / "folds").glob("*"):
        digest = path.name.partition("-")[0]
        try:
            stale = path.suffix == ".tmp" or not registry.blob_path(digest).exists()
        except ValueError:  # not named by us, and not ours to remove
            continue
        if stale:
            path.unlink(missing_ok=True)
            removed += 1
    return removed
