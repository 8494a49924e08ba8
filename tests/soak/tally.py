"""What the clients saw: outcomes by kind, replies by route, and every fault.

Knows neither HTTP nor what is asked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MAX_FAULTS_KEPT = 50

Route = tuple[str, str]


@dataclass
class Tally:
    """The clients' books.

    Attributes:
        outcomes: by kind of request and how it ended.
        sent: requests by method and route.
        replies: replies that began, by method, route and status.
        left: requests whose client went before a reply began, by method and route.
        sequences: samples that ended by themselves, as far as clients know.
        tokens: tokens that clients were told of, in replies that are whole.
        compared: answers held to the solo answer.
        num_faults: what must not be.
        faults: the first of them, in words.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: Counter[Route] = field(default_factory=Counter)
    replies: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    left: Counter[Route] = field(default_factory=Counter)
    sequences: int = 0
    tokens: int = 0
    compared: int = 0
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)

    def fault(self, kind: str, what: Any) -> None:
        """Note something that must not be."""
        self.num_faults += 1
        self.outcomes[kind, "FAULT"] += 1
        if len(self.faults) < MAX_FAULTS_KEPT:
            self.faults.append(f"{kind}: {str(what)[:600]}")

    def table(self) -> list[str]:
        """Kinds and outcomes, a line each kind."""
        kinds = sorted({kind for kind, _ in self.outcomes})
        lines = []
        for kind in kinds:
            of_kind = {how: n for (k, how), n in sorted(self.outcomes.items()) if k == kind}
            words = ", ".join(f"{how} {number}" for how, number in of_kind.items())
            lines.append(f"{kind:24} {sum(of_kind.values()):7}   {words}")
        return lines
