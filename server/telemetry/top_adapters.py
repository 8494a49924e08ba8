"""Which adapters have books of their own in the metrics, so that their number stays bounded.

At most `limit` names at a time; the others share one book under `other`. A name takes a free place at
once. When all are taken, one that had more than twice the recent requests of the quietest holder (and
at least `MIN_REQUESTS`) takes its place. Recent counts are halved every `WINDOW` requests.

No counter ever goes backwards. What a name did before it had a place stays in `other`. The book of a
name that loses its place is put aside, and goes on from there if the name comes back; in between it
counts under `other`. So every series only grows, and sums of rates are right. Knows no Prometheus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

BookT = TypeVar("BookT")

OTHER = "other"
MIN_REQUESTS = 8
WINDOW = 1024
# Books put aside at most; the oldest goes first, and its name would begin again from nothing.
MAX_ASIDE = 4096


class Place(Generic[BookT]):
    """Where a name counts now: ask for `book` each time, it may change."""

    __slots__ = ("book",)

    def __init__(self, book: BookT) -> None:
        self.book = book


class Busiest(Generic[BookT]):
    """The books, by name.

    Args:
        limit: names with a book of their own at a time.
        new_book: makes an empty book.
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
        """The place of a name that has just been asked for; this may give it one."""
        self._count(name)
        place = self._places.get(name)
        if place is not None:
            return place
        if name != OTHER and self._may_enter(name):
            place = self._places[name] = Place(self._aside.pop(name, None) or self._new_book())
            return place
        return self.other

    def find(self, name: str) -> Place[BookT]:
        """The place of a name, without counting this as a use."""
        return self._places.get(name, self.other)

    def books(self) -> dict[str, BookT]:
        """Every book with its label: those who hold a place, then `other`."""
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
        place.book = self.other.book  # requests of it that still run
