"""The reply to a prepared request: whole, or a stream.

Frames are `data: ` lines that end with LF LF, and the last is `[DONE]`; a stream that breaks off
ends with a frame that holds the error instead. Knows neither route.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from server.api.error_replies import UNFORESEEN, body_of, describe, invalid
from server.api.generation.openai import openai_types as shapes
from server.api.generation.openai.batch import Batch
from server.api.generation.openai.bodies import StreamOptions
from server.api.generation.openai.prepared import Output, PreparedBatch
from server.api.middleware.headers import set_headers
from server.api.middleware.work import note_work, timing_headers
from server.generation.generator import Piece, mean_logprob
from server.http.event_stream import EventStream, compact, first_of, unless_gone

log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"


# --- whole replies -------------------------------------------------------------------------


async def whole(request: Request, prepared: PreparedBatch) -> Response:
    """Every choice at once."""
    batch = prepared.batch()
    note_work(request, prepared.num_prompt_tokens, batch.generations)
    outputs = await unless_gone(request.receive, _read_all(prepared, batch))
    set_headers(request, timing_headers(*batch.generations))
    choices: list[shapes.CompletionChoice | shapes.ChatChoice] = []
    for start in range(0, len(outputs), prepared.best_of):
        for output in _best(outputs[start : start + prepared.best_of], prepared.n):
            choices.append(await prepared.shape.choice(output, len(choices)))
    body = prepared.envelope(prepared.shape.object_name, choices)
    return JSONResponse({**body, "usage": prepared.usage(outputs)})


async def _read_all(prepared: PreparedBatch, batch: Batch) -> list[Output]:
    outputs: dict[int, Output] = {}
    async with aclosing(batch.pieces()) as pieces:
        async for index, piece in pieces:
            if index not in outputs:
                outputs[index] = prepared.output(batch, index)
            outputs[index].take(piece)
    return [outputs[index] for index in range(len(prepared.requests))]


def _best(samples: list[Output], count: int) -> list[Output]:
    """The likeliest samples; all of them in the order of their seeds where none is left out."""
    if count == len(samples):
        return samples
    return sorted(samples, key=lambda output: mean_logprob(output.pieces), reverse=True)[:count]


# --- streams -------------------------------------------------------------------------------


async def stream(
    request: Request, prepared: PreparedBatch, options: StreamOptions | None
) -> Response:
    """Every choice as it is made. The first token is awaited before, for a real status."""
    if prepared.best_of > prepared.n:
        raise invalid("best_of", f"n, which is {prepared.n}, when streaming", prepared.best_of)
    batch = prepared.batch()
    note_work(request, prepared.num_prompt_tokens, batch.generations)
    pieces = batch.pieces()
    first = await first_of(pieces, request.receive, batch.abort)
    set_headers(request, timing_headers(*batch.generations))
    frames = _Frames(prepared, batch, options or StreamOptions())
    return EventStream(frames.all(request, first, pieces), batch.abort)


class _Frames:
    """The frames of one stream."""

    def __init__(self, prepared: PreparedBatch, batch: Batch, options: StreamOptions) -> None:
        self._prepared = prepared
        self._batch = batch
        self._outputs: dict[int, Output] = {}
        self._with_usage = bool(options.include_usage)
        self._always_usage = self._with_usage and bool(options.continuous_usage_stats)
        self._envelope = prepared.envelope(prepared.shape.chunk_name, [])
        # What every chunk begins and ends with is written once: most of a chunk is that.
        self._head = "data: " + compact(self._envelope).removesuffix("]}")
        self._tail = '],"usage":null}\n\n' if self._with_usage else "]}\n\n"

    async def all(
        self,
        request: Request,
        first: tuple[int, Piece],
        rest: AsyncGenerator[tuple[int, Piece], None],
    ) -> AsyncGenerator[bytes, None]:
        """Every frame, `[DONE]` included, or the error that broke the stream off."""
        try:
            async with aclosing(rest):
                for frame in await self._of_new(*first):
                    yield frame
                async for index, piece in rest:
                    if index not in self._outputs:
                        for frame in await self._of_new(index, piece):
                            yield frame
                    elif frame := self._of(index, piece):
                        yield frame
            if self._with_usage:
                yield _frame({**self._envelope, "usage": self._usage()})
            yield DONE
        except Exception as error:
            # The status has been sent: the stream itself must say that it is not whole.
            report = describe(error)
            if report.refusal is UNFORESEEN:
                log.exception("stream_failed", path=request.url.path, error=type(error).__name__)
            yield _frame(body_of(report, request.url.path))

    async def _of_new(self, index: int, piece: Piece) -> list[bytes]:
        """What an output's first token adds: there may be something to say before it."""
        output = self._outputs[index] = self._prepared.output(self._batch, index)
        opening = await self._prepared.shape.opening(output, index)
        before = [] if opening is None else [self._chunk(opening)]
        frame = self._of(index, piece)
        return [*before, frame] if frame else before

    def _of(self, index: int, piece: Piece) -> bytes:
        output = self._outputs[index]
        pieces = output.take(piece)
        # Nothing is sent for a token that only begins a character, unless it is of use by itself.
        if piece.added or piece.finish_reason is not None or self._prepared.logprobs:
            return self._chunk(self._prepared.shape.delta(output, index, pieces))
        return b""

    def _chunk(self, choice: shapes.CompletionChoice | shapes.ChatDeltaChoice) -> bytes:
        tail = f'],"usage":{compact(self._usage())}}}\n\n' if self._always_usage else self._tail
        return f"{self._head}{compact(choice)}{tail}".encode()

    def _usage(self) -> shapes.Usage:
        return self._prepared.usage([*self._outputs.values()])


def _frame(data: dict[str, Any]) -> bytes:
    # Some clients take the space after the colon for a part of the prefix.
    return f"data: {compact(data)}\n\n".encode()
