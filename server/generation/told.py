"""What has been said to whom, so that it is said once. Knows nothing of what it is."""

from __future__ import annotations


class Told:
    """Remembers what has been said to whom, the latest `most` of it."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._seen: dict[tuple[str, ...], None] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def is_new(self, *key: str) -> bool:
        """Whether this has not been said yet."""
        return key not in self._seen

    def add(self, *key: str) -> None:
        """It has been said now."""
        if len(self._seen) >= self._most:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None
