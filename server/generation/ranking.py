"""Ranks labels by their likelihood after a prompt.

A label's score is the log-likelihood of its tokens: the separator, the label, and the end-of-sequence
token if the adapter was trained with one. Every label is a separate engine request. They run
concurrently, batched with other traffic, and the engine computes their shared prompt once. Independent
of HTTP and JSON.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from server.engine.scoring import score_of, scoring
from server.errors import RequestInvalid
from server.generation.generator import Generation, Generator, Options, Prompt
from server.store.registry import AdapterRecord

Normalization = Literal["sum", "token_mean"]
Target = tuple[int, ...]

_DEFAULT_SEPARATOR = " "
# Retry interval when the queue is full.
_RETRY_SECONDS = 0.05


@dataclass(frozen=True)
class Ranking:
    """The ranking for one prompt.

    Attributes:
        label: the most likely label; ties go to the first given.
        scores: softmax of the log-probabilities over the given labels.
        logprobs: log-likelihood of each label, per token with "token_mean".
    """

    label: str
    scores: Mapping[str, float]
    logprobs: Mapping[str, float]


async def encode_labels(
    generator: Generator, labels: Sequence[str], adapter: AdapterRecord | None
) -> dict[str, Target]:
    """Token ids of every label as a target of this adapter: separator, label, end of sequence.

    Raises:
        RequestInvalid: a label has no tokens.
    """
    separator = _DEFAULT_SEPARATOR if adapter is None else adapter.target_separator
    append_eos = adapter is not None and bool(adapter.append_eos)
    texts = [separator + label for label in labels]
    targets = await generator.encode_targets(texts, append_eos=append_eos)
    return dict(zip(labels, targets, strict=True))


async def rank(
    generator: Generator,
    prompts: Sequence[Prompt],
    targets: Mapping[str, Target],
    adapter: AdapterRecord | None,
    *,
    normalization: Normalization,
    max_parallel: int,
    on_begun: Callable[[Generation], None] = lambda generation: None,
) -> list[Ranking]:
    """Rank the labels after every prompt.

    Args:
        generator: submits requests to the engine.
        prompts: at least one token each.
        targets: see `encode_labels`.
        adapter: None is the base.
        normalization: "sum" of a target's log-probabilities, or their mean per token.
        max_parallel: maximum number of concurrent requests.
        on_begun: called with each submitted request, for its timings.

    Raises:
        RequestInvalid: an empty prompt.
        TooLong: a prompt with a label does not fit the base or the engine.
        EngineOverloaded, EngineUnavailable, RequestFailed: as for generations; all requests are aborted.
    """
    wanted = [(prompt, target) for prompt in prompts for target in targets.values()]
    logprobs = await _score_all(generator, wanted, adapter, max_parallel, on_begun)
    if normalization == "token_mean":
        pairs = zip(logprobs, wanted, strict=True)
        logprobs = [logprob / len(target) for logprob, (_, target) in pairs]
    size = len(targets)
    return [
        ranking_of(dict(zip(targets, logprobs[start : start + size], strict=True)))
        for start in range(0, len(logprobs), size)
    ]


def ranking_of(logprobs: Mapping[str, float]) -> Ranking:
    """A ranking from the log-probability of each label."""
    highest = max(logprobs.values())
    weights = {label: math.exp(value - highest) for label, value in logprobs.items()}
    total = sum(weights.values())
    scores = {label: weight / total for label, weight in weights.items()}
    return Ranking(max(logprobs, key=lambda label: logprobs[label]), scores, logprobs)


async def _score_all(
    generator: Generator,
    wanted: Sequence[tuple[Prompt, Target]],
    adapter: AdapterRecord | None,
    max_parallel: int,
    on_begun: Callable[[Generation], None],
) -> list[float]:
    _check_lengths(generator, wanted, adapter)
    batch = uuid.uuid4().hex
    logprobs = [0.0] * len(wanted)
    # Each free worker takes the next. Requests are created lazily, since each holds its prompt.
    turns = deque(enumerate(wanted))
    num_working = min(max_parallel, len(wanted))
    has_begun = False

    async def work() -> None:
        nonlocal num_working, has_begun
        while turns:
            index, (prompt, target) = turns.popleft()
            request = generator.prepare(
                Prompt(prompt.text, prompt.token_ids + target),
                adapter,
                _options(prompt),
                f"{batch}-{index}",
            )
            submit = generator.try_submit if has_begun else generator.submit
            generation = submit(request, Options(request.sampling))
            if generation is None:
                # A started ranking is not abandoned because the queue is full.
                turns.appendleft((index, (prompt, target)))
                if num_working > 1:
                    num_working -= 1
                    return
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            has_begun = True
            on_begun(generation)
            try:
                async for _ in generation:
                    pass
            finally:
                generation.abort()
            logprobs[index] = score_of(generation.prompt_logprobs, len(target))

    tasks = [asyncio.ensure_future(work()) for _ in range(num_working)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return logprobs


def _options(prompt: Prompt) -> Options:
    return Options(scoring(len(prompt.token_ids)), max_new_tokens=1)


def _check_lengths(
    generator: Generator, wanted: Sequence[tuple[Prompt, Target]], adapter: AdapterRecord | None
) -> None:
    """Check all lengths before the first request is submitted."""
    if any(not prompt.token_ids for prompt, _ in wanted):
        # The first token of a text has no likelihood, so a target needs a prompt.
        raise RequestInvalid(
            "inputs: expected at least one token, came an empty text",
            field="inputs",
            expected="at least one token",
            came="none",
        )
    prompt, target = max(wanted, key=lambda one: len(one[0].token_ids) + len(one[1]))
    generator.check_length(len(prompt.token_ids) + len(target), adapter, _options(prompt))
