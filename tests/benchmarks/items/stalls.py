"""8. Long prompts do not stall others: the largest gap between two tokens of a stream while one arrives.

What that costs the long prompt is shown beside it: how long it takes among the streams, and alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import cache

from server.engine.request import AdapterRef
from tests.benchmarks.book import fact
from tests.benchmarks.items import Bench
from tests.benchmarks.own import Ask, Own
from tests.benchmarks.paired import Bar
from tests.benchmarks.workload import PROMPT_TOKENS, prompt

LARGEST, MEDIAN = "largest gap while it is read", "median gap before"
_STREAMS, _LONG = 16, 2000
_STEPS_BEFORE = 40


def run(bench: Bench) -> None:
    """16 streams of mixed adapters; the long prompt is the base's."""
    if bench.is_done(8, "stalls"):
        return
    own = bench.own()
    refs = [adapter.ref for adapter in bench.adapters(own)]
    own.preload(refs)

    @cache  # one run has all figures of a round
    def gaps_of(number: int) -> tuple[float, float, float]:
        return gaps(own, refs, number)

    gaps_of(-1)
    contestants = {
        LARGEST: lambda number: 1000 * gaps_of(number)[1],
        MEDIAN: lambda number: 1000 * gaps_of(number)[0],
    }
    bench.compare(8, "stalls", contestants, [Bar(LARGEST, MEDIAN, 3.0, "at most")], unit="ms")
    alone = [
        own.run([Ask(prompt(_LONG, own.spec.vocab_size, number), 1)]).first_token_seconds
        for number in range(bench.rounds)
    ]
    among = [gaps_of(number)[2] for number in range(bench.rounds)]
    facts = [
        fact(f"first token of the {_LONG}, {_STREAMS} streams", _ms(among), "ms"),
        fact(f"first token of the {_LONG}, alone", _ms(alone), "ms"),
    ]
    bench.book.put(8, "the long prompt", {"facts": facts, "rounds": bench.rounds})
    own.close()


def _ms(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


def gaps(own: Own, refs: list[AdapterRef], seed: int) -> tuple[float, float, float]:
    """Seconds between two tokens of a stream, and to the long prompt's first token.

    Returns:
        The median gap before, the largest during, and how long the long prompt took.
    """
    last: dict[str, float] = {}
    for index in range(_STREAMS):
        ids = prompt(PROMPT_TOKENS, own.spec.vocab_size, (seed, index))
        last[own.submit(Ask(ids, 2000, refs[index % len(refs)]))] = 0.0
    while not all(last.values()):
        last.update(own.step())
    before = []
    for _ in range(_STEPS_BEFORE):
        before += _step(own, last)
    began = time.perf_counter()
    long = own.submit(Ask(prompt(_LONG, own.spec.vocab_size, seed), 1))
    during: list[float] = []
    last_of_long: dict[str, float] = {}
    while not last_of_long:
        during += _step(own, last, last_of_long, long)
    for request_id in last:
        own.engine.abort(request_id)
    while own.engine.has_work:
        own.step()
    return statistics.median(before), max(during), last_of_long[long] - began


def _step(
    own: Own,
    last: dict[str, float],
    others: dict[str, float] | None = None,
    other: str = "",
) -> list[float]:
    """Gaps that end with this step."""
    found = []
    for request_id, at in own.step():
        if request_id == other and others is not None:
            others[request_id] = at
            continue
        found.append(at - last[request_id])
        last[request_id] = at
    return found
