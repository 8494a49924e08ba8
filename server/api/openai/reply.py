"""What both of OpenAI's routes have in common: a checked request becomes a whole reply or a stream.

What a choice looks like is the route's `Shape`. Frames are `data: ` lines that end with LF LF, and
the last is `[DONE]`; a stream that breaks off ends with a frame that holds the error instead.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from adapters.registry import AdapterRecord
from server.api.errors import UNFORESEEN, body_of, tell
from server.api.headers import set_headers, timing_headers
from server.api.openai.batch import Batch
from server.api.openai.prompts import Given
from server.api.openai.schemas import MAX_SEQUENCES, OpenAIBody, StreamOptions
from server.api.services import Services
from server.api.sse import EventStream, unless_gone
from server.engine.request import GenerationRequest, TokenLogprob
from server.errors import Contradiction, RequestInvalid
from server.generation import (
    FinishReason,
    Generation,
    Generator,
    Options,
    Piece,
    mean_logprob,
)

log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"
_REASONS: dict[FinishReason, str] = {
    "length": "length",
    "eos_token": "stop",
    "stop_sequence": "stop",
}


@dataclass
class Output:
    """One sequence as far as it has been read.

    Attributes:
        given: its prompt.
        generation: the sequence itself.
        first: the prompt's first sample, which has its log-probabilities where this one has none.
        pieces: its tokens that were read.
        prompt_only: nothing was asked for but the prompt (`max_tokens` of 0); what the engine made
            beside it is left out.
    """

    given: Given
    generation: Generation
    first: Generation
    prompt_only: bool
    pieces: list[Piece] = field(default_factory=list)
    _num_sent: int = 0

    def take(self, piece: Piece) -> None:
        """Note a token."""
        if not self.prompt_only:
            self.pieces.append(piece)

    @property
    def text(self) -> str:
        """The output so far."""
        return "" if self.prompt_only else self.generation.text

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's word for how it ended; None while it goes on."""
        reason = self.generation.finish_reason
        if reason is None:
            return None
        return "length" if self.prompt_only else _REASONS[reason]

    @property
    def num_tokens(self) -> int:
        """Tokens of the output so far, an end-of-sequence token among them."""
        return 0 if self.prompt_only else self.generation.num_tokens

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """One entry a prompt token, where asked for; known with the first token."""
        return self.generation.prompt_logprobs or self.first.prompt_logprobs or ()

    def unsent(self) -> str:
        """The text since this was last asked."""
        text = self.text[self._num_sent :]
        self._num_sent += len(text)
        return text


class Shape(Protocol):
    """How a route writes its choices."""

    @property
    def id_prefix(self) -> str:
        """What ids of replies begin with."""

    @property
    def object_name(self) -> str:
        """What a whole reply is."""

    @property
    def chunk_name(self) -> str:
        """What a chunk of a stream is."""

    async def choice(self, output: Output, index: int) -> dict[str, Any]:
        """A whole choice."""

    async def opening(self, output: Output, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first token, if anything."""

    def delta(
        self, output: Output, index: int, text: str, pieces: Sequence[Piece]
    ) -> dict[str, Any]:
        """What `pieces` add to a choice, `text` being their text; the last has a reason."""


@dataclass(frozen=True)
class Job:
    """A request that has passed every check that needs no engine.

    Attributes:
        generator: the engine's front.
        model: the name that was asked for.
        fingerprint: names the exact weights that answer.
        prompts: one or more.
        requests: `best_of` for every prompt, in order.
        options: the same for all requests.
        n: choices for every prompt.
        best_of: samples for every prompt.
        max_parallel: sequences in the engine at a time.
        prompt_only: see Output.
        logprobs: whether chunks carry log-probabilities, and may not be left out.
        shape: how choices are written.
    """

    generator: Generator
    model: str
    fingerprint: str
    prompts: Sequence[Given]
    requests: Sequence[GenerationRequest]
    options: Options
    n: int
    best_of: int
    max_parallel: int
    prompt_only: bool
    logprobs: bool
    shape: Shape
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def batch(self) -> Batch:
        """The sequences, not begun yet."""
        return Batch(self.generator, self.requests, self.options, self.max_parallel)

    def output(self, batch: Batch, index: int) -> Output:
        """An output for the request at `index`, which has begun."""
        place, sample = divmod(index, self.best_of)
        first = batch.generations[index - sample]
        return Output(self.prompts[place], batch.generations[index], first, self.prompt_only)

    def envelope(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What stands around choices."""
        return {
            "id": f"{self.shape.id_prefix}{self.id}",
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def usage(self, outputs: Sequence[Output]) -> dict[str, int]:
        """Prompt tokens, each prompt once, and every token that was drawn; virtual tokens are not
        among them."""
        prompt = sum(len(given.prompt.token_ids) for given in self.prompts)
        completion = sum(output.num_tokens for output in outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def make_job(
    services: Services,
    generator: Generator,
    record: AdapterRecord | None,
    model: str,
    prompts: Sequence[Given],
    options: Options,
    samples: tuple[int, int],
    shape: Shape,
    *,
    streamed: bool = False,
    prompt_only: bool = False,
    logprobs: bool = False,
) -> Job:
    """Prepare every sequence.

    Sample i of a prompt draws with `seed + i`, so that each can be had again alone.

    Raises:
        RequestInvalid: too many sequences, or an empty prompt.
        TooLong: a prompt with its output does not fit the base or the engine.
    """
    n, best_of = samples
    if len(prompts) * best_of > MAX_SEQUENCES:
        raise RequestInvalid(
            f"{options.prompt_field}: {len(prompts)} prompts with {best_of} samples each are "
            f"{len(prompts) * best_of} sequences; at most {MAX_SEQUENCES} are taken at once",
            field=options.prompt_field,
            expected=f"at most {MAX_SEQUENCES} sequences",
            came=str(len(prompts) * best_of),
        )
    # The engine's ids are ours: two requests in flight may carry the same x-request-id.
    batch_id = uuid.uuid4().hex
    requests = []
    for place, given in enumerate(prompts):
        first = generator.prepare(given.prompt, record, options, f"{batch_id}-{place}")
        requests += [_sample(first, index, alone=streamed) for index in range(best_of)]
    if record is not None:
        services.requests_by_adapter[record.name] += 1
    return Job(
        generator=generator,
        model=model,
        fingerprint=f"fp_{services.client.base.digest[:12]}"
        + (f"_{record.digest[:12]}" if record is not None else ""),
        prompts=prompts,
        requests=requests,
        options=options,
        n=n,
        best_of=best_of,
        max_parallel=services.settings.max_running,
        prompt_only=prompt_only,
        logprobs=logprobs,
        shape=shape,
    )


def _sample(first: GenerationRequest, index: int, *, alone: bool) -> GenerationRequest:
    # A prompt's log-probabilities are the same for all its samples: where none has to begin without
    # the others, the first one brings them.
    sampling = replace(
        first.sampling,
        seed=first.sampling.seed + index,
        prompt_logprobs=first.sampling.prompt_logprobs and (alone or index == 0),
    )
    return replace(first, request_id=f"{first.request_id}-{index}", sampling=sampling)


# --- whole replies -------------------------------------------------------------------------


async def whole(request: Request, job: Job) -> Response:
    """Every choice at once."""
    batch = job.batch()
    outputs = await unless_gone(request.receive, _read_all(job, batch))
    set_headers(request, timing_headers(*batch.generations))
    choices: list[dict[str, Any]] = []
    for start in range(0, len(outputs), job.best_of):
        for output in _best(outputs[start : start + job.best_of], job.n):
            choices.append(await job.shape.choice(output, len(choices)))
    body = job.envelope(job.shape.object_name, choices)
    return JSONResponse({**body, "usage": job.usage(outputs)})


async def _read_all(job: Job, batch: Batch) -> list[Output]:
    outputs: dict[int, Output] = {}
    async with aclosing(batch.pieces()) as pieces:
        async for index, piece in pieces:
            if index not in outputs:
                outputs[index] = job.output(batch, index)
            outputs[index].take(piece)
    return [outputs[index] for index in range(len(job.requests))]


def _best(samples: list[Output], count: int) -> list[Output]:
    """The likeliest samples; all of them in the order of their seeds where none is left out."""
    if count == len(samples):
        return samples
    return sorted(samples, key=lambda output: mean_logprob(output.pieces), reverse=True)[:count]


def check_stream_options(body: OpenAIBody) -> None:
    """Refuse what only a stream can do.

    Raises:
        Contradiction: `stream_options` without `stream`.
    """
    if body.stream_options is not None and not body.stream:
        raise Contradiction(
            "stream_options is given without stream",
            field="stream_options",
            expected="stream: true",
            came="no stream",
        )


# --- streams -------------------------------------------------------------------------------


async def stream(request: Request, job: Job, options: StreamOptions | None) -> Response:
    """Every choice as it is made. The first token is awaited before, for a real status."""
    if job.best_of > job.n:
        raise RequestInvalid(
            f"best_of: expected n, which is {job.n}, when streaming, came {job.best_of}",
            field="best_of",
            expected=str(job.n),
            came=str(job.best_of),
        )
    batch = job.batch()
    pieces = batch.pieces()

    async def read_first() -> tuple[int, Piece]:
        return await anext(pieces)

    try:
        first = await unless_gone(request.receive, read_first())
    except BaseException:
        batch.abort()
        raise
    set_headers(request, timing_headers(*batch.generations))
    frames = _Frames(job, batch, options or StreamOptions())
    return EventStream(_guarded(request, frames.all(first, pieces)), batch.abort)


async def _guarded(
    request: Request, frames: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(frames):
            async for frame in frames:
                yield frame
    except Exception as error:
        # The status has been sent: the stream itself must say that it is not whole.
        told = tell(error)
        if told.refusal is UNFORESEEN:
            log.exception("stream_failed", path=request.url.path, error=type(error).__name__)
        yield _frame(body_of(told, request.url.path))


class _Frames:
    """The frames of one stream."""

    def __init__(self, job: Job, batch: Batch, options: StreamOptions) -> None:
        self._job = job
        self._batch = batch
        self._outputs: dict[int, Output] = {}
        self._with_usage = bool(options.include_usage)
        self._always_usage = self._with_usage and bool(options.continuous_usage_stats)

    async def all(
        self, first: tuple[int, Piece], rest: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncGenerator[bytes, None]:
        """Every frame, `[DONE]` included."""
        async with aclosing(rest):
            async for frame in self._of(*first):
                yield frame
            async for index, piece in rest:
                async for frame in self._of(index, piece):
                    yield frame
        if self._with_usage:
            body = self._job.envelope(self._job.shape.chunk_name, [])
            yield _frame({**body, "usage": self._job.usage([*self._outputs.values()])})
        yield DONE

    async def _of(self, index: int, piece: Piece) -> AsyncIterator[bytes]:
        shape = self._job.shape
        if index not in self._outputs:
            output = self._outputs[index] = self._job.output(self._batch, index)
            opening = await shape.opening(output, index)
            if opening is not None:
                yield self._chunk(opening)
        output = self._outputs[index]
        output.take(piece)
        text = output.unsent()
        # Nothing is sent for a token that only begins a character, unless it is of use by itself.
        if text or piece.finish_reason is not None or self._job.logprobs:
            pieces = [] if output.prompt_only else [piece]
            yield self._chunk(shape.delta(output, index, text, pieces))

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        body = self._job.envelope(self._job.shape.chunk_name, [choice])
        if self._always_usage:
            body["usage"] = self._job.usage([*self._outputs.values()])
        elif self._with_usage:
            body["usage"] = None
        return _frame(body)


def _frame(data: dict[str, Any]) -> bytes:
    # Some clients take the space after the colon for a part of the prefix.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
