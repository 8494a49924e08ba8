"""Requests by adapter since the server's start, for `GET /adapters`. Independent of HTTP and Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass
class AdapterUse:
    """What was asked of one adapter.

    Attributes:
        requests: requests of any route that passed every check; a request of many prompts counts once.
        labels_ranked: labels that `/classify` ranked, for each input.
        last_used_at: when the last of them began, in aware UTC time; None if there was none.
    """

    requests: int = 0
    labels_ranked: int = 0
    last_used_at: datetime | None = None


class UseByAdapter:
    """The use of every adapter by name; all versions of a name count together."""

    def __init__(self) -> None:
        self._uses: dict[str, AdapterUse] = {}

    def __len__(self) -> int:
        return len(self._uses)

    def __getitem__(self, name: str) -> AdapterUse:
        """The use of a name; of one that was not used, zeros."""
        return self._uses.get(name) or AdapterUse()

    def count(self, name: str, *, labels_ranked: int = 0) -> None:
        """Count one request."""
        use = self._uses.setdefault(name, AdapterUse())
        use.requests += 1
        use.labels_ranked += labels_ranked
        use.last_used_at = datetime.now(UTC)

    def names(self) -> tuple[str, ...]:
        """Names that were used."""
        return tuple(self._uses)

    def forget(self, names: Iterable[str]) -> None:
        """Drop names whose last version was deleted."""
        for name in names:
            self._uses.pop(name, None)
