"""Many generation requests over HTTP at once: streamed or whole, joining late, some dropped midway.

Knows TGI's routes; not adapters, models or engines.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

_PERIOD_SECONDS = 0.005


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        name: unique among the calls of a load.
        prompt: the text.
        adapter: its name, or None for the base.
        max_new_tokens: exactly so many come, since the end of sequence is ignored.
        streamed: /generate_stream instead of /generate.
        delay: seconds to wait before it is sent.
        drop_after: hang up after so many tokens of a stream; a whole reply is given up after so
            many hundredths of a second. None stays to the end.
    """

    name: str
    prompt: str
    adapter: str | None = None
    max_new_tokens: int = 16
    streamed: bool = False
    delay: float = 0.0
    drop_after: int | None = None

    @property
    def path(self) -> str:
        """The route, adapter included."""
        route = "/generate_stream" if self.streamed else "/generate"
        return route if self.adapter is None else f"{route}?adapter={self.adapter}"

    @property
    def body(self) -> dict[str, Any]:
        """TGI's body."""
        parameters = {
            "max_new_tokens": self.max_new_tokens,
            "details": True,
            "do_sample": False,
            "ignore_eos": True,
        }
        return {"inputs": self.prompt, "parameters": parameters}


@dataclass
class Outcome:
    """What came of a load.

    Attributes:
        tokens: call -> token ids; of a dropped one, those that came before.
        peak: the largest value that `watch` gave while the load ran.
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    peak: int = 0


def run_load(
    base_url: httpx.URL | str, calls: Iterable[Call], watch: Callable[[], int] = lambda: 0
) -> Outcome:
    """Send all calls, each after its delay, and wait until every one has ended or was dropped."""
    return asyncio.run(_run(str(base_url), list(calls), watch))


async def _run(base_url: str, calls: list[Call], watch: Callable[[], int]) -> Outcome:
    outcome = Outcome()
    limits = httpx.Limits(max_connections=len(calls))
    async with httpx.AsyncClient(base_url=base_url, timeout=240, limits=limits) as client:
        watcher = asyncio.create_task(_watch(outcome, watch))
        answers = await asyncio.gather(*(_send(client, call) for call in calls))
        watcher.cancel()
    outcome.tokens = {call.name: ids for call, ids in zip(calls, answers, strict=True)}
    return outcome


async def _watch(outcome: Outcome, watch: Callable[[], int]) -> None:
    while True:
        outcome.peak = max(outcome.peak, watch())
        await asyncio.sleep(_PERIOD_SECONDS)


async def _send(client: httpx.AsyncClient, call: Call) -> list[int]:
    await asyncio.sleep(call.delay)
    return await (_streamed(client, call) if call.streamed else _whole(client, call))


async def _whole(client: httpx.AsyncClient, call: Call) -> list[int]:
    patience = None if call.drop_after is None else call.drop_after / 100
    try:
        async with asyncio.timeout(patience):
            reply = await client.post(call.path, json=call.body)
    except TimeoutError:
        return []
    assert reply.status_code == 200, reply.text
    details = reply.json()["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"])
    return [token["id"] for token in details["tokens"]]


async def _streamed(client: httpx.AsyncClient, call: Call) -> list[int]:
    ids: list[int] = []
    last: dict[str, Any] = {}
    async with client.stream("POST", call.path, json=call.body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if not line:
                continue
            last = json.loads(line.removeprefix("data:"))
            ids.append(last["token"]["id"])
            if len(ids) == call.drop_after:
                return ids
    assert last["details"]["finish_reason"] == "length"
    return ids
