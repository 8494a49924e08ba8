"""6. Prompts that repeat are free too: the first token of a request whose beginning was computed before."""

from __future__ import annotations

import statistics

from server.engine.request import AdapterRef
from tests.benchmarks.book import fact
from tests.benchmarks.items import Bench
from tests.benchmarks.own import Ask, Own
from tests.benchmarks.paired import Bar, Contestant
from tests.benchmarks.workload import prompt

_BEGINNING, _OWN_TOKENS = 400, 16
_REPEATS = 5


def run(bench: Bench) -> None:
    """For the base and for an adapter with virtual tokens."""
    if bench.is_done(6, "kept prompts"):
        return
    own = bench.own(prefix_caching=True)
    cpt = next(adapter for adapter in bench.adapters(own) if adapter.method == "cpt")
    own.preload([cpt.ref])
    contestants: dict[str, Contestant] = {}
    bars = []
    for name, ref in (("base", None), ("CPT", cpt.ref)):
        pair = Pair(own, name, ref)
        contestants[f"first, {name}"] = pair.first
        contestants[f"second, {name}"] = pair.second
        bars.append(Bar(f"second, {name}", f"first, {name}", 0.35, "at most"))
    for contestant in contestants.values():
        contestant(-1)
    unit = f"ms to the first token, the same {_BEGINNING} tokens first"
    bench.compare(6, "kept prompts", contestants, bars, unit=unit)
    stats = own.engine.stats()
    found = bench.book.get(6, "kept prompts") or {}
    share = stats.prefix_hit_tokens / stats.prefix_query_tokens
    facts = [fact("prompt tokens found in the cache", share, "of all prompt tokens")]
    bench.book.put(6, "kept prompts", {**found, "facts": facts})
    own.close()


class Pair:
    """Requests that begin as an earlier one did, and such earlier ones."""

    def __init__(self, own: Own, name: str, ref: AdapterRef | None) -> None:
        self._own, self._name, self._ref = own, name, ref
        self._beginnings: list[list[int]] = []
        self._asked = 0

    def first(self, number: int) -> float:
        """Milliseconds to the first token behind beginnings that nobody has sent."""
        self._beginnings = [self._new(_BEGINNING) for _ in range(_REPEATS)]
        return self._measure()

    def second(self, number: int) -> float:
        """Behind the beginnings of the last `first`."""
        if not self._beginnings:
            self.first(number)
        return self._measure()

    def _measure(self) -> float:
        asks = [
            Ask(beginning + self._new(_OWN_TOKENS), 1, self._ref) for beginning in self._beginnings
        ]
        return 1000 * statistics.median(self._own.run([ask]).first_token_seconds for ask in asks)

    def _new(self, length: int) -> list[int]:
        self._asked += 1
        return prompt(length, self._own.spec.vocab_size, (self._name, self._asked))
