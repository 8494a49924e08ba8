"""Bounds the `adapter` label: the busiest N adapters get series of their own, the rest share `other`.

A name takes a free series immediately. When all are taken, a name with more than twice the recent
requests of the least busy holder (and at least `MIN_REQUESTS`) replaces it. Recent counts are halved
every `WINDOW` requests.

Counters never decrease. Requests before a name gets one are counted under `other`. The counters of a
name that loses its series are retained and resume if the name returns; meanwhile it counts under `other`.
Every series is therefore monotonic, and sums of rates are correct. Independent of Prometheus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

CountersT = TypeVar("CountersT")

OTHER = "other"
MIN_REQUESTS = 8
WINDOW = 1024
# Maximum retained counters; the oldest are dropped first, and their names would restart from zero.
MAX_ASIDE = 4096


class Series(Generic[CountersT]):
    """Where a name counts at present: read `counters` each time, it may change."""

    __slots__ = ("counters",)

    def __init__(self, counters: CountersT) -> None:
        self.counters = counters


class TopAdapters(Generic[CountersT]):
    """Counters by name.

    Args:
        limit: maximum names with counters of their own.
        new_counters: creates empty counters.
    """

    def __init__(self, limit: int, new_counters: Callable[[], CountersT]) -> None:
        self.other = Series(new_counters())
        self._limit = limit
        self._new_counters = new_counters
        self._series: dict[str, Series[CountersT]] = {}
        self._aside: dict[str, CountersT] = {}
        self._recent: Counter[str] = Counter()
        self._num_recent = 0

    def used(self, name: str) -> Series[CountersT]:
        """Count a use of a name and return its series; this may give it one of its own."""
        self._count(name)
        series = self._series.get(name)
        if series is not None:
            return series
        if name != OTHER and self._may_enter(name):
            series = self._series[name] = Series(
                self._aside.pop(name, None) or self._new_counters()
            )
            return series
        return self.other

    def find(self, name: str) -> Series[CountersT]:
        """The series of a name, without counting a use."""
        return self._series.get(name, self.other)

    def by_label(self) -> dict[str, CountersT]:
        """Counters by label: names with a series of their own, then `other`."""
        return {name: series.counters for name, series in self._series.items()} | {
            OTHER: self.other.counters
        }

    def _count(self, name: str) -> None:
        self._recent[name] += 1
        self._num_recent += 1
        if self._num_recent >= WINDOW:
            self._recent = Counter({n: half for n, c in self._recent.items() if (half := c // 2)})
            self._num_recent = self._recent.total()

    def _may_enter(self, name: str) -> bool:
        if len(self._series) < self._limit:
            return True
        recent = self._recent[name]
        if not self._series or recent < MIN_REQUESTS:
            return False
        quietest = min(self._series, key=lambda holder: self._recent[holder])
        if recent <= 2 * self._recent[quietest]:
            return False
        self._put_aside(quietest)
        return True

    def _put_aside(self, name: str) -> None:
        series = self._series.pop(name)
        self._aside[name] = series.counters
        if len(self._aside) > MAX_ASIDE:
            del self._aside[next(iter(self._aside))]
        series.counters = self.other.counters  # for its requests in progress
