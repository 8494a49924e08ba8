"""What comes back on TGI's routes: whole replies and streams, from a request that is ready to run.

Pieces become TGI's JSON. The first token is awaited before a stream begins, so that a request which
fails before it gets a real status. Knows no route, and not how a body became options.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from server.api.error_replies import body_of, describe
from server.api.middleware.headers import set_headers, timing_headers
from server.api.schemas import GenerateParameters
from server.engine.request import GenerationRequest
from server.generation.generator import Generation, Generator, Options, Piece, Prompt, mean_logprob
from server.http.event_stream import EventStream, event, unless_gone
from server.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Job:
    """A request that has passed every check that needs no engine."""

    generator: Generator
    prompt: Prompt
    request: GenerationRequest
    options: Options
    parameters: GenerateParameters

    @property
    def tokenizer(self) -> TextTokenizer:
        """The base's."""
        return self.generator.tokenizer

    @property
    def prefix(self) -> str:
        """What stands before the output in `generated_text`."""
        return self.prompt.text if self.parameters.return_full_text else ""

    @property
    def seed(self) -> int | None:
        """What a sampled output was drawn with."""
        sampling = self.request.sampling
        return sampling.seed if sampling.do_sample else None


# --- whole replies -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Output:
    generation: Generation
    pieces: list[Piece]
    seed: int | None


async def whole(request: Request, job: Job) -> dict[str, Any]:
    """Run a request to its end: TGI's reply, the likeliest of `best_of` samples first.

    Raises:
        EngineOverloaded, EngineUnavailable, RequestFailed: the engine took it not, or gave it up.
        ClientGone: nobody waits any more; the rows are free.
    """
    parameters = job.parameters
    outputs = await unless_gone(request.receive, _run_all(job, parameters.best_of or 1))
    outputs.sort(key=lambda output: mean_logprob(output.pieces), reverse=True)
    best = outputs[0]
    set_headers(request, timing_headers(best.generation))
    reply: dict[str, Any] = {"generated_text": job.prefix + best.generation.text}
    if parameters.details or parameters.decoder_input_details:
        reply["details"] = _details(job, best)
        if len(outputs) > 1:
            reply["details"]["best_of_sequences"] = [
                {
                    "generated_text": job.prefix + output.generation.text,
                    **_details(job, output),
                }
                for output in outputs[1:]
            ]
    return reply


async def _run_all(job: Job, count: int) -> list[_Output]:
    """Run `count` samples of one prompt side by side, each with a seed of its own."""
    generations: list[Generation] = []
    try:
        for index in range(count):
            sampling = replace(job.request.sampling, seed=job.request.sampling.seed + index)
            one = replace(
                job.request, request_id=f"{job.request.request_id}-{index}", sampling=sampling
            )
            generations.append(job.generator.submit(one, job.options))
        return list(await asyncio.gather(*(_read(generation) for generation in generations)))
    finally:
        for generation in generations:
            generation.abort()


async def _read(generation: Generation) -> _Output:
    pieces = [piece async for piece in generation]
    sampling = generation.request.sampling
    return _Output(generation, pieces, sampling.seed if sampling.do_sample else None)


def _details(job: Job, output: _Output) -> dict[str, Any]:
    generation = output.generation
    details: dict[str, Any] = {
        "finish_reason": generation.finish_reason,
        "prompt_tokens": len(generation.request.prompt_token_ids),
        "generated_tokens": generation.num_tokens,
        "seed": output.seed,
        "prefill": _prefill(job, generation),
        "tokens": [_token(job, piece) for piece in output.pieces],
    }
    if count := job.parameters.top_n_tokens:
        details["top_tokens"] = [_top(job, piece, count) for piece in output.pieces]
    return details


def _prefill(job: Job, generation: Generation) -> list[dict[str, Any]]:
    """The prompt's own tokens; virtual tokens never appear."""
    if generation.prompt_logprobs is None:
        return []
    ids = generation.request.prompt_token_ids
    return [
        {
            "id": token_id,
            "text": job.tokenizer.token_text(token_id),
            "logprob": None if logprob is None else logprob.logprob,
        }
        for token_id, logprob in zip(ids, generation.prompt_logprobs, strict=True)
    ]


def _token(job: Job, piece: Piece) -> dict[str, Any]:
    token: dict[str, Any] = {
        "id": piece.token_id,
        "text": piece.text,
        "logprob": None if piece.logprob is None else piece.logprob.logprob,
        "special": piece.special,
    }
    if count := job.parameters.return_k_alternatives:
        token["alternative_tokens"] = _top(job, piece, count)
    return token


def _top(job: Job, piece: Piece, count: int) -> list[dict[str, Any]]:
    entries = () if piece.logprob is None else piece.logprob.top[:count]
    return [
        {
            "id": token_id,
            "text": job.tokenizer.token_text(token_id),
            "logprob": value,
            "special": token_id in job.tokenizer.special_ids,
        }
        for token_id, value in entries
    ]


# --- streams -------------------------------------------------------------------------------


async def stream(request: Request, job: Job) -> Response:
    """Start a request and stream its tokens, the first of which has come when this returns.

    Raises:
        EngineOverloaded, EngineUnavailable, RequestFailed, ClientGone: before the first token; what
            fails later is told in the stream.
    """
    generation = job.generator.submit(job.request, job.options)
    pieces = aiter(generation)

    async def read_first() -> Piece:
        return await anext(pieces)

    try:
        first = await unless_gone(request.receive, read_first())
    except BaseException:
        generation.abort()
        raise
    set_headers(request, timing_headers(generation))
    return EventStream(_frames(request, job, generation, first, pieces), generation.abort)


async def _frames(
    request: Request,
    job: Job,
    generation: Generation,
    first: Piece,
    rest: AsyncIterator[Piece],
) -> AsyncGenerator[bytes, None]:
    index = 1
    yield event(_frame(job, generation, index, first))
    try:
        async for piece in rest:
            index += 1
            yield event(_frame(job, generation, index, piece))
    except Exception as error:
        # The status has been sent: the stream itself must say that it is not whole.
        yield event(body_of(describe(error), request.url.path))


def _frame(job: Job, generation: Generation, index: int, piece: Piece) -> dict[str, Any]:
    last = piece.finish_reason is not None
    frame: dict[str, Any] = {"index": index, "token": _token(job, piece)}
    if count := job.parameters.top_n_tokens:
        frame["top_tokens"] = _top(job, piece, count)
    frame["generated_text"] = job.prefix + generation.text if last else None
    frame["details"] = None
    if last and job.parameters.details:
        frame["details"] = {
            "finish_reason": piece.finish_reason,
            "generated_tokens": generation.num_tokens,
            "seed": job.seed,
            # TGI's name of it, and LoRAX's
            "input_length": len(job.request.prompt_token_ids),
            "prompt_tokens": len(job.request.prompt_token_ids),
        }
    return frame
