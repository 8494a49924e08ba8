"""11. Policies: `--batching per-adapter` beside mixed, and fairness between adapters.

Fairness: one adapter sends nine tenths of the load; the others' first tokens come nearly as soon as without
it. Without it means the others' requests alone, at the same times. An engine with more to do takes longer
for each step, whoever sends it: so the same load, sent by all adapters alike, is shown as well.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator

from server.engine.request import AdapterRef
from tests.benchmarks.items import Bench, w_asks
from tests.benchmarks.own import Ask, Own, rate_of
from tests.benchmarks.paired import Bar
from tests.benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, prompt

MIXED, PER_ADAPTER = "mixed batches", "a batch an adapter"
WITH, WITHOUT = "beside an adapter with 90 % of the load", "without it"
EVEN = "the same load, from all adapters alike"
# Requests whose first tokens are timed; seconds that the rest of the load is ahead of them; how much of W's
# rate is asked for in all, and who by.
_OTHERS = 12
_AHEAD = 2.0
_LOAD, _GREEDY_SHARE = 0.9, 0.9


def run(bench: Bench) -> None:
    """Both measures."""
    if not bench.is_done(11, "batching"):
        _batching(bench)
    if not bench.is_done(11, "fairness"):
        _fairness(bench)


def _batching(bench: Bench) -> None:
    mixed, alone = bench.own(batching="mixed"), bench.own(batching="per-adapter")
    refs = [adapter.ref for adapter in bench.adapters(mixed)]
    contestants = {
        name: rate_of(own, lambda _, own=own: w_asks(own, bench.concurrency, refs))  # type: ignore[misc]
        for name, own in ((MIXED, mixed), (PER_ADAPTER, alone))
    }
    for contestant in contestants.values():
        contestant(0)
    bench.compare(11, "batching", contestants, [Bar(MIXED, PER_ADAPTER)])
    mixed.close()
    alone.close()


def _fairness(bench: Bench) -> None:
    own = bench.own(max_running=bench.concurrency)
    refs = [adapter.ref for adapter in bench.adapters(own)]
    own.preload(refs)
    total = _LOAD * own.run(w_asks(own, bench.concurrency, refs)).rate / NEW_TOKENS
    others, greedy = (1 - _GREEDY_SHARE) * total, _GREEDY_SHARE * total
    contestants = {
        WITH: lambda number: first_tokens(own, refs, others, refs[:1], greedy, number),
        EVEN: lambda number: first_tokens(own, refs, others, refs[1:], greedy, number),
        WITHOUT: lambda number: first_tokens(own, refs, others, [], 0.0, number),
    }
    bars = [Bar(WITH, WITHOUT, 1.5, "at most"), Bar(WITH, EVEN)]
    unit = "ms to the first token"
    bench.compare(11, "fairness", contestants, bars, unit=unit)
    own.close()


def first_tokens(
    own: Own,
    refs: list[AdapterRef],
    rate: float,
    company: list[AdapterRef],
    company_rate: float,
    seed: int,
) -> float:
    """Median milliseconds to the first token of the others' requests.

    Args:
        own: the engine.
        refs: all adapters; the others are all but the first, in turn.
        rate: requests of the others a second, as a Poisson process.
        company: adapters of the rest of the load, in turn; they are not timed.
        company_rate: its requests a second, as another Poisson process.
        seed: of arrivals and prompts.
    """
    times = itertools.islice(_times(rate, seed), _OTHERS)
    timed = [(_AHEAD + at, refs[1 + i % (len(refs) - 1)], True) for i, at in enumerate(times)]
    until = timed[-1][0]
    beside = []
    for i, at in enumerate(_times(company_rate, -seed - 1) if company else []):
        if at > until:
            break
        beside.append((at, company[i % len(company)], False))
    arrivals = sorted(timed + beside, key=lambda arrival: arrival[0])
    began = time.perf_counter()
    submitted: dict[str, float] = {}
    waited: list[float] = []
    while len(waited) < _OTHERS:
        while arrivals and arrivals[0][0] <= time.perf_counter() - began:
            at, ref, is_timed = arrivals.pop(0)
            ids = prompt(PROMPT_TOKENS, own.spec.vocab_size, (seed, len(arrivals)))
            request_id = own.submit(Ask(ids, NEW_TOKENS, ref))
            if is_timed:
                submitted[request_id] = began + at
        if not own.engine.has_work:
            time.sleep(0.001)
            continue
        for request_id, token_at in own.step():
            if request_id in submitted:
                waited.append(token_at - submitted.pop(request_id))
    while own.engine.has_work:
        own.step()
    return 1000 * statistics.median(waited)


def _times(rate: float, seed: int) -> Iterator[float]:
    """Arrivals of a Poisson process, in seconds."""
    clock = random.Random(f"arrivals {seed}")
    at = 0.0
    while True:
        at += clock.expovariate(rate)
        yield at
