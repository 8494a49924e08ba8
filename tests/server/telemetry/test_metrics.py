"""The counters and how they are written out, without a server."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.request import AdapterRef, GenerationRequest, ResidencyEvent, StatsEvent
from server.telemetry.exposition import BETWEEN_TOKENS, FAMILIES, Histogram, Sample, encode
from server.telemetry.metrics import Metrics, Now

JOBS = {"queued": 1, "running": 0, "succeeded": 2, "failed": 0, "cancelled": 0}
VLLM = {"model_name": "base", "engine": "0"}


IDLE = StatsEvent(0, 0, 0, 0)


def now(stats: StatsEvent = IDLE) -> Now:
    return Now("base", stats, 2, JOBS, 3, ("1", "base", "d", "float32", "cpu"))


def numbers(metrics: Metrics, at: Now | None = None) -> dict:
    """{(name, labels): value} of the whole text, as a scraper reads it."""
    text, _ = encode(metrics.samples(at or now()), "", None)
    samples = [
        sample
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    ]
    keys = [(sample.name, frozenset(sample.labels.items())) for sample in samples]
    assert len(set(keys)) == len(keys), "a series stands there twice"
    return {key: sample.value for key, sample in zip(keys, samples, strict=True)}


def of(read: dict, name: str, **labels: str) -> float:
    return read[name, frozenset(labels.items())]


def request(name: str | None = None, num_prompt_tokens: int = 4) -> GenerationRequest:
    ref = None if name is None else AdapterRef(f"digest-{name}", 4, False, name=name, version=1)
    return GenerationRequest("r", tuple(range(num_prompt_tokens)), adapter=ref)


def test_a_whole_request():
    metrics = Metrics()
    watch = metrics.began(request("a"))
    watch.first_token(0.5, 0.25)
    for _ in range(4):
        watch.token(0.0625)
    watch.ended("length", 0.75, None)
    read = numbers(metrics)
    assert of(read, "vllm:prompt_tokens_total", **VLLM) == 4
    assert of(read, "vllm:generation_tokens_total", **VLLM) == 5
    assert of(read, "vllm:request_success_total", **VLLM, finished_reason="length") == 1
    for name, count, total in (
        ("time_to_first_token_seconds", 1, 0.5),
        ("inter_token_latency_seconds", 4, 0.25),
        ("request_time_per_output_token_seconds", 1, 0.0625),
        ("e2e_request_latency_seconds", 1, 0.75),
        ("request_queue_time_seconds", 1, 0.25),
        ("request_prefill_time_seconds", 1, 0.25),
        ("request_decode_time_seconds", 1, 0.25),
        ("request_inference_time_seconds", 1, 0.5),
        ("request_prompt_tokens", 1, 4),
        ("request_generation_tokens", 1, 5),
    ):
        assert of(read, f"vllm:{name}_count", **VLLM) == count, name
        assert of(read, f"vllm:{name}_sum", **VLLM) == total, name
    assert of(read, "graftwork_adapter_requests_total", adapter="a") == 1
    assert of(read, "graftwork_adapter_prompt_tokens_total", adapter="a") == 4
    assert of(read, "graftwork_adapter_generation_tokens_total", adapter="a") == 5
    assert of(read, "graftwork_adapter_time_to_first_token_seconds_count", adapter="a") == 1
    assert of(read, "graftwork_adapter_requests_total", adapter="base") == 0


def test_requests_on_their_way_are_gauges():
    metrics = Metrics()
    waiting, running = metrics.began(request("a")), metrics.began(request())
    running.first_token(0.1, None)
    read = numbers(metrics)
    assert of(read, "graftwork_adapter_requests_waiting", adapter="a") == 1
    assert of(read, "graftwork_adapter_requests_waiting", adapter="base") == 0
    assert of(read, "graftwork_adapter_requests_in_flight", adapter="base") == 1
    waiting.ended("abort", 0.1, None)
    running.ended("abort", 0.2, None)
    read = numbers(metrics)
    for adapter in ("a", "base"):
        assert of(read, "graftwork_adapter_requests_waiting", adapter=adapter) == 0
        assert of(read, "graftwork_adapter_requests_in_flight", adapter=adapter) == 0
    assert of(read, "vllm:request_success_total", **VLLM, finished_reason="abort") == 2
    # Times are those of requests that ended by themselves.
    assert of(read, "vllm:e2e_request_latency_seconds_count", **VLLM) == 0
    assert of(read, "vllm:time_to_first_token_seconds_count", **VLLM) == 1


def test_failures_by_code():
    metrics = Metrics()
    metrics.began(request("a")).ended("error", 0.1, "adapter_corrupt")
    metrics.refused("a", "overloaded")
    metrics.refused(None, "overloaded")
    read = numbers(metrics)
    failures = "graftwork_adapter_failures_total"
    assert of(read, failures, adapter="a", code="adapter_corrupt") == 1
    assert of(read, failures, adapter="a", code="overloaded") == 1
    assert of(read, failures, adapter="base", code="overloaded") == 1
    assert of(read, "vllm:request_success_total", **VLLM, finished_reason="error") == 1
    assert of(read, "graftwork_adapter_requests_total", adapter="a") == 1  # refused is not taken


def test_adapters_move():
    metrics = Metrics(1)
    metrics.began(request("a"))
    for event in (
        ResidencyEvent("1", "device", "a", loads=1),
        ResidencyEvent("2", "device", "b", loads=1),
        ResidencyEvent("1", "host", "a", evictions=1),
        ResidencyEvent("3", "host", "a", loads=1),
    ):
        metrics.adapter_moved(event)
    read = numbers(metrics)
    assert of(read, "graftwork_adapter_resident", adapter="a", residency="host") == 2
    assert of(read, "graftwork_adapter_resident", adapter="other", residency="device") == 1
    assert of(read, "graftwork_adapter_loads_total", adapter="a") == 2
    assert of(read, "graftwork_adapter_evictions_total", adapter="a") == 1
    metrics.adapter_moved(ResidencyEvent("3", "disk", "a"))
    read = numbers(metrics)
    assert of(read, "graftwork_adapter_resident", adapter="a", residency="host") == 1


def test_what_the_engine_and_the_database_say():
    stats = StatsEvent(3, 2, 5, 20, 70, 30, 4)
    read = numbers(Metrics(), now(stats))
    assert of(read, "vllm:num_requests_running", **VLLM) == 3
    assert of(read, "vllm:num_requests_waiting", **VLLM) == 2
    assert of(read, "vllm:kv_cache_usage_perc", **VLLM) == 0.25
    assert of(read, "vllm:prefix_cache_queries_total", **VLLM) == 70
    assert of(read, "vllm:prefix_cache_hits_total", **VLLM) == 30
    assert of(read, "vllm:num_preemptions_total", **VLLM) == 4
    assert of(read, "graftwork_training_jobs", state="succeeded") == 2
    assert of(read, "graftwork_adapters") == 3


def test_strangers_make_no_series():
    metrics = Metrics()
    for method in ("POST", "BREW", "X" * 500):
        metrics.reply_began()
        metrics.reply_ended(method, "none", 404, 0.1)
    read = numbers(metrics)
    replies = "graftwork_http_requests_total"
    assert of(read, replies, method="other", route="none", status="404") == 2
    assert of(read, "graftwork_http_request_duration_seconds_count", route="none") == 3


@pytest.mark.parametrize("name", ["other", "base"])
def test_a_base_of_any_name_makes_no_series_twice(name):
    metrics = Metrics()
    metrics.began(request())
    metrics.began(request("a"))
    text, _ = encode(metrics.samples(Now(name, now().stats, 0, {}, 0, now().build)), "", None)
    series = [line.split(" ")[0] for line in text.decode().splitlines() if line[0] != "#"]
    assert len(series) == len(set(series))


def test_samples_are_as_they_were_when_taken():
    metrics = Metrics()
    watch = metrics.began(request())
    watch.first_token(0.5, None)
    samples = metrics.samples(now())
    before = encode(samples, "", None)[0].partition(b"process_")[0]
    watch.token(0.25)
    watch.ended("stop", 0.75, None)
    assert encode(samples, "", None)[0].partition(b"process_")[0] == before


def test_buckets_are_cumulative_and_a_bound_belongs_below():
    histogram = Histogram(BETWEEN_TOKENS)
    for value in (0.01, 0.011, 100.0):
        histogram.observe(value)
    text, _ = encode([Sample("vllm:inter_token_latency_seconds", ("m", "0"), histogram)], "", None)
    family = {
        sample.labels["le"]: sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == "vllm:inter_token_latency_seconds_bucket"
    }
    assert (family["0.01"], family["0.025"], family["80.0"], family["+Inf"]) == (1, 2, 2, 3)


def test_every_family_is_announced_even_without_a_row():
    text, _ = encode([], "", None)
    announced = {line.split()[2] for line in text.decode().splitlines() if "# TYPE" in line}
    assert announced >= FAMILIES.keys()


def test_rows_that_do_not_fit_their_family_are_mistakes():
    histogram = Histogram(BETWEEN_TOKENS)
    for row in (
        Sample("vllm:nothing", (), 1),
        Sample("graftwork_adapters", (), histogram),
        Sample("vllm:inter_token_latency_seconds", ("m", "0"), 1),
    ):
        with pytest.raises((KeyError, TypeError)):
            encode([row], "", None)
