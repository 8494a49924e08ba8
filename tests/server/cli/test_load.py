"""`graftwork bench`: load on the running server, counted by both."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import httpx
import pytest

from server.cli.http_client import ServerRefused
from server.cli.load import LoadPlan, SentRequest, report, run_load
from tests.clients.counted import Counted
from tests.server.cli.runner import refusal, run
from tests.server.cli.test_http_client import something

PLAN = LoadPlan("", num_requests=12, concurrency=4, prompt_tokens=9, max_new_tokens=7, warmup=0)


@pytest.fixture
def plan(server) -> LoadPlan:
    return replace(PLAN, url=str(server.base_url), adapters=("complaints", "other", None))


@pytest.mark.parametrize("rate", [None, 50.0])
def test_its_figures_agree_with_the_server_s_metrics(server, plan, rate):
    counted = Counted(plan.url)
    made = run_load(replace(plan, rate=rate))
    grown = counted.since(12)
    assert grown["vllm:request_success_total"] == made.total.num_requests == 12
    assert grown["vllm:generation_tokens_total"] == made.total.output_tokens == 12 * 7
    assert grown["vllm:prompt_tokens_total"] == made.total.prompt_tokens == 12 * 9
    assert grown["vllm:time_to_first_token_seconds_count"] == 12
    # What a client waits holds what the server counted: it cannot be less.
    waited = made.total.ttft_ms["mean"] * 12 / 1000
    assert grown["vllm:time_to_first_token_seconds_sum"] <= waited
    lasted = made.total.e2e_ms["mean"] * 12 / 1000
    assert grown["vllm:e2e_request_latency_seconds_sum"] <= lasted
    assert made.total.output_tokens_per_second * made.seconds == pytest.approx(84)


def test_adapters_take_turns_and_every_output_has_its_length(plan):
    made = run_load(replace(plan, warmup=1))
    assert [one.adapter for one in made.by_adapter] == ["complaints", "other", None]
    for one in made.by_adapter:
        assert (one.num_requests, one.num_failed, one.output_tokens) == (4, 0, 28)
        assert one.ttft_ms["p50"] <= one.ttft_ms["p90"] <= one.ttft_ms["p99"] <= one.e2e_ms["p99"]
    assert made.errors == {}


def test_no_more_are_in_flight_than_may(server, plan):
    most = 0

    async def watched() -> None:
        nonlocal most
        async with httpx.AsyncClient(base_url=plan.url) as client:
            while True:
                engine = (await client.get("/info")).json()["engine"]
                most = max(most, engine["num_running"] + engine["num_waiting"])

    async def both() -> None:
        from server.cli.load import load

        watch = asyncio.create_task(watched())
        await load(replace(plan, concurrency=2, max_new_tokens=60))
        watch.cancel()

    asyncio.run(both())
    assert 1 <= most <= 2


def test_percentiles_of_a_load_with_known_times():
    outcomes = [
        SentRequest("a", sent_at=0.0, token_at=[0.1, 0.2, 0.4], num_tokens=3, ended_at=0.5),
        SentRequest("a", sent_at=1.0, token_at=[1.3, 1.4, 1.6], num_tokens=3, ended_at=1.6),
        SentRequest("b", sent_at=1.0, token_at=[1.3], ended_at=1.9, error="broken"),
    ]
    made = report(replace(PLAN, adapters=("a", "b")), outcomes, 2.0)
    a, b = made.by_adapter
    assert a.ttft_ms == {"p50": 200.0, "p90": 280.0, "p99": 298.0, "mean": 200.0}
    assert a.itl_ms["p50"] == 150.0
    assert (a.e2e_ms["mean"], a.output_tokens_per_second, a.requests_per_second) == (550.0, 3, 1)
    assert (b.num_requests, b.num_failed, b.ttft_ms) == (0, 1, None)
    assert (made.total.num_requests, made.errors) == (2, {"broken": 1})


def test_what_fails_on_the_way_is_counted_and_told(server, plan):
    made = run_load(replace(plan, max_new_tokens=600))
    assert (made.total.num_requests, made.total.num_failed) == (0, 12)
    assert sum(made.errors.values()) == 12
    assert all("at most 513 fit in all" in error for error in made.errors)
    words = ["bench", "--url", server.base_url, "-n", 3, "--max-new-tokens", 600, "--warmup", 0]
    told = run(*words)
    assert told.exit_code == 1
    assert "3 failed: inputs and max_new_tokens take" in told.stderr


def test_a_stream_that_breaks_off_is_a_failure():
    frame = b'data:{"index":1,"token":{"id":1},"generated_text":null,"details":null}\n\n'
    for body in (b"", frame, frame + b'data:{"error":"it ended","error_type":"generation"}\n\n'):
        with something(200, body, "text/event-stream") as url:
            made = run_load(replace(PLAN, url=url, num_requests=2))
        assert made.total.num_failed == 2
    assert made.errors == {"it ended": 2}


def test_nobody_there_is_told_before_anything_is_sent(plan):
    with pytest.raises(ServerRefused, match="nothing answers"):
        run_load(replace(plan, url="http://127.0.0.1:9"))
    with pytest.raises(ServerRefused, match="no adapter 'nobody'"):
        run_load(replace(plan, adapters=("nobody",), warmup=1))
    with pytest.raises(ValueError, match="came neither"):
        run_load(replace(plan, concurrency=None))


def test_bench_prints_a_table_and_json(server):
    words = ["bench", "--url", server.base_url, "--adapters", "complaints,other", "-n", 6]
    words += ["--max-new-tokens", 5, "--prompt-tokens", 4, "-c", 2]
    table = run(*words).output
    assert "30 tokens of 6 requests" in table
    assert all(word in table for word in ("complaints", "other", "all"))
    told = json.loads(run(*words, "--rate", 40, "--json").stdout)
    assert told["plan"]["adapters"] == ["complaints", "other"]
    assert told["total"]["output_tokens"] == 30
    assert told["by_adapter"][0]["itl_ms"].keys() == {"p50", "p90", "p99", "mean"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a running server"),
        (["--url", "http://127.0.0.1:9"], "nothing answers"),
        (["--url", "http://127.0.0.1:9", "--rate", "0"], "more than 0 requests a second"),
    ],
)
def test_bench_refuses_with_one_line(words, said):
    assert said in refusal("bench", *words)
