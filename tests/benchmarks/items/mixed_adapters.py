"""2. Mixed adapters cost little: W over the base alone, IA3 alone, and the base beside loaded adapters."""

from __future__ import annotations

from tests.benchmarks.items import Bench, w_asks
from tests.benchmarks.own import Ask, Own, rate_of
from tests.benchmarks.paired import Bar
from tests.benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, prompt

MIXED, IA3 = "mixed adapters", "IA3 alone"
BASE = "base only"
BASE_SAME = "base only, equal context"
LOADED, NONE_LOADED = "base only, adapters loaded", "base only, nothing loaded"
_MEASURE = "mixed"


def run(bench: Bench) -> None:
    """Engines with the adapters, and some that have never heard of any."""
    if bench.is_done(2, _MEASURE):
        return
    own, bare = bench.own(), bench.own(folders={})
    # Two engines of one process that are alike differed by 1.5 %, by where their memory lies. So there are
    # two pairs, the second made in the other order, and they take turns.
    spare, other = bench.own(folders={}), bench.own()
    loaded, empty = (own, other), (bare, spare)
    adapters = bench.adapters(own)
    refs = [adapter.ref for adapter in adapters]
    ia3 = [adapter.ref for adapter in adapters if adapter.method == "ia3"]
    c = bench.concurrency
    contestants = {
        MIXED: rate_of(own, lambda _: w_asks(own, c, refs)),
        IA3: rate_of(own, lambda _: w_asks(own, c, ia3)),
        BASE: rate_of(own, lambda _: w_asks(own, c, [None])),
        # Prompt tokens where the adapters have virtual ones. They are computed, virtual ones are not:
        # a little in favour of the adapters, so `base only` with a shorter context is reported too.
        BASE_SAME: rate_of(
            own, lambda _: equal_context(own, c, [a.num_virtual_tokens for a in adapters])
        ),
        LOADED: lambda number: loaded[number % 2].run(w_asks(own, c, [None])).rate,
        NONE_LOADED: lambda number: empty[number % 2].run(w_asks(own, c, [None])).rate,
    }
    other.run(w_asks(other, c, refs))
    for contestant in contestants.values():
        contestant(0)
        contestant(1)
    bars = [
        Bar(MIXED, BASE_SAME, 0.95),
        Bar(MIXED, BASE),
        Bar(IA3, BASE, 0.95),
        Bar(LOADED, NONE_LOADED, 0.99),
    ]
    bench.compare(2, _MEASURE, contestants, bars)
    for engine in (*loaded, *empty):
        engine.close()


def equal_context(own: Own, concurrency: int, virtual: list[int]) -> list[Ask]:
    """W for the base, each prompt longer by the virtual tokens that its turn would have."""
    return [
        Ask(
            prompt(PROMPT_TOKENS + virtual[index % len(virtual)], own.spec.vocab_size, index),
            NEW_TOKENS,
        )
        for index in range(concurrency)
    ]
