"""3. Traffic of mixed lengths that comes as a Poisson process; sampling in place of greedy.

W' is measured over a stretch in which c requests always run: it begins once as many as run at a time have
ended, so that no start and no end of the load is in it. Arrivals are a little faster than what can be
served: rows never wait for requests. Beside it stands W of equal totals: c requests at once with the mean
lengths of all that were sent (those that ended in the stretch are the long ones of its beginning).
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field
from functools import cache

from server.engine.request import AdapterRef
from tests.benchmarks.items import Bench, w_asks
from tests.benchmarks.own import Ask, Own, rate_of
from tests.benchmarks.paired import Bar
from tests.benchmarks.workload import Lengths, mixed_lengths, prompt

W_MIXED, W_EQUAL = "W', mixed lengths", "W of equal totals"
SAMPLED, GREEDY = "temperature 0.8, top_p 0.95, 5 log-probabilities", "greedy"
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "num_logprobs": 5}
# Arrivals a second over what can be served: rows never wait for requests.
_OVERLOAD = 1.15
_MEASURED = 2  # requests that end in the stretch, in multiples of c


def run(bench: Bench) -> None:
    """Both comparisons."""
    own = bench.own(max_running=bench.concurrency)
    refs = [adapter.ref for adapter in bench.adapters(own)]
    own.preload(refs)
    if not bench.is_done(3, "sampling"):
        c = bench.concurrency
        contestants = {
            SAMPLED: rate_of(own, lambda _: w_asks(own, c, refs, _SAMPLING)),
            GREEDY: rate_of(own, lambda _: w_asks(own, c, refs)),
        }
        for contestant in contestants.values():
            contestant(0)
        bench.compare(3, "sampling", contestants, [Bar(SAMPLED, GREEDY, 0.85)])
    if not bench.is_done(3, "traffic"):
        _traffic(bench, own, refs)
    own.close()


def _traffic(bench: Bench, own: Own, refs: list[AdapterRef]) -> None:
    c = bench.concurrency
    pace = Traffic(own, refs, c, seed=-1).run(arrivals=float("inf")).requests_per_second

    @cache  # whoever is the first of a round: the other one needs its lengths
    def stretch(number: int) -> Stretch:
        return Traffic(own, refs, c, seed=number).run(arrivals=_OVERLOAD * pace)

    contestants = {
        W_MIXED: lambda number: stretch(number).rate,
        W_EQUAL: lambda number: _equal_totals(own, refs, c, stretch(number)),
    }
    for contestant in contestants.values():
        contestant(-2)
    bench.compare(3, "traffic", contestants, [Bar(W_MIXED, W_EQUAL, 0.8)])


def _equal_totals(own: Own, refs: list[AdapterRef], c: int, stretch: Stretch) -> float:
    prompt_length = round(statistics.mean(lengths.prompt for lengths in stretch.sent))
    new = round(statistics.mean(lengths.new for lengths in stretch.sent))
    tokens, seconds = 0, 0.0
    for wave in range(_MEASURED):
        asks = [
            Ask(
                prompt(prompt_length, own.spec.vocab_size, (wave, i)),
                new,
                refs[i % len(refs)],
            )
            for i in range(c)
        ]
        run = own.run(asks)
        tokens += run.tokens
        seconds += run.ended - run.began
    return tokens / seconds


@dataclass
class Stretch:
    """The part of a load that counts.

    Attributes:
        seconds: how long it was.
        tokens: output tokens that came in it.
        ended: the requests that ended in it.
        sent: all requests of the load, from before it to its end.
    """

    seconds: float = 0.0
    tokens: int = 0
    ended: list[Lengths] = field(default_factory=list)
    sent: list[Lengths] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Requests that ended."""
        return len(self.ended) / self.seconds


class Traffic:
    """Requests of W', one after another.

    Args:
        own: the engine; it runs no more than `c` at a time.
        refs: adapters in turn.
        c: requests that run.
        seed: of lengths, prompts and arrivals.
    """

    def __init__(self, own: Own, refs: list[AdapterRef], c: int, seed: int) -> None:
        self._own, self._refs, self._c, self._seed = own, refs, c, seed
        self._lengths = mixed_lengths(seed)
        self._clock = random.Random(f"arrivals {seed}")
        self._left: dict[str, int] = {}
        self._asked: dict[str, Lengths] = {}
        self._sent: list[Lengths] = []

    def run(self, arrivals: float) -> Stretch:
        """The stretch; `arrivals` come a second, and there is always one more than run."""
        for _ in range(2 * self._c):
            self._submit()
        next_at = time.perf_counter()
        ended = 0
        began: float | None = None
        stretch = Stretch()
        while len(stretch.ended) < _MEASURED * self._c:
            now = time.perf_counter()
            while next_at <= now and len(self._left) < 4 * self._c:
                self._submit()
                next_at += self._clock.expovariate(arrivals)
            over = self._step(stretch if began is not None else None)
            ended += over
            if began is None and ended >= self._c:
                began = time.perf_counter()
        assert began is not None
        stretch.seconds = time.perf_counter() - began
        stretch.sent = self._sent
        for request_id in self._left:
            self._own.engine.abort(request_id)
        while self._own.engine.has_work:
            self._own.step()
        return stretch

    def _step(self, stretch: Stretch | None) -> int:
        """One step of the engine; how many requests ended in it."""
        over = []
        for request_id, _ in self._own.step():
            self._left[request_id] -= 1
            if self._left[request_id] == 0:
                over.append(self._asked.pop(request_id))
                del self._left[request_id]
            if stretch is not None:
                stretch.tokens += 1
        if stretch is not None:
            stretch.ended += over
        return len(over)

    def _submit(self) -> None:
        lengths = next(self._lengths)
        ids = prompt(lengths.prompt, self._own.spec.vocab_size, (self._seed, len(self._sent)))
        ref = self._refs[len(self._sent) % len(self._refs)]
        request_id = self._own.submit(Ask(ids, lengths.new, ref))
        self._left[request_id] = lengths.new
        self._asked[request_id] = lengths
        self._sent.append(lengths)
