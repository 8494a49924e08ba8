"""The traffic of `vllm bench serve --backend openai`, and the figures that it prints.

vLLM itself is too heavy to install for this. What is kept is what a server can tell apart: the
body and headers of a request, adapters in turn as `--lora-modules` with `--lora-assignment
round-robin` sends them, the way in which chunks are cut into messages (the space after `data:`
and LF LF are expected), which chunk counts as the first token, and that the number of tokens comes
from the usage at the end. Knows nothing of Graftwork.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import aiohttp

_DATA = "data: "


@dataclass(frozen=True)
class Ask:
    """One request of the load.

    Attributes:
        model: as in the body; an adapter or the base.
        prompt: a text or token ids.
        max_tokens: exactly so many come, since the end of sequence is ignored.
        request_id: sent as `x-request-id`.
    """

    model: str
    prompt: str | list[int]
    max_tokens: int
    request_id: str


@dataclass
class Answer:
    """What came of a request; times in seconds.

    Attributes:
        ask: the request.
        error: why it failed; None where it succeeded.
        text: of all chunks together.
        prompt_tokens: of the usage at the end.
        output_tokens: of the usage at the end.
        first_token: from sending to the first chunk with a choice.
        between_tokens: from each chunk to the next.
        latency: from sending to the last chunk with a choice.
        request_id: of the reply's headers.
    """

    ask: Ask
    error: str | None = None
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token: float | None = None
    between_tokens: list[float] = field(default_factory=list)
    latency: float = 0.0
    request_id: str | None = None


@dataclass(frozen=True)
class Figures:
    """What the benchmark prints; times in seconds."""

    completed: int
    failed: int
    total_input: int
    total_output: int
    duration: float
    request_throughput: float
    output_throughput: float
    mean_ttft: float
    median_ttft: float
    mean_tpot: float
    mean_itl: float
    mean_e2el: float


class Messages:
    """Cuts a byte stream into messages as the benchmark does, stripped chunks included."""

    def __init__(self) -> None:
        self._buffer = ""
        self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Messages that this chunk completes."""
        self._buffer += self._decode(chunk.strip())
        *whole, self._buffer = self._buffer.split("\n\n")
        yield from (message.strip() for message in whole if message.strip())
        # The blank line was stripped with the chunk: whatever is complete is a message.
        if self._buffer.startswith(_DATA) and self._complete():
            yield self._buffer.strip()
            self._buffer = ""

    def _complete(self) -> bool:
        content = self._buffer.removeprefix(_DATA).strip()
        if content == "[DONE]":
            return True
        try:
            json.loads(content)
        except json.JSONDecodeError:
            return False
        return True


async def first_model(session: aiohttp.ClientSession, base_url: str) -> tuple[str, str]:
    """Id and root of the first model listed: what is benchmarked where no model is named."""
    async with session.get(f"{base_url}/v1/models") as reply:
        reply.raise_for_status()
        first = (await reply.json())["data"][0]
        return first["id"], first["root"]


async def send(session: aiohttp.ClientSession, base_url: str, ask: Ask) -> Answer:
    """One request, streamed to its end."""
    body = {
        "model": ask.model,
        "prompt": ask.prompt,
        "repetition_penalty": 1.0,
        "max_tokens": ask.max_tokens,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    headers = {"x-request-id": ask.request_id}
    answer = Answer(ask)
    url = f"{base_url}/v1/completions"
    began = time.perf_counter()
    try:
        async with session.post(url, json=body, headers=headers) as reply:
            answer.request_id = reply.headers.get("x-request-id")
            if reply.status != 200:
                answer.error = f"{reply.status} {await reply.text()}"
                return answer
            messages = Messages()
            async for chunk in reply.content.iter_any():
                for message in messages.feed(chunk):
                    _take(answer, message, began)
    except (aiohttp.ClientError, ValueError) as error:
        answer.error = repr(error)
    if answer.error is None and answer.first_token is None:
        answer.error = "no chunk had a choice"
    return answer


def _take(answer: Answer, message: str, began: float) -> None:
    content = message.removeprefix(_DATA)
    if message.startswith(":") or content == "[DONE]":
        return
    data: dict[str, Any] = json.loads(content)
    if "error" in data:
        answer.error = str(data["error"])
    elif choices := data.get("choices"):
        passed = time.perf_counter() - began
        if answer.first_token is None:
            answer.first_token = passed
        else:
            answer.between_tokens.append(passed - answer.latency)
        answer.latency = passed
        answer.text += choices[0].get("text") or ""
    elif usage := data.get("usage"):
        answer.output_tokens = usage["completion_tokens"]
        answer.prompt_tokens = usage["prompt_tokens"]


async def bench(
    base_url: str,
    prompts: Sequence[str | list[int]],
    *,
    models: Sequence[str],
    max_tokens: int,
    request_rate: float = float("inf"),
    max_concurrency: int | None = None,
    seed: int = 0,
) -> tuple[list[Answer], Figures]:
    """Send every prompt once, with the models in turn.

    Args:
        base_url: without a slash at the end.
        prompts: texts or token ids.
        models: base and adapters; prompt i goes to model i modulo their number.
        max_tokens: output tokens a request.
        request_rate: requests a second, at exponential distances; infinite sends all at once.
        max_concurrency: at most so many in flight; None is without limit.
        seed: of the distances.
    """
    chosen = random.Random(seed)
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    asks = [
        Ask(model, prompt, max_tokens, f"bench-{seed}-{index}")
        for index, (prompt, model) in enumerate(zip(prompts, itertools.cycle(models), strict=False))
    ]
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max_concurrency or 0),
        timeout=aiohttp.ClientTimeout(total=600),
    ) as session:

        async def gated(ask: Ask) -> Answer:
            async with gate:
                return await send(session, base_url, ask)

        began = time.perf_counter()
        tasks = []
        for ask in asks:
            tasks.append(asyncio.create_task(gated(ask)))
            if request_rate != float("inf"):
                await asyncio.sleep(chosen.expovariate(request_rate))
        answers = await asyncio.gather(*tasks)
    return answers, _figures(answers, time.perf_counter() - began)


def _figures(answers: Sequence[Answer], duration: float) -> Figures:
    good = [answer for answer in answers if answer.error is None]
    first = [answer.first_token or 0.0 for answer in good]
    total_output = sum(answer.output_tokens for answer in good)
    per_token = [
        (answer.latency - (answer.first_token or 0.0)) / (answer.output_tokens - 1)
        for answer in good
        if answer.output_tokens > 1
    ]
    between = [distance for answer in good for distance in answer.between_tokens]
    return Figures(
        completed=len(good),
        failed=len(answers) - len(good),
        total_input=sum(answer.prompt_tokens for answer in good),
        total_output=total_output,
        duration=duration,
        request_throughput=len(good) / duration,
        output_throughput=total_output / duration,
        mean_ttft=mean(first or [0.0]),
        median_ttft=median(first or [0.0]),
        mean_tpot=mean(per_token or [0.0]),
        mean_itl=mean(between or [0.0]),
        mean_e2el=mean([answer.latency for answer in good] or [0.0]),
    )
