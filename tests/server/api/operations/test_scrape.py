"""`GET /metrics` of a real server: what was asked of it stands there, counted exactly."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter

import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from tests.documentation import ROOT, hooks
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, upload

PLACES = 2
VLLM = {"model_name": "tiny-base", "engine": "0"}
FAILURES = "graftwork_adapter_failures_total"


class Scrape:
    """One reading of /metrics."""

    def __init__(self, client) -> None:
        self.text = client.get("/metrics").raise_for_status().text
        self.families = list(text_string_to_metric_families(self.text))
        samples = [sample for family in self.families for sample in family.samples]
        self.values = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
        assert len(self.values) == len(samples)

    def __call__(self, name: str, **labels: str) -> float:
        if name.startswith("vllm:"):
            labels |= VLLM
        return self.values.get((name, frozenset(labels.items())), 0)

    def monotonic(self) -> dict:
        """Every counter, and every part of a histogram."""
        kinds = {family.name: family.type for family in self.families}
        suffix = re.compile(r"_(total|bucket|sum|count)$")
        return {
            key: value
            for key, value in self.values.items()
            if kinds.get(suffix.sub("", key[0])) in ("counter", "histogram")
        }


def differences(client, after, before: Scrape):
    """(name, **labels) -> by how much it grew."""
    now = Scrape(client)
    return now, lambda name, **labels: now(name, **labels) - before(name, **labels)


@pytest.fixture(scope="module")
def counted(tiny_base, tmp_path_factory):
    """A small server: two adapters by name, three requests at a time, little room for adapters."""
    home = tmp_path_factory.mktemp("counted")
    changes = {"metrics_adapters": PLACES, "max_running": 2, "max_queued": 1, "kv_mib": 1}
    settings = make_settings(tiny_base, home / "data", **changes)
    with running_server(settings) as client:
        for seed in range(3 * PLACES):
            folder = save_prefix_adapter(home / f"a{seed}", seed=seed)
            assert upload(client, folder, f"adapter-{seed}").status_code == 201
        client.data_dir = settings.data_dir
        yield client


def generate(client, *, adapter: str | None = None, tokens: int = 3, **parameters):
    return client.post(
        "/generate",
        params={} if adapter is None else {"adapter": adapter},
        json={
            "inputs": "the tweet",
            "parameters": {
                "max_new_tokens": tokens,
                "ignore_eos": True,
                "details": True,
                **parameters,
            },
        },
    )


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def idle(client) -> bool:
    now = Scrape(client)
    return not now("vllm:num_requests_running") and not now("vllm:num_requests_waiting")


# --- counts --------------------------------------------------------------------------------


def test_a_generation_is_counted_to_the_token(counted):
    before = Scrape(counted)
    details = generate(counted, tokens=7).json()["details"]
    prompt = details["prompt_tokens"]
    _, grew = differences(counted, generate, before)
    assert grew("vllm:prompt_tokens_total") == prompt
    assert grew("vllm:generation_tokens_total") == 7
    assert grew("vllm:request_success_total", finished_reason="length") == 1
    assert grew("vllm:time_to_first_token_seconds_count") == 1
    assert grew("vllm:inter_token_latency_seconds_count") == 6
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert grew(f"vllm:{name}_seconds_count") == 1
    assert grew("vllm:request_prompt_tokens_sum") == prompt
    assert grew("vllm:request_generation_tokens_sum") == 7
    assert grew("graftwork_adapter_requests_total", adapter="tiny-base") == 1
    assert grew("graftwork_adapter_generation_tokens_total", adapter="tiny-base") == 7
    whole = grew("vllm:e2e_request_latency_seconds_sum")
    assert whole >= grew("vllm:time_to_first_token_seconds_sum") > 0
    parts = grew("vllm:time_to_first_token_seconds_sum")
    parts += grew("vllm:inter_token_latency_seconds_sum")
    assert parts == pytest.approx(whole)


def test_the_header_and_the_histogram_say_the_same(counted):
    before = Scrape(counted)
    reply = generate(counted)
    _, grew = differences(counted, generate, before)
    milliseconds = grew("vllm:time_to_first_token_seconds_sum") * 1000
    assert float(reply.headers["x-time-to-first-token"]) == pytest.approx(milliseconds, abs=0.51)
    waited = grew("vllm:request_queue_time_seconds_sum") * 1000
    assert float(reply.headers["x-queue-time"]) == pytest.approx(waited, abs=0.51)


def test_a_stop_string_ends_with_stop_and_counts_what_was_used(counted):
    text = generate(counted, tokens=12).json()["generated_text"]
    before = Scrape(counted)
    reply = generate(counted, tokens=12, stop=[text[len(text) // 2]]).json()["details"]
    assert reply["finish_reason"] == "stop_sequence"
    _, grew = differences(counted, generate, before)
    assert grew("vllm:request_success_total", finished_reason="stop") == 1
    assert grew("vllm:generation_tokens_total") == reply["generated_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "requests", "tokens"),
    [
        ("/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 4}}, 1, 4),
        ("/", {"inputs": "x", "parameters": {"max_new_tokens": 4}}, 1, 4),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 4, "best_of": 2}}, 2, 8),
        ("/v1/completions", {"model": "adapter-0", "prompt": ["x", "y"], "max_tokens": 3}, 2, 6),
        ("/v1/completions", {"model": "tiny-base", "prompt": "x", "n": 2, "max_tokens": 3}, 2, 6),
        ("/v1/completions", {"model": "tiny-base", "prompt": "x", "stream": True}, 1, 16),
        ("/classify", {"inputs": ["x", "y"], "labels": ["a", "b"]}, 4, 4),
    ],
)
def test_every_route_is_counted_by_the_same_code(counted, path, body, requests, tokens):
    if "parameters" in body:
        body["parameters"] |= {"ignore_eos": True, "do_sample": "best_of" in body["parameters"]}
    elif "prompt" in body:
        body["ignore_eos"] = True
    before = Scrape(counted)
    reply = counted.post(path, json=body)
    assert reply.status_code == 200, reply.text
    _, grew = differences(counted, generate, before)
    assert grew("vllm:generation_tokens_total") == tokens
    assert grew("vllm:request_success_total", finished_reason="length") == requests
    assert grew("graftwork_http_requests_total", method="POST", route=path, status="200") == 1
    if path != "/classify":  # which generates nothing that anybody waits for
        assert int(reply.headers["x-time-to-first-token"]) >= int(reply.headers["x-queue-time"])


def test_a_stream_that_its_client_leaves_is_an_abort(counted):
    before = Scrape(counted)
    body = {"inputs": "x", "parameters": {"max_new_tokens": 480, "ignore_eos": True}}
    with counted.stream("POST", "/generate_stream", json=body) as reply:
        lines = reply.iter_lines()
        read = [next(lines) for _ in range(5)]
        during = Scrape(counted)
        assert during("graftwork_adapter_requests_in_flight", adapter="tiny-base") == 1
    wait_until(
        lambda: not Scrape(counted)("graftwork_adapter_requests_in_flight", adapter="tiny-base")
    )
    wait_until(lambda: idle(counted))
    _, grew = differences(counted, generate, before)
    assert grew("vllm:request_success_total", finished_reason="abort") == 1
    assert len([line for line in read if line]) <= grew("vllm:generation_tokens_total") < 480
    assert grew("vllm:e2e_request_latency_seconds_count") == 0
    assert grew("vllm:time_to_first_token_seconds_count") == 1


def test_a_full_queue_counts_its_refusals(counted):
    before = Scrape(counted)
    replies: list[int] = []
    body = {"inputs": "x", "parameters": {"max_new_tokens": 480, "ignore_eos": True}}
    threads = [
        threading.Thread(
            target=lambda: replies.append(counted.post("/generate", json=body).status_code)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: Scrape(counted)("graftwork_adapter_requests_in_flight", adapter="tiny-base") == 3
    )
    during = Scrape(counted)
    refused = generate(counted, adapter="adapter-0")
    for thread in threads:
        thread.join()
    assert refused.status_code == 429
    assert replies == [200, 200, 200]
    assert during("vllm:num_requests_running") <= 2
    _, grew = differences(counted, generate, before)
    assert grew(FAILURES, adapter="adapter-0", code="overloaded") == 1
    assert (
        grew("graftwork_http_requests_total", method="POST", route="/generate", status="429") == 1
    )
    assert grew("vllm:request_success_total", finished_reason="length") == 3
    assert grew("graftwork_adapter_requests_total", adapter="adapter-0") == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "tiny-base", "prompt": ["x"] * 6, "max_tokens": 4, "n": 2}),
        ("/classify", {"inputs": ["x"] * 6, "labels": ["yes", "no"]}),
    ],
)
def test_what_waits_within_a_request_is_no_refusal(counted, path, body):
    """More sequences than the engine has places: the later ones come back, and all end well."""
    before = Scrape(counted)
    busy = {"inputs": "x", "parameters": {"max_new_tokens": 480, "ignore_eos": True}}
    threads = [
        threading.Thread(target=lambda: counted.post("/generate", json=busy)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: Scrape(counted)("graftwork_adapter_requests_in_flight", adapter="tiny-base") == 2
    )
    reply = counted.post(path, json=body)
    assert reply.status_code == 200, reply.text
    for thread in threads:
        thread.join()
    _, grew = differences(counted, generate, before)
    assert grew("graftwork_adapter_requests_total", adapter="tiny-base") == 2 + 12
    assert grew(FAILURES, adapter="tiny-base", code="overloaded") == 0


def test_adapters_are_loaded_and_evicted(counted, tmp_path):
    # 1 MiB holds 256 blocks of 16 tokens, and each of these takes 25: they cannot all stay.
    names = [f"long-{index}" for index in range(12)]
    for seed, name in enumerate(names):
        upload(counted, save_prefix_adapter(tmp_path / name, seed=10 + seed, n=400), name)

    def total(now: Scrape, name: str) -> float:
        return sum(value for (sample, _), value in now.values.items() if sample == name)

    before = Scrape(counted)
    for name in names:
        assert generate(counted, adapter=name).status_code == 200
    wait_until(lambda: idle(counted))
    now = Scrape(counted)
    loads, evictions = "graftwork_adapter_loads_total", "graftwork_adapter_evictions_total"
    assert total(now, loads) - total(before, loads) == 12
    residencies = [counted.get(f"/adapters/{name}").json()["residency"] for name in names]
    assert Counter(residencies).keys() == {"device", "host"}
    gone = residencies.count("host")
    assert total(now, evictions) - total(before, evictions) >= gone
    everywhere = counted.get("/adapters").json()["adapters"]
    on_device = sum(one["residency"] == "device" for one in everywhere)
    resident = [
        value
        for (name, labels), value in now.values.items()
        if name == "graftwork_adapter_resident" and ("residency", "device") in labels
    ]
    assert sum(resident) == on_device
    assert now("graftwork_adapters") == len(everywhere)


def test_a_prompt_that_was_there_before_hits_the_prefix_cache(counted):
    body = {"inputs": "the tweet is a complaint, no complaint at all " * 4}
    counted.post("/generate", json=body)
    wait_until(lambda: idle(counted))
    before = Scrape(counted)
    counted.post("/generate", json=body)
    wait_until(lambda: idle(counted))
    _, grew = differences(counted, generate, before)
    assert 0 < grew("vllm:prefix_cache_hits_total") < grew("vllm:prefix_cache_queries_total")


def test_names_come_and_go_and_no_counter_falls(counted):
    highest: dict = {}
    for round_ in range(2):
        for seed in range(3 * PLACES):
            for _ in range(8 + 8 * round_):
                generate(counted, adapter=f"adapter-{seed}", tokens=1)
            now = Scrape(counted)
            for key, value in now.monotonic().items():
                assert value >= highest.get(key, 0), key
                highest[key] = value
            names = {
                dict(labels)["adapter"]
                for name, labels in now.values
                if name == "graftwork_adapter_requests_total"
            }
            assert names >= {"tiny-base", "other"}
            assert len(names) <= PLACES + 2


def test_a_corrupt_adapter_is_a_failure_each_time(counted, tmp_path):
    digest = upload(counted, save_prefix_adapter(tmp_path / "c", seed=77), "corrupt").json()[
        "digest"
    ]
    stored = counted.data_dir / "blobs" / digest / "adapter_model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-8])

    def failures(now: Scrape) -> float:
        return sum(
            value
            for (name, labels), value in now.values.items()
            if name == FAILURES and ("code", "adapter_corrupt") in labels
        )

    before = Scrape(counted)
    # Once in the engine, which finds out, and from then on before anything is begun.
    for _ in range(2):
        assert generate(counted, adapter="corrupt").status_code == 424
    now, grew = differences(counted, generate, before)
    assert failures(now) - failures(before) == 2
    assert grew("vllm:request_success_total", finished_reason="error") == 1
    assert grew("vllm:prompt_tokens_total") == 0


def test_uploads_and_strangers(counted, tmp_path):
    before = Scrape(counted)
    folder = save_prefix_adapter(tmp_path / "u", seed=99)
    replies = [upload(counted, folder, name).status_code for name in ("new", "new", "No Name")]
    assert replies == [201, 200, 422]
    for path in ("/nowhere", "/adapters/a/b/c", "/wp-login.php"):
        counted.get(path)
    counted.get("/adapters/adapter-1")
    now, grew = differences(counted, generate, before)
    for outcome in ("created", "unchanged", "refused"):
        assert grew("graftwork_uploads_total", outcome=outcome) == 1
    replies = "graftwork_http_requests_total"
    assert grew(replies, method="GET", route="none", status="404") == 3
    assert grew(replies, method="GET", route="/adapters/{name}", status="200") == 1
    assert "wp-login" not in now.text


# --- the page itself -----------------------------------------------------------------------


def test_what_is_served_and_by_which_processes(counted):
    now = Scrape(counted)
    (build,) = [labels for name, labels in now.values if name == "graftwork_build_info"]
    described = dict(build)
    assert described["base"] == "tiny-base"
    assert described["dtype"] == "float32"
    assert described["base_digest"] == counted.get("/v1/models").json()["data"][0]["digest"]
    assert now("process_resident_memory_bytes") > 0
    assert now("graftwork_engine_process_cpu_seconds_total") > 0
    jobs = {
        dict(labels)["state"] for name, labels in now.values if name == "graftwork_training_jobs"
    }
    assert jobs == {"queued", "running", "succeeded", "failed", "cancelled"}


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.3",
        "application/openmetrics-text; version=of-my-own",
        "Application/OpenMetrics-Text",
    ],
)
def test_openmetrics_where_the_scraper_likes_it(counted, accept):
    plain = counted.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    opened = counted.get("/metrics", headers={"accept": accept})
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.text.endswith("# EOF\n")
    # Not only families: a series must not change its name with the format.
    assert sample_names(openmetrics_families(opened.text)) == sample_names(
        text_string_to_metric_families(plain.text)
    )


def sample_names(families) -> set[str]:
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=1.0.0", "nonsense;;version=x"])
def test_plain_text_for_everybody_else(counted, accept):
    reply = counted.get("/metrics", headers={"accept": accept})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "vllm:num_requests_running{" in reply.text


def test_an_unknown_query_parameter_is_refused(counted):
    assert counted.get("/metrics?adapter=adapter-0").status_code == 400


def test_it_answers_where_the_engine_does_not(tiny_base, tmp_path):
    settings = make_settings(tmp_path / "no-base-here", tmp_path / "data")
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        assert client.get("/readyz").status_code == 503
        now = Scrape(client)
        assert (
            now("graftwork_http_requests_total", method="GET", route="/readyz", status="503") == 1
        )
        assert now("vllm:kv_cache_usage_perc") == 0


def test_it_goes_on_where_the_engine_has_died(tiny_base, tmp_path):
    with running_server(make_settings(tiny_base, tmp_path / "data")) as client:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 480, "ignore_eos": True}}
        with client.stream("POST", "/generate_stream", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.kill(client.app_services().client.pid, signal.SIGKILL)
            assert "engine_unavailable" not in "".join(
                lines
            )  # TGI's shape has no code; the books do
        now = Scrape(client)
        assert now(FAILURES, adapter="tiny-base", code="engine_unavailable") == 1
        assert now("vllm:request_success_total", finished_reason="error") == 1
        assert now("process_resident_memory_bytes") > 0
        assert "graftwork_engine_process" not in now.text


def test_two_servers_have_books_of_their_own(counted, server):
    before = Scrape(server)
    generate(counted)
    assert Scrape(server)("vllm:generation_tokens_total") == before("vllm:generation_tokens_total")


def test_every_metric_is_documented(counted):
    documented = {
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(
            r"^\| `([\w:]+)` \| (\w+) \| ([^|]*) \|", hooks().metrics(), re.M
        )
    }
    common = {"model_name", "engine"}
    now = Scrape(counted)
    labels: dict[str, set[str]] = {}
    for (name, pairs), _ in now.values.items():
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        labels.setdefault(base, set()).update(key for key, _ in pairs if key != "le")
    served = {
        (name, kind, tuple(sorted(labels.get(name, set()) - common)))
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", now.text, re.M)
        if "process_" not in name
    }
    assert {(n, k, tuple(sorted(ls))) for n, k, ls in documented} == served
    page = (ROOT / "docs" / "operate" / "metrics.md").read_text()
    for prefix in ("process_", "graftwork_engine_process_"):
        assert f"`{prefix}" in page
