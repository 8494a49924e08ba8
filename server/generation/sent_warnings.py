"""Which warnings were sent to which callers, so that each is sent once. Knows nothing of their content."""

from __future__ import annotations


class SentWarnings:
    """Remembers the latest `most` warnings by key: what it was about, and the caller."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._seen: dict[tuple[str, ...], None] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def is_new(self, *key: str) -> bool:
        """Whether it has not been sent yet."""
        return key not in self._seen

    def add(self, *key: str) -> None:
        """Note that it was sent."""
        if len(self._seen) >= self._most:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None
