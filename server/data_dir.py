"""Whether a data directory can be used at all, asked before anything is loaded.

A server that cannot write there would find out at its first upload. Knows nothing of what lies in it.
"""

from __future__ import annotations

from pathlib import Path

from adapters.errors import AdapterError, StorageUnavailable
from adapters.registry import Registry


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
