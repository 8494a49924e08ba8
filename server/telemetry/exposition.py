"""The table of all metrics, and the encoding of samples in the Prometheus text format.

The table is authoritative: a sample with an unknown name raises, and the documentation is made from it.
Metrics with the prefix `vllm:` have the names, buckets and labels of vLLM's V1 engine and the same
meaning. Independent of the source of the numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

Kind = Literal["counter", "gauge", "histogram"]
Bounds: TypeAlias = tuple[float, ...]
Metric: TypeAlias = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

# vLLM's, in seconds: first token; between tokens; whole requests and their phases.
FIRST_TOKEN: Bounds = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS: Bounds = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WHOLE_REQUEST: Bounds = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# vLLM ends these buckets at the base's length; here they are the same for every base.
NUM_TOKENS: Bounds = (*(m * 10.0**e for e in range(5) for m in (1, 2, 5)), 100_000.0)
HTTP_SECONDS: Bounds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Histogram:
    """Counts by upper bound. Not thread-safe, to avoid locking."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value; upper bounds are inclusive."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        """A snapshot."""
        other = Histogram(self.bounds)
        other.counts, other.total = self.counts.copy(), self.total
        return other


@dataclass(frozen=True)
class Family:
    """One metric: its type, labels and help text."""

    kind: Kind
    labels: tuple[str, ...]
    help: str


_VLLM = ("model_name", "engine")
_ADAPTER = ("adapter",)

FAMILIES: dict[str, Family] = {
    # now
    "vllm:num_requests_running": Family("gauge", _VLLM, "Requests in the engine's steps."),
    "vllm:num_requests_waiting": Family("gauge", _VLLM, "Requests that wait for a place."),
    "vllm:kv_cache_usage_perc": Family("gauge", _VLLM, "KV blocks in use; 1 is all of them."),
    # since the start
    "vllm:num_preemptions_total": Family(
        "counter", _VLLM, "Requests that had to give their KV blocks back for a while."
    ),
    "vllm:prefix_cache_queries_total": Family(
        "counter", _VLLM, "Prompt tokens looked for in the prefix cache."
    ),
    "vllm:prefix_cache_hits_total": Family(
        "counter", _VLLM, "Prompt tokens found in the prefix cache."
    ),
    "graftwork_engine_restarts_total": Family(
        "counter", (), "Times the engine's process was replaced by another one."
    ),
    "vllm:prompt_tokens_total": Family(
        "counter", _VLLM, "Prompt tokens of requests that got a first token."
    ),
    "vllm:generation_tokens_total": Family("counter", _VLLM, "Tokens generated."),
    "vllm:request_success_total": Family(
        "counter", (*_VLLM, "finished_reason"), "Requests that ended, by how they ended."
    ),
    # of requests
    "vllm:time_to_first_token_seconds": Family(
        "histogram", _VLLM, "From asking the engine to the first token."
    ),
    "vllm:inter_token_latency_seconds": Family("histogram", _VLLM, "Between two tokens."),
    "vllm:request_time_per_output_token_seconds": Family(
        "histogram", _VLLM, "Mean time between the tokens of a request that has two or more."
    ),
    "vllm:e2e_request_latency_seconds": Family(
        "histogram", _VLLM, "From asking the engine to the last token."
    ),
    "vllm:request_queue_time_seconds": Family(
        "histogram", _VLLM, "From asking the engine to the first step."
    ),
    "vllm:request_prefill_time_seconds": Family(
        "histogram", _VLLM, "From the first step to the first token."
    ),
    "vllm:request_decode_time_seconds": Family(
        "histogram", _VLLM, "From the first token to the last."
    ),
    "vllm:request_inference_time_seconds": Family(
        "histogram", _VLLM, "From the first step to the last token."
    ),
    "vllm:request_prompt_tokens": Family("histogram", _VLLM, "Prompt tokens of a request."),
    "vllm:request_generation_tokens": Family("histogram", _VLLM, "Tokens a request generated."),
    # of adapters
    "graftwork_adapter_requests_total": Family(
        "counter", _ADAPTER, "Requests handed to the engine."
    ),
    "graftwork_adapter_prompt_tokens_total": Family(
        "counter", _ADAPTER, "Prompt tokens of requests that got a first token."
    ),
    "graftwork_adapter_generation_tokens_total": Family("counter", _ADAPTER, "Tokens generated."),
    "graftwork_adapter_time_to_first_token_seconds": Family(
        "histogram", _ADAPTER, "From asking the engine to the first token."
    ),
    "graftwork_adapter_failures_total": Family(
        "counter", (*_ADAPTER, "code"), "Requests that failed or were not taken, by error code."
    ),
    "graftwork_adapter_requests_waiting": Family(
        "gauge", _ADAPTER, "Requests in the engine without a token yet."
    ),
    "graftwork_adapter_requests_in_flight": Family(
        "gauge", _ADAPTER, "Requests in the engine, waiting ones included."
    ),
    "graftwork_adapter_resident": Family(
        "gauge", (*_ADAPTER, "residency"), "Versions in host memory, and on the device."
    ),
    "graftwork_adapter_loads_total": Family("counter", _ADAPTER, "Times it was read from disk."),
    "graftwork_adapter_evictions_total": Family(
        "counter", _ADAPTER, "Times it had to leave the device for another adapter."
    ),
    "graftwork_adapters": Family("gauge", (), "Adapters stored, however many versions each has."),
    # of the rest
    "graftwork_training_jobs": Family("gauge", ("state",), "Training jobs on record, by state."),
    "graftwork_uploads_total": Family(
        "counter", ("outcome",), "Uploads of adapters, by what came of them."
    ),
    "graftwork_http_requests_total": Family(
        "counter", ("method", "route", "status"), "Replies by route and status."
    ),
    "graftwork_http_request_duration_seconds": Family(
        "histogram", ("route",), "From a request's arrival to the end of its reply."
    ),
    "graftwork_http_requests_in_flight": Family("gauge", (), "Requests being answered."),
    "graftwork_build_info": Family(
        "gauge", ("version", "base", "base_digest", "dtype", "device"), "What is served, by what."
    ),
}


@dataclass(frozen=True)
class Sample:
    """One sample or histogram of a family. `labels` are values in the family's order."""

    name: str
    labels: tuple[str, ...]
    value: float | Histogram


def encode(samples: Iterable[Sample], accept: str, engine_pid: int | None) -> tuple[bytes, str]:
    """Encode samples as text, with the process metrics of the server and the engine.

    Args:
        samples: in any order; families without samples still get their header.
        accept: the request's `Accept` header; OpenMetrics if it accepts that.
        engine_pid: None if there is no engine.

    Returns:
        The text and its content type.
    """
    registry = CollectorRegistry()
    registry.register(_Samples(samples))
    ProcessCollector(registry=registry)
    if engine_pid is not None:
        ProcessCollector("graftwork_engine", lambda: engine_pid, registry=registry)
    if "application/openmetrics-text" not in accept.lower():
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
    # Without UTF-8 names enabled, the library (0.26) writes `vllm_` for `vllm:` in samples, although a
    # colon is valid in a name. Every name here is valid in all formats, so names are written unchanged.
    text = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
        registry, escaping=openmetrics.ALLOWUTF8
    )
    return text, openmetrics.CONTENT_TYPE_LATEST


class _Samples(Collector):
    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        metrics = {name: _metric(name, family) for name, family in FAMILIES.items()}
        for sample in self._samples:
            _add(metrics[sample.name], sample)
        yield from metrics.values()


def _metric(name: str, family: Family) -> Metric:
    if family.kind == "counter":
        return CounterMetricFamily(name, family.help, labels=family.labels)
    if family.kind == "gauge":
        return GaugeMetricFamily(name, family.help, labels=family.labels)
    return HistogramMetricFamily(name, family.help, labels=family.labels)


def _add(metric: Metric, sample: Sample) -> None:
    if isinstance(metric, HistogramMetricFamily) and isinstance(sample.value, Histogram):
        bounds = [*(str(float(bound)) for bound in sample.value.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(sample.value.counts), strict=True))
        metric.add_metric(sample.labels, buckets, sample.value.total)
    elif isinstance(metric, (CounterMetricFamily, GaugeMetricFamily)):
        if isinstance(sample.value, Histogram):
            raise TypeError(f"{sample.name} takes a number")
        metric.add_metric(sample.labels, sample.value)
    else:
        raise TypeError(f"{sample.name} takes a histogram")
