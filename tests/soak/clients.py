"""Clients that send asks over HTTP, some of which leave in the middle; outcomes go into a tally.

A stream is read to its end and must be whole. Any 5xx, time-out, broken stream, unexpected status or
answer that is not the solo answer is a fault.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx

from tests.soak.asks import Answer, Ask
from tests.soak.tally import Tally

# Far longer than any answer takes with a queue that is bounded.
TIMEOUT = httpx.Timeout(180.0)
# Less than the server's, so that no connection is used just as it is closed.
_KEEPALIVE_SECONDS = 2.0


class Gone(Exception):
    """The client leaves here."""


def new_client(url: str) -> httpx.AsyncClient:
    """An HTTP client with as many connections as it takes."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_SECONDS)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, trust_env=False)


class Clients:
    """Sends asks.

    Args:
        http: to the server.
        tally: where outcomes go.
        draw: the source of chance.
        leave_share: of the requests whose client leaves before the end.
    """

    def __init__(
        self, http: httpx.AsyncClient, tally: Tally, draw: random.Random, leave_share: float = 0.0
    ) -> None:
        self.http = http
        self.tally = tally
        self.draw = draw
        self.leave_share = leave_share
        self.solo: dict[str, Any] = {}

    async def learn(self, ask: Ask) -> None:
        """Note the answer that an ask gets alone.

        Raises:
            ValueError: it gets none.
        """
        assert ask.key is not None
        status, reply, _ = await self._exchange(ask, None)
        if status != 200:
            raise ValueError(f"{ask.kind}: {status} {reply}")
        answer = ask.answer(reply)
        self._count(answer)
        known = self.solo.setdefault(ask.key, answer.text)
        if known != answer.text:
            self.tally.fault(ask.kind, f"{ask.key}: alone once {known}, once {answer.text}")

    async def send(self, ask: Ask) -> None:
        """One request to its end, or to where its client leaves."""
        leave_after = None
        if self.draw.random() < self.leave_share:
            leave_after = self.draw.choice([0.0, 0.05, 0.2, 0.6]) * self.draw.random()
        try:
            status, reply, headers = await self._exchange(ask, leave_after)
            self._judge(ask, status, reply, headers)
        except Gone:
            self.tally.outcomes[ask.kind, "left"] += 1
        except httpx.HTTPError as error:
            self.tally.fault(ask.kind, f"{type(error).__name__}: {error}")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self.tally.fault(ask.kind, f"{type(error).__name__}: {error} in {ask.body}")

    def _judge(self, ask: Ask, status: int, reply: Any, headers: httpx.Headers) -> None:
        if status == 429:
            if "retry-after" not in headers:
                self.tally.fault(ask.kind, f"429 without Retry-After: {reply}")
            self.tally.outcomes[ask.kind, "429"] += 1
            return
        if status not in ask.expected:
            self.tally.fault(ask.kind, f"{status} {reply} to {ask.body}")
            return
        if status != 200:
            if not reply.get("error"):
                self.tally.fault(ask.kind, f"{status} without words: {reply}")
            self.tally.outcomes[ask.kind, str(status)] += 1
            return
        answer = ask.answer(reply)
        self._count(answer)
        if ask.key is not None:
            self.tally.compared += 1
            if self.solo[ask.key] != answer.text:
                self.tally.fault(
                    ask.kind, f"{ask.key}: alone {self.solo[ask.key]}, now {answer.text}"
                )
                return
        self.tally.outcomes[ask.kind, "ok"] += 1

    def _count(self, answer: Answer) -> None:
        self.tally.sequences += answer.sequences
        self.tally.tokens += answer.tokens

    async def _exchange(
        self, ask: Ask, leave_after: float | None
    ) -> tuple[int, Any, httpx.Headers]:
        route = ("POST", ask.path)
        self.tally.sent[route] += 1
        began: list[int] = []
        query = {} if ask.adapter is None else {"adapter": ask.adapter}
        try:
            async with (
                asyncio.timeout(leave_after),
                self.http.stream("POST", ask.path, params=query, json=ask.body) as reply,
            ):
                began.append(reply.status_code)
                self.tally.replies[*route, reply.status_code] += 1
                body = await reply.aread()
        except TimeoutError:
            raise Gone from None
        finally:
            if not began:
                self.tally.left[route] += 1
        read = frames if ask.streams and reply.status_code == 200 else json.loads
        return reply.status_code, read(body.decode()), reply.headers


def frames(text: str) -> list[Any]:
    """The events of a stream.

    Raises:
        ValueError: it broke off, or says that it failed.
    """
    if not text.endswith("\n\n"):
        raise ValueError(f"a stream that broke off: {text[-200:]!r}")
    found: list[Any] = []
    for frame in text[:-2].split("\n\n"):
        data = frame.removeprefix("data:").strip()
        parsed = data if data == "[DONE]" else json.loads(data)
        if isinstance(parsed, dict) and "error" in parsed:
            raise ValueError(f"a stream that failed: {data}")
        found.append(parsed)
    return found
