"""Deficit round robin: whose turn it is, if the cost of a turn is known only afterwards.

Plain numbers and keys. It does not know what a step, a sequence or an adapter is.
"""

from __future__ import annotations

from collections.abc import Iterable


class RoundRobin:
    """Keys that take turns, each worth `quantum` tokens.

    A visit gives a key its quantum; it is served once if that leaves it anything, whatever it then
    costs. Who spent more than was there is passed by until its visits have paid for it. What is
    not spent is kept, up to one quantum. A new key joins at the end with no credit.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._credit: dict[str | None, int] = {}  # in rotation

    def order(self, present: Iterable[str | None]) -> list[str | None]:
        """Those present, in the order in which they may be served; the others are forgotten."""
        wanted = dict.fromkeys(present)
        kept = {key: credit for key, credit in self._credit.items() if key in wanted}
        self._credit = kept | {key: 0 for key in wanted if key not in kept}
        return sorted(self._credit, key=self._visits)

    def served(self, key: str | None, cost: int) -> None:
        """`key`, one of those of the last `order`, spent `cost` tokens."""
        visits = self._visits(key)
        for other, credit in self._credit.items():
            self._credit[other] = min(credit + visits * self._quantum, self._quantum)
            if other == key:
                visits -= 1  # those behind it have not been visited in this round
        self._credit[key] = self._credit.pop(key) - cost

    def _visits(self, key: str | None) -> int:
        """Visits until `key` may be served."""
        return max(1, -self._credit[key] // self._quantum + 1)
