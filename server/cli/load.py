"""Load on a running server, and what its clients felt: tokens a second, time to the first token.

    closed loop   so many requests are in flight, always
    open loop     requests come at a rate, as a Poisson process, whether others have ended or not

Every request is a stream of `/generate_stream`; adapters take turns. Prompts are random words, cut to
their number of tokens by the server (`truncate`), so that no two share a prefix. Depends on HTTP and
TGI's frames only, not on models, engines or tables.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from server.cli.http_client import (
    ServerRefused,
    checked_url,
    key_headers,
    refusal_of,
    unreachable,
    uses_proxy,
)

_PERCENTILES = (50, 90, 99)
_TIMEOUT = httpx.Timeout(600.0, connect=30.0)
_FRAME_END = b"\n\n"
_FAILED = b'data:{"error"'


@dataclass(frozen=True)
class LoadPlan:
    """What to send.

    Attributes:
        url: of the server.
        adapters: requested in turn; None is the base.
        num_requests: in all.
        concurrency: requests in flight at most; None is no limit, and needs a rate.
        rate: requests a second on average; None sends the next one when one has ended.
        prompt_tokens: of every prompt, without virtual tokens.
        max_new_tokens: exactly so many come: the end of sequence is ignored.
        warmup: requests for each adapter that are sent first and not counted.
        seed: of prompts and arrivals.
        api_key: sent with every request; None sends none.
    """

    url: str
    adapters: tuple[str | None, ...] = (None,)
    num_requests: int = 100
    concurrency: int | None = 8
    rate: float | None = None
    prompt_tokens: int = 48
    max_new_tokens: int = 64
    warmup: int = 1
    seed: int = 0
    api_key: str | None = field(default=None, repr=False)


@dataclass
class SentRequest:
    """How one request went.

    Attributes:
        adapter: the one requested; None is the base.
        sent_at: monotonic seconds.
        token_at: when each token came, monotonic seconds.
        num_tokens: tokens that the server counted; None where it did not get so far.
        ended_at: monotonic seconds.
        error: why it failed; None where it did not.
    """

    adapter: str | None
    sent_at: float = 0.0
    token_at: list[float] = field(default_factory=list)
    num_tokens: int | None = None
    ended_at: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Figures:
    """What the requests of one adapter, or all of them, add up to.

    Attributes:
        adapter: None is the base, or all where they are added up.
        num_requests: those that came to an end.
        num_failed: those that did not.
        prompt_tokens: of the former, in all.
        output_tokens: the same.
        output_tokens_per_second: over the whole time of the load.
        requests_per_second: the same.
        ttft_ms: time to the first token, "p50", "p90", "p99" and "mean".
        itl_ms: between two tokens of a request.
        e2e_ms: from sending to the last token.
    """

    adapter: str | None
    num_requests: int
    num_failed: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    requests_per_second: float
    ttft_ms: dict[str, float] | None
    itl_ms: dict[str, float] | None
    e2e_ms: dict[str, float] | None


@dataclass(frozen=True)
class LoadReport:
    """A load that was run.

    Attributes:
        seconds: from the first request to the end of the last.
        total: all requests.
        by_adapter: in the order of the plan.
        errors: why requests failed, and how often.
    """

    seconds: float
    total: Figures
    by_adapter: list[Figures]
    errors: dict[str, int]


def run_load(plan: LoadPlan) -> LoadReport:
    """As `load`, from outside an event loop."""
    return asyncio.run(load(plan))


async def load(plan: LoadPlan) -> LoadReport:
    """Send everything and wait for the end.

    Raises:
        ServerRefused: the server does not answer, or refuses the first request; what fails later is
            counted.
        ValueError: neither a rate nor a concurrency.
    """
    if plan.rate is None and plan.concurrency is None:
        raise ValueError("expected a rate, a concurrency or both; came neither")
    url = checked_url(plan.url)
    source = random.Random(plan.seed)  # noqa: S311 - prompts, not secrets
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url,
        timeout=_TIMEOUT,
        limits=limits,
        trust_env=uses_proxy(url),
        headers=key_headers(plan.api_key),
    ) as client:
        await _warm_up(client, plan, source)
        prompts = [_prompt(plan, source) for _ in range(plan.num_requests)]
        began = time.monotonic()
        if plan.rate is None:
            outcomes = await _closed_loop(client, plan, prompts)
        else:
            outcomes = await _open_loop(client, plan, prompts, plan.rate)
        seconds = time.monotonic() - began
    return report(plan, outcomes, seconds)


def report(plan: LoadPlan, outcomes: Sequence[SentRequest], seconds: float) -> LoadReport:
    """Add outcomes up."""
    by_adapter = [
        _figures(plan, [one for one in outcomes if one.adapter == adapter], seconds, adapter)
        for adapter in dict.fromkeys(plan.adapters)
    ]
    errors = Counter(one.error for one in outcomes if one.error is not None)
    return LoadReport(seconds, _figures(plan, outcomes, seconds, None), by_adapter, dict(errors))


async def _warm_up(client: httpx.AsyncClient, plan: LoadPlan, source: random.Random) -> None:
    """Find out whether the server answers; bring adapters to the device."""
    refused = await _refused_at_all(client)
    if refused is not None:
        raise refused
    for adapter in dict.fromkeys(plan.adapters):
        for _ in range(plan.warmup):
            outcome = await _send(client, plan, adapter, _prompt(plan, source))
            if outcome.error is not None:
                raise ServerRefused(outcome.error)


async def _refused_at_all(client: httpx.AsyncClient) -> ServerRefused | None:
    """Why a server refuses every request; None where it does not."""
    url = str(client.base_url).rstrip("/")
    try:
        reply = await client.get("/health")
    except httpx.HTTPError as error:
        return unreachable(url, error)
    return None if reply.is_success else refusal_of(reply, url)


async def _closed_loop(
    client: httpx.AsyncClient, plan: LoadPlan, prompts: Sequence[str]
) -> list[SentRequest]:
    outcomes: list[SentRequest] = []
    waiting = iter(enumerate(prompts))

    async def one_after_another() -> None:
        for number, prompt in waiting:
            adapter = plan.adapters[number % len(plan.adapters)]
            outcomes.append(await _send(client, plan, adapter, prompt))

    await asyncio.gather(*(one_after_another() for _ in range(plan.concurrency or 1)))
    return outcomes


async def _open_loop(
    client: httpx.AsyncClient, plan: LoadPlan, prompts: Sequence[str], rate: float
) -> list[SentRequest]:
    arrivals = random.Random(plan.seed + 1)  # noqa: S311 - arrivals, not secrets
    room = asyncio.Semaphore(plan.concurrency or len(prompts) or 1)

    async def one(number: int, prompt: str) -> SentRequest:
        async with room:
            return await _send(client, plan, plan.adapters[number % len(plan.adapters)], prompt)

    tasks: list[asyncio.Task[SentRequest]] = []
    due = time.monotonic()
    for number, prompt in enumerate(prompts):
        # From due time to due time: what one send took late does not slow the rest.
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(number, prompt)))
        due += arrivals.expovariate(rate)
    return list(await asyncio.gather(*tasks))


async def _send(
    client: httpx.AsyncClient, plan: LoadPlan, adapter: str | None, prompt: str
) -> SentRequest:
    parameters = {
        "max_new_tokens": plan.max_new_tokens,
        "truncate": plan.prompt_tokens,
        "do_sample": False,
        "ignore_eos": True,
        "details": True,
    }
    query = {} if adapter is None else {"adapter": adapter}
    outcome = SentRequest(adapter, sent_at=time.monotonic())
    try:
        async with client.stream(
            "POST",
            "/generate_stream",
            params=query,
            json={"inputs": prompt, "parameters": parameters},
        ) as reply:
            if reply.is_success:
                await _read(reply, outcome)
            else:
                await reply.aread()
                outcome.error = refusal_of(reply, str(client.base_url)).message
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.ended_at = time.monotonic()
    return outcome


async def _read(reply: httpx.Response, outcome: SentRequest) -> None:
    """Note when each frame came. Only the last is parsed: the load must not slow what it measures."""
    rest = last = b""
    async for block in reply.aiter_raw():
        now = time.monotonic()
        *frames, rest = (rest + block).split(_FRAME_END)
        for frame in frames:
            if frame.startswith(_FAILED):
                outcome.error = str(json.loads(frame.removeprefix(b"data:"))["error"])
                return
            last = frame
            outcome.token_at.append(now)
    details: dict[str, Any] = json.loads(last.removeprefix(b"data:") or b"{}").get("details") or {}
    outcome.num_tokens = details.get("generated_tokens")
    if outcome.num_tokens is None:
        outcome.error = "the stream ended before its last token"


def _prompt(plan: LoadPlan, source: random.Random) -> str:
    """Enough random words: each is at least one token."""
    return " ".join(
        "".join(source.choices(string.ascii_lowercase, k=source.randint(3, 8)))
        for _ in range(plan.prompt_tokens)
    )


def _figures(
    plan: LoadPlan, outcomes: Sequence[SentRequest], seconds: float, adapter: str | None
) -> Figures:
    done = [one for one in outcomes if one.error is None]
    output_tokens = sum(one.num_tokens or 0 for one in done)
    gaps = [
        after - before
        for one in done
        for before, after in zip(one.token_at, one.token_at[1:], strict=False)
    ]
    return Figures(
        adapter=adapter,
        num_requests=len(done),
        num_failed=len(outcomes) - len(done),
        prompt_tokens=len(done) * plan.prompt_tokens,
        output_tokens=output_tokens,
        output_tokens_per_second=output_tokens / max(seconds, 1e-9),
        requests_per_second=len(done) / max(seconds, 1e-9),
        ttft_ms=_spread([one.token_at[0] - one.sent_at for one in done if one.token_at]),
        itl_ms=_spread(gaps),
        e2e_ms=_spread([one.ended_at - one.sent_at for one in done]),
    )


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Percentiles and mean in milliseconds; None of nothing."""
    if not seconds:
        return None
    values = 1000 * np.asarray(seconds)
    spread = {f"p{p}": round(float(np.percentile(values, p)), 3) for p in _PERCENTILES}
    return {**spread, "mean": round(float(values.mean()), 3)}
