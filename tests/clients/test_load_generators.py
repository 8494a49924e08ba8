"""Load generators' figures agree with what the server counted: GET /metrics before and after.

`vllm bench serve` is played by `vllm_bench.py`; guidellm is the real one. Numbers of requests and of
tokens are equal. Times are compared only in what must hold on any machine: what a client waited
contains what the server measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from tests.clients.conftest import ADAPTERS, BASE, World
from tests.clients.counted import Counted
from tests.clients.standalone import require
from tests.clients.vllm_bench import bench, first_model

pytestmark = pytest.mark.clients

MODELS = (BASE, *ADAPTERS)
PROMPTS = [
    "the tweet is a complaint",
    "no complaint at all",
    "Label : Übergrößen kosten 5 €",
    "naïve 漢字 🙂 emoji",
    "Label :" * 12,
]
MAX_TOKENS = 9


def assert_agree(
    counted: Counter[str], *, requests: int, prompt_tokens: int, output_tokens: int
) -> None:
    assert counted["vllm:request_success_total"] == requests
    assert counted["vllm:prompt_tokens_total"] == prompt_tokens
    assert counted["vllm:generation_tokens_total"] == output_tokens
    assert counted["vllm:time_to_first_token_seconds_count"] == requests
    assert counted["vllm:e2e_request_latency_seconds_count"] == requests


def assert_of_adapter(counted: Counter[str], model: str, requests: int, output_tokens: int) -> None:
    """What the server counted for one model; the base is counted as one more adapter."""
    assert counted[f"graftwork_adapter_requests_total {model}"] == requests
    assert counted[f"graftwork_adapter_generation_tokens_total {model}"] == output_tokens
    assert counted[f"graftwork_adapter_time_to_first_token_seconds_count {model}"] == requests


# --- vllm bench serve ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "concurrency"), [(float("inf"), None), (float("inf"), 2), (60.0, None)]
)
def test_what_vllm_bench_serve_sends_with_adapters_in_turn(world, rate, concurrency):
    """Texts and token ids, all at once, two at a time, and at random distances."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(10)]
    prompts += [world.tokenizer(text).input_ids for text in prompts[:5]]
    counted = Counted(world.url)
    answers, figures = asyncio.run(
        bench(
            world.url,
            prompts,
            models=MODELS,
            max_tokens=MAX_TOKENS,
            request_rate=rate,
            max_concurrency=concurrency,
        )
    )
    assert [answer.error for answer in answers] == [None] * len(prompts)
    assert figures.completed == len(prompts)
    assert figures.total_output == MAX_TOKENS * len(prompts)
    lengths = [len(p if isinstance(p, list) else world.tokenizer(p).input_ids) for p in prompts]
    assert figures.total_input == sum(lengths)
    assert [answer.request_id for answer in answers] == [a.ask.request_id for a in answers]
    server = counted.since(len(prompts))
    assert_agree(
        server,
        requests=figures.completed,
        prompt_tokens=figures.total_input,
        output_tokens=figures.total_output,
    )
    n = len(prompts)
    first, whole = (
        server[f"vllm:{name}_seconds_sum"]
        for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert 0 < first <= figures.mean_ttft * n
    assert first <= whole <= figures.mean_e2el * n
    assert server["vllm:inter_token_latency_seconds_count"] == (MAX_TOKENS - 1) * n
    for model in MODELS:
        assert_of_adapter(server, model, n // len(MODELS), MAX_TOKENS * n // len(MODELS))


def test_every_model_says_its_own_under_load(world):
    prompts = [PROMPTS[0]] * 9
    answers, _ = asyncio.run(bench(world.url, prompts, models=MODELS, max_tokens=MAX_TOKENS))
    texts = {model: {a.text for a in answers if a.ask.model == model} for model in MODELS}
    assert all(len(one) == 1 for one in texts.values())
    assert len(set.union(*texts.values())) == len(MODELS)
    for model in MODELS:
        body = {
            "model": model,
            "prompt": PROMPTS[0],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        whole = world.client.post("/v1/completions", json=body).json()
        assert {whole["choices"][0]["text"]} == texts[model]


def test_without_a_model_the_base_is_benchmarked(world):
    async def ask() -> tuple[str, str]:
        async with aiohttp.ClientSession() as session:
            return await first_model(session, world.url)

    assert asyncio.run(ask()) == (BASE, BASE)


def test_a_model_that_is_not_there_fails_and_is_not_the_base(world):
    counted = Counted(world.url)
    answers, figures = asyncio.run(
        bench(world.url, PROMPTS, models=[BASE, "nobody"], max_tokens=MAX_TOKENS)
    )
    failed = [answer for answer in answers if answer.ask.model == "nobody"]
    assert len(failed) == figures.failed == 2
    assert all("404" in answer.error and "nobody" in answer.error for answer in failed)
    assert_agree(
        counted.since(3),
        requests=3,
        prompt_tokens=figures.total_input,
        output_tokens=3 * MAX_TOKENS,
    )


# --- guidellm ------------------------------------------------------------------------------


def guidellm(world: World, home: Path, *options: str, model: str | None, **backend: str) -> dict:
    """One run of guidellm: the metrics of its one benchmark, as it reports them."""
    named = {} if model is None else {"model": model}
    arguments = {"kind": "openai_http", "target": world.url, **named, **backend}
    report = home / "report.json"
    counted = Counted(world.url)
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "guidellm",
                "run",
                "--backend",
                ",".join(f"{name}={value}" for name, value in arguments.items()),
                "--tokenizer",
                f"kind=huggingface_auto,model={world.base_dir}",
                "--output",
                f"kind=json,path={report}",
                "--disable-console",
                *options,
            ],
            cwd=home,
            env={
                **os.environ,
                "PYTHONPATH": str(require("guidellm")),
                "HF_HOME": str(home / "hf"),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        meanwhile = counted.since(0)
        ended = meanwhile["vllm:request_success_total"]
        left = meanwhile["vllm:num_requests_running"] + meanwhile["vllm:num_requests_waiting"]
        pytest.fail(f"no end of guidellm; {ended} requests ended, {left} are left; {late.stderr!r}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    return benchmark["metrics"]


def agree_with_guidellm(world: World, counted: Counted, metrics: dict, requests: int) -> None:
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["total"]) == (requests, requests)
    told = {
        name: metrics[name]["successful"]
        for name in ("prompt_token_count", "output_token_count", "time_to_first_token_ms")
    }
    server = counted.since(requests)
    assert_agree(
        server,
        requests=requests,
        # sums of floats
        prompt_tokens=round(told["prompt_token_count"]["total_sum"]),
        output_tokens=round(told["output_token_count"]["total_sum"]),
    )
    first = server["vllm:time_to_first_token_seconds_sum"]
    assert 0 < first * 1000 <= told["time_to_first_token_ms"]["total_sum"]


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text, "output_tokens_count": MAX_TOKENS}) for text in PROMPTS]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("model", MODELS)
def test_guidellm_with_given_prompts(world, tmp_path, rows, model):
    counted = Counted(world.url)
    metrics = guidellm(
        world,
        tmp_path,
        "--data",
        f"kind=json_file,path={rows}",
        "--profile",
        "kind=concurrent,streams=3",
        model=model,
        request_format="/v1/completions",
    )
    agree_with_guidellm(world, counted, metrics, len(PROMPTS))
    output_tokens = MAX_TOKENS * len(PROMPTS)
    assert round(metrics["output_token_count"]["successful"]["total_sum"]) == output_tokens
    assert_of_adapter(counted.since(0), model, len(PROMPTS), output_tokens)


def test_guidellm_where_nothing_is_said(world, tmp_path):
    """It makes prompts up, sends them as chats, and asks /v1/models for a name: the base."""
    counted = Counted(world.url)
    metrics = guidellm(
        world,
        tmp_path,
        "--data",
        "kind=synthetic_text,prompt_tokens=24,output_tokens=6",
        "--profile",
        "kind=synchronous",
        "--constraint",
        "kind=max_requests,count=6",
        model=None,
    )
    agree_with_guidellm(world, counted, metrics, 6)
    assert round(metrics["output_token_count"]["successful"]["total_sum"]) == 36
