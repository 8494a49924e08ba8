"""Bounds the `adapter` label: the busiest N adapters get series of their own, the rest share `other`.

A name takes a free slot immediately. When all slots are taken, a name with more than twice the recent
requests of the least busy holder (and at least `MIN_REQUESTS`) replaces it. Recent counts are halved
every `WINDOW` requests.

Counters never decrease. Requests before a name gets a slot are counted under `other`. The counters of a
name that loses its slot are retained and resume if the name returns; meanwhile it counts under `other`.
Every series is therefore monotonic, and sums of rates are correct. Independent of Prometheus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

BookT = TypeVar("BookT")

OTHER = "other"
MIN_REQUESTS = 8
WINDOW = 1024
# Maximum retained counters; the oldest are dropped first, and their names would restart from zero.
MAX_ASIDE = 4096


class Place(Generic[BookT]):
    """The slot a name currently counts in: read `book` each time, it may change."""

    __slots__ = ("book",)

    def __init__(self, book: BookT) -> None:
        self.book = book


class Busiest(Generic[BookT]):
    """Counters by name.

    Args:
        limit: maximum names with counters of their own.
        new_book: creates empty counters.
    """

    def __init__(self, limit: int, new_book: Callable[[], BookT]) -> None:
        self.other = Place(new_book())
        self._limit = limit
        self._new_book = new_book
        self._places: dict[str, Place[BookT]] = {}
        self._aside: dict[str, BookT] = {}
        self._recent: Counter[str] = Counter()
        self._num_recent = 0

    def used(self, name: str) -> Place[BookT]:
        """Count a use of a name and return its slot; this may assign it one."""
        self._count(name)
        place = self._places.get(name)
        if place is not None:
            return place
        if name != OTHER and self._may_enter(name):
            place = self._places[name] = Place(self._aside.pop(name, None) or self._new_book())
            return place
        return self.other

    def find(self, name: str) -> Place[BookT]:
        """The slot of a name, without counting a use."""
        return self._places.get(name, self.other)

    def books(self) -> dict[str, BookT]:
        """Counters by label: names with a slot, then `other`."""
        return {name: place.book for name, place in self._places.items()} | {OTHER: self.other.book}

    def _count(self, name: str) -> None:
        self._recent[name] += 1
        self._num_recent += 1
        if self._num_recent >= WINDOW:
            self._recent = Counter({n: half for n, c in self._recent.items() if (half := c // 2)})
            self._num_recent = self._recent.total()

    def _may_enter(self, name: str) -> bool:
        if len(self._places) < self._limit:
            return True
        recent = self._recent[name]
        if not self._places or recent < MIN_REQUESTS:
            return False
        quietest = min(self._places, key=lambda holder: self._recent[holder])
        if recent <= 2 * self._recent[quietest]:
            return False
        self._put_aside(quietest)
        return True

    def _put_aside(self, name: str) -> None:
        place = self._places.pop(name)
        self._aside[name] = place.book
        if len(self._aside) > MAX_ASIDE:
            del self._aside[next(iter(self._aside))]
        place.book = self.other.book  # for its requests in progress
