"""The replies of TGI's routes: whole replies and streams, from a request that is ready to run.

Pieces become TGI's JSON. The first token is awaited before a stream begins, so that a request which
fails before it gets a real status. Knows no route, and not how a body became options.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import cast

from fastapi import Request
from fastapi.responses import Response

from server.api.error_replies import body_of, describe
from server.api.generation import tgi_types as shapes
from server.api.middleware.headers import set_headers
from server.api.middleware.work import note_work, timing_headers
from server.api.schemas import GenerateParameters
from server.engine.request import GenerationRequest
from server.generation.generator import (
    FinishReason,
    Generation,
    Generator,
    Options,
    Piece,
    Prompt,
    mean_logprob,
)
from server.http.event_stream import EventStream, event, first_of, unless_gone
from server.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class PreparedRequest:
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
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt as it is computed; virtual tokens are not among them."""
        return len(self.request.prompt_token_ids)

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


async def whole(request: Request, prepared: PreparedRequest) -> shapes.Generated:
    """Run a request to its end: TGI's reply, the likeliest of `best_of` samples first.

    Raises:
        EngineOverloaded, EngineUnavailable, RequestFailed: the engine took it not, or gave it up.
        ClientGone: the client disconnected; the rows are free.
    """
    parameters = prepared.parameters
    generations: list[Generation] = []
    note_work(request, prepared.num_prompt_tokens, generations)
    work = _run_all(prepared, parameters.best_of or 1, generations)
    outputs = await unless_gone(request.receive, work)
    outputs.sort(key=lambda output: mean_logprob(output.pieces), reverse=True)
    best = outputs[0]
    set_headers(request, timing_headers(best.generation))
    reply: shapes.Generated = {"generated_text": prepared.prefix + best.generation.text}
    if parameters.details or parameters.decoder_input_details:
        several: shapes.OtherSequences = {}
        if len(outputs) > 1:
            several = {"best_of_sequences": [_other(prepared, output) for output in outputs[1:]]}
        reply["details"] = {**_details(prepared, best), **several}
    return reply


async def _run_all(
    prepared: PreparedRequest, count: int, generations: list[Generation]
) -> list[_Output]:
    """Run `count` samples of one prompt side by side, each with a seed of its own.

    They are added to `generations` as they begin.
    """
    try:
        for index in range(count):
            sampling = replace(
                prepared.request.sampling, seed=prepared.request.sampling.seed + index
            )
            one = replace(
                prepared.request,
                request_id=f"{prepared.request.request_id}-{index}",
                sampling=sampling,
            )
            generations.append(prepared.generator.submit(one, prepared.options))
        return list(await asyncio.gather(*(_read(generation) for generation in generations)))
    finally:
        for generation in generations:
            generation.abort()


async def _read(generation: Generation) -> _Output:
    pieces = [piece async for piece in generation]
    sampling = generation.request.sampling
    return _Output(generation, pieces, sampling.seed if sampling.do_sample else None)


def _other(prepared: PreparedRequest, output: _Output) -> shapes.OtherSequence:
    text = prepared.prefix + output.generation.text
    return {"generated_text": text, **_details(prepared, output)}


def _details(prepared: PreparedRequest, output: _Output) -> shapes.Details:
    generation = output.generation
    details: shapes.Details = {
        "finish_reason": cast("FinishReason", generation.finish_reason),
        "prompt_tokens": len(generation.request.prompt_token_ids),
        "generated_tokens": generation.num_tokens,
        "seed": output.seed,
        "prefill": _prefill(prepared, generation),
        "tokens": [_token(prepared, piece) for piece in output.pieces],
    }
    if count := prepared.parameters.top_n_tokens:
        details["top_tokens"] = [_top(prepared, piece, count) for piece in output.pieces]
    return details


def _prefill(prepared: PreparedRequest, generation: Generation) -> list[shapes.PrefillToken]:
    """The prompt's own tokens; virtual tokens never appear."""
    if generation.prompt_logprobs is None:
        return []
    ids = generation.request.prompt_token_ids
    return [
        {
            "id": token_id,
            "text": prepared.tokenizer.token_text(token_id),
            "logprob": None if logprob is None else logprob.logprob,
        }
        for token_id, logprob in zip(ids, generation.prompt_logprobs, strict=True)
    ]


def _token(prepared: PreparedRequest, piece: Piece) -> shapes.Token:
    token: shapes.Token = {
        "id": piece.token_id,
        "text": piece.text,
        "logprob": None if piece.logprob is None else piece.logprob.logprob,
        "special": piece.special,
    }
    if count := prepared.parameters.return_k_alternatives:
        token["alternative_tokens"] = _top(prepared, piece, count)
    return token


def _top(prepared: PreparedRequest, piece: Piece, count: int) -> list[shapes.Alternative]:
    entries = () if piece.logprob is None else piece.logprob.top[:count]
    return [
        {
            "id": token_id,
            "text": prepared.tokenizer.token_text(token_id),
            "logprob": value,
            "special": token_id in prepared.tokenizer.special_ids,
        }
        for token_id, value in entries
    ]


# --- streams -------------------------------------------------------------------------------


async def stream(request: Request, prepared: PreparedRequest) -> Response:
    """Start a request and stream its tokens, the first of which has come when this returns.

    Raises:
        EngineOverloaded, EngineUnavailable, RequestFailed, ClientGone: before the first token; what
            fails later is reported in the stream.
    """
    generation = prepared.generator.submit(prepared.request, prepared.options)
    note_work(request, prepared.num_prompt_tokens, [generation])
    pieces = aiter(generation)
    first = await first_of(pieces, request.receive, generation.abort)
    set_headers(request, timing_headers(generation))
    return EventStream(_frames(request, prepared, generation, first, pieces), generation.abort)


async def _frames(
    request: Request,
    prepared: PreparedRequest,
    generation: Generation,
    first: Piece,
    rest: AsyncIterator[Piece],
) -> AsyncGenerator[bytes, None]:
    index = 1
    yield event(_frame(prepared, generation, index, first))
    try:
        async for piece in rest:
            index += 1
            yield event(_frame(prepared, generation, index, piece))
    except Exception as error:
        # The status has been sent: the stream itself must say that it is not whole.
        yield event(body_of(describe(error), request.url.path))


def _frame(
    prepared: PreparedRequest, generation: Generation, index: int, piece: Piece
) -> shapes.GenerateFrame:
    count, reason = prepared.parameters.top_n_tokens, piece.finish_reason
    top: shapes.TopTokens = {"top_tokens": _top(prepared, piece, count)} if count else {}
    details: shapes.StreamDetails | None = None
    if reason is not None and prepared.parameters.details:
        details = {
            "finish_reason": reason,
            "generated_tokens": generation.num_tokens,
            "seed": prepared.seed,
            # TGI's name of it, and LoRAX's
            "input_length": len(prepared.request.prompt_token_ids),
            "prompt_tokens": len(prepared.request.prompt_token_ids),
        }
    return {
        "index": index,
        "token": _token(prepared, piece),
        **top,
        "generated_text": None if reason is None else prepared.prefix + generation.text,
        "details": details,
    }
