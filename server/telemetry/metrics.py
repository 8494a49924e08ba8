"""The counters of one server, and the samples that `/metrics` exposes.

All updates run on the event loop, on plain numbers without locks: a token costs a bisection and a few
additions. `samples` takes a copy, so a thread can format it while counting continues. Counters belong to a
server instance, not to the process.

Independent of HTTP and of the Prometheus formats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from server.engine.request import GenerationRequest, ResidencyEvent, StatsEvent
from server.generation.observers import Ended
from server.store.caller import UNRESTRICTED, Caller
from server.store.job_states import State
from server.telemetry.exposition import (
    BETWEEN_TOKENS,
    FIRST_TOKEN,
    HTTP_SECONDS,
    NUM_TOKENS,
    WHOLE_REQUEST,
    Histogram,
    Sample,
)
from server.telemetry.top_adapters import OTHER, Series, TopAdapters

_ENDED: tuple[Ended, ...] = ("stop", "length", "abort", "error")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_UPLOAD = ("POST", "/adapters")
_OUTCOMES = {201: "created", 200: "unchanged"}
# vLLM labels series by engine; there is one here.
_ENGINE = "0"


@dataclass(frozen=True)
class Now:
    """Gauges that are sampled at scrape time.

    Attributes:
        base_id: the base's name.
        stats: the engine's latest statistics.
        num_restarts: restarts of the engine's process.
        jobs: training jobs by state.
        num_adapters: adapters stored.
        build: labels of `graftwork_build_info`, in their order.
    """

    base_id: str
    stats: StatsEvent
    num_restarts: int
    jobs: Mapping[State, int]
    num_adapters: int
    build: tuple[str, ...]


class AdapterMetrics:
    """Counters of one adapter, of the base, or of all others together."""

    __slots__ = (
        "evictions",
        "failures",
        "first_token",
        "generation_tokens",
        "loads",
        "prompt_tokens",
        "requests",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.loads = 0
        self.evictions = 0
        self.failures: Counter[str] = Counter()
        self.first_token = Histogram(FIRST_TOKEN)


class _Totals:
    """Counters over all generations; histograms have vLLM's names."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.ended: Counter[Ended] = Counter()
        self.first_token = Histogram(FIRST_TOKEN)
        self.between_tokens = Histogram(BETWEEN_TOKENS)
        self.per_token = Histogram(BETWEEN_TOKENS)
        self.whole = Histogram(WHOLE_REQUEST)
        self.queue = Histogram(WHOLE_REQUEST)
        self.prefill = Histogram(WHOLE_REQUEST)
        self.decode = Histogram(WHOLE_REQUEST)
        self.inference = Histogram(WHOLE_REQUEST)
        self.prompt_lengths = Histogram(NUM_TOKENS)
        self.output_lengths = Histogram(NUM_TOKENS)

    def histograms(self) -> dict[str, Histogram]:
        return {
            "vllm:time_to_first_token_seconds": self.first_token,
            "vllm:inter_token_latency_seconds": self.between_tokens,
            "vllm:request_time_per_output_token_seconds": self.per_token,
            "vllm:e2e_request_latency_seconds": self.whole,
            "vllm:request_queue_time_seconds": self.queue,
            "vllm:request_prefill_time_seconds": self.prefill,
            "vllm:request_decode_time_seconds": self.decode,
            "vllm:request_inference_time_seconds": self.inference,
            "vllm:request_prompt_tokens": self.prompt_lengths,
            "vllm:request_generation_tokens": self.output_lengths,
        }


class Metrics:
    """All counters. An `Observer` of generations; also receives adapter residency events and replies.

    Args:
        max_adapters: maximum adapters with series of their own, see `server.telemetry.top_adapters`.
    """

    def __init__(self, max_adapters: int = 32) -> None:
        self._totals = _Totals()
        self._base: Series[AdapterMetrics] = Series(AdapterMetrics())
        self._adapters = TopAdapters(max_adapters, AdapterMetrics)
        # By name, None is the base; only nonzero entries are stored.
        self._waiting: Counter[str | None] = Counter()
        self._in_flight: Counter[str | None] = Counter()
        self._resident: dict[str, tuple[str, str]] = {}
        self._replies: Counter[tuple[str, str, int]] = Counter()
        self._reply_seconds: dict[str, Histogram] = {}
        self._replying = 0

    # --- generations: `server.generation.observers.Observer` ----------------------------------

    def began(self, request: GenerationRequest, _caller: Caller = UNRESTRICTED, /) -> _Observer:
        """A request was submitted to the engine."""
        name = None if request.adapter is None else request.adapter.name
        series = self._base if name is None else self._adapters.used(name)
        series.counters.requests += 1
        self._waiting[name] += 1
        self._in_flight[name] += 1
        return _Observer(self, series, name, len(request.prompt_token_ids))

    def refused(self, adapter: str | None, code: str) -> None:
        """A generation was refused before it started."""
        series = self._base if adapter is None else self._adapters.used(adapter)
        series.counters.failures[code] += 1

    # --- adapters and replies ------------------------------------------------------------------

    def adapter_moved(self, event: ResidencyEvent) -> None:
        """An adapter was loaded, evicted or moved."""
        counters = self._adapters.find(event.name).counters
        counters.loads += event.loads
        counters.evictions += event.evictions
        if event.residency == "disk":
            self._resident.pop(event.digest, None)
        else:
            self._resident[event.digest] = (event.name, event.residency)

    def reply_began(self) -> None:
        """A request arrived."""
        self._replying += 1

    def reply_ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """A reply ended. `route` is a template, or one fixed value for all unmatched paths."""
        self._replying -= 1
        known = method if method in _METHODS else OTHER
        self._replies[known, route, status] += 1
        self._reply_seconds.setdefault(route, Histogram(HTTP_SECONDS)).observe(seconds)

    # --- samples ----------------------------------------------------------------------------------

    def samples(self, now: Now) -> list[Sample]:
        """A snapshot of everything, unaffected by later updates."""
        return [
            *self._engine_samples(now),
            *self._total_samples(now.base_id),
            *self._adapter_samples(now.base_id),
            *self._reply_samples(),
            *(Sample("graftwork_training_jobs", (state,), n) for state, n in now.jobs.items()),
            Sample("graftwork_adapters", (), now.num_adapters),
            Sample("graftwork_build_info", now.build, 1),
        ]

    def _engine_samples(self, now: Now) -> Iterator[Sample]:
        stats = now.stats
        values: dict[str, float] = {
            "vllm:num_requests_running": stats.num_running,
            "vllm:num_requests_waiting": stats.num_waiting,
            "vllm:kv_cache_usage_perc": stats.kv_blocks_used / max(1, stats.kv_blocks_total),
            "vllm:num_preemptions_total": stats.num_preemptions,
            "vllm:prefix_cache_queries_total": stats.prefix_query_tokens,
            "vllm:prefix_cache_hits_total": stats.prefix_hit_tokens,
        }
        for name, value in values.items():
            yield Sample(name, (now.base_id, _ENGINE), value)
        yield Sample("graftwork_engine_restarts_total", (), now.num_restarts)

    def _total_samples(self, base_id: str) -> Iterator[Sample]:
        labels, totals = (base_id, _ENGINE), self._totals
        yield Sample("vllm:prompt_tokens_total", labels, totals.prompt_tokens)
        yield Sample("vllm:generation_tokens_total", labels, totals.generation_tokens)
        for how in _ENDED:
            yield Sample("vllm:request_success_total", (*labels, how), totals.ended[how])
        for name, histogram in totals.histograms().items():
            yield Sample(name, labels, histogram.copy())

    def _adapter_samples(self, base_id: str) -> Iterator[Sample]:
        by_label = self._adapters.by_label()
        waiting, in_flight, resident = self._gauges(by_label.keys(), base_id)
        # The base first; a base named `other` appears only in vLLM's totals.
        for label, counters in ({base_id: self._base.counters} | by_label).items():
            yield from _samples_of(label, counters)
            yield Sample("graftwork_adapter_requests_waiting", (label,), waiting[label])
            yield Sample("graftwork_adapter_requests_in_flight", (label,), in_flight[label])
        for label, counters in by_label.items():  # the base has no residency
            yield Sample("graftwork_adapter_loads_total", (label,), counters.loads)
            yield Sample("graftwork_adapter_evictions_total", (label,), counters.evictions)
            for where in ("host", "device"):
                number = resident[label, where]
                yield Sample("graftwork_adapter_resident", (label, where), number)

    def _gauges(
        self, labels: Set[str], base_id: str
    ) -> tuple[Counter[str], Counter[str], Counter[tuple[str, str]]]:
        def label(name: str | None) -> str:
            if name is None:
                return base_id
            return name if name in labels else OTHER

        waiting: Counter[str] = Counter()
        in_flight: Counter[str] = Counter()
        resident: Counter[tuple[str, str]] = Counter()
        for name, number in self._waiting.items():
            waiting[label(name)] += number
        for name, number in self._in_flight.items():
            in_flight[label(name)] += number
        for holder, where in self._resident.values():
            resident[label(holder), where] += 1
        return waiting, in_flight, resident

    def _reply_samples(self) -> Iterator[Sample]:
        yield Sample("graftwork_http_requests_in_flight", (), self._replying)
        uploads = Counter({outcome: 0 for outcome in (*_OUTCOMES.values(), "refused")})
        for (method, route, status), number in self._replies.items():
            labels = (method, route, str(status))
            yield Sample("graftwork_http_requests_total", labels, number)
            if (method, route) == _UPLOAD:
                uploads[_OUTCOMES.get(status, "refused")] += number
        for outcome, number in uploads.items():
            yield Sample("graftwork_uploads_total", (outcome,), number)
        for route, histogram in self._reply_seconds.items():
            yield Sample("graftwork_http_request_duration_seconds", (route,), histogram.copy())


class _Observer:
    """Counts one generation, a `server.generation.observers.GenerationObserver`."""

    __slots__ = (
        "_first_seconds",
        "_metrics",
        "_name",
        "_num_prompt_tokens",
        "_num_tokens",
        "_queue_seconds",
        "_series",
        "_totals",
    )

    def __init__(
        self,
        metrics: Metrics,
        series: Series[AdapterMetrics],
        name: str | None,
        num_prompt_tokens: int,
    ) -> None:
        self._metrics = metrics
        self._totals = metrics._totals
        self._series = series
        self._name = name
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._first_seconds = 0.0
        self._queue_seconds = 0.0

    def first_token(self, seconds: float, queue_seconds: float | None) -> None:
        _less(self._metrics._waiting, self._name)
        self._num_tokens = 1
        self._first_seconds = seconds
        self._queue_seconds = min(queue_seconds or 0.0, seconds)
        totals, counters = self._totals, self._series.counters
        totals.prompt_tokens += self._num_prompt_tokens
        totals.generation_tokens += 1
        totals.first_token.observe(seconds)
        counters.prompt_tokens += self._num_prompt_tokens
        counters.generation_tokens += 1
        counters.first_token.observe(seconds)

    def token(self, seconds: float) -> None:
        self._num_tokens += 1
        self._totals.generation_tokens += 1
        self._totals.between_tokens.observe(seconds)
        self._series.counters.generation_tokens += 1

    def ended(self, how: Ended, seconds: float, code: str | None) -> None:
        _less(self._metrics._in_flight, self._name)
        if not self._num_tokens:
            _less(self._metrics._waiting, self._name)
        self._totals.ended[how] += 1
        if code is not None:
            self._series.counters.failures[code] += 1
        if how in ("stop", "length"):
            self._observe_whole(seconds)

    def _observe_whole(self, seconds: float) -> None:
        totals, decode = self._totals, seconds - self._first_seconds
        totals.whole.observe(seconds)
        totals.queue.observe(self._queue_seconds)
        totals.prefill.observe(self._first_seconds - self._queue_seconds)
        totals.decode.observe(decode)
        totals.inference.observe(seconds - self._queue_seconds)
        totals.prompt_lengths.observe(self._num_prompt_tokens)
        totals.output_lengths.observe(self._num_tokens)
        if self._num_tokens > 1:
            totals.per_token.observe(decode / (self._num_tokens - 1))


def _less(counts: Counter[str | None], name: str | None) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]


def _samples_of(label: str, counters: AdapterMetrics) -> Iterator[Sample]:
    yield Sample("graftwork_adapter_requests_total", (label,), counters.requests)
    yield Sample("graftwork_adapter_prompt_tokens_total", (label,), counters.prompt_tokens)
    yield Sample("graftwork_adapter_generation_tokens_total", (label,), counters.generation_tokens)
    yield Sample(
        "graftwork_adapter_time_to_first_token_seconds", (label,), counters.first_token.copy()
    )
    for code, number in counters.failures.items():
        yield Sample("graftwork_adapter_failures_total", (label, code), number)
