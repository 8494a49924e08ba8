"""Whole responses and their events, from one generation. Knows no route and no body."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from server.api.error_replies import UNFORESEEN, body_of, describe
from server.api.generation.openai.logprobs import chat_logprobs
from server.api.generation.openai.openai_types import ChatLogprob
from server.api.generation.openai.responses import types as shapes
from server.api.middleware.headers import set_headers
from server.api.middleware.work import note_work, timing_headers
from server.generation.generator import Generation, Generator, Piece
from server.http.event_stream import EventStream, compact, first_of, unless_gone

log = structlog.get_logger(__name__)


@dataclass
class Answer:
    """One response as far as it has been read.

    Attributes:
        generator: names tokens.
        generation: its sequence in the engine.
        said: the fields that repeat the request.
        num_top_logprobs: likeliest tokens to report with each; None reports no log-probabilities.
    """

    generator: Generator
    generation: Generation
    said: dict[str, Any]
    num_top_logprobs: int | None
    pieces: list[Piece] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_at: int = field(default_factory=lambda: int(time.time()))

    def response(
        self, status: shapes.Status, error: shapes.FailedWhy | None = None
    ) -> shapes.ResponseObject:
        """The response with this status; its output is there once it has ended."""
        ended = status in ("completed", "incomplete")
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created_at,
            "completed_at": int(time.time()) if ended else None,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            **self.said,  # type: ignore[typeddict-item]
            "output": [self.message(status)] if ended or error is not None else [],
            "usage": self._usage() if ended else None,
        }

    @property
    def status(self) -> shapes.Status:
        """How it ended."""
        return "incomplete" if self.generation.finish_reason == "length" else "completed"

    def message(self, status: shapes.Status, *, is_empty: bool = False) -> shapes.OutputMessage:
        """The message as it is now."""
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": "incomplete" if status == "failed" else status,
            "content": [] if is_empty else [self.part(self.generation.text, self.pieces)],
        }

    @property
    def message_id(self) -> str:
        """Of the message."""
        return f"msg_{self.id}"

    def part(self, text: str, pieces: Sequence[Piece]) -> shapes.OutputText:
        """A text part."""
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self.logprobs(pieces),
        }

    def logprobs(self, pieces: Sequence[Piece]) -> list[ChatLogprob]:
        """Of these tokens, if the request asked for them."""
        if self.num_top_logprobs is None:
            return []
        return chat_logprobs(self.generator.tokenizer, pieces, self.num_top_logprobs)["content"]

    def _usage(self) -> shapes.ResponseUsage:
        prompt = len(self.generation.request.prompt_token_ids)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": self.generation.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": self.generation.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + self.generation.num_tokens,
        }


async def whole(request: Request, answer: Answer) -> Response:
    """The response once it has ended."""

    async def read_all() -> None:
        async for piece in answer.generation:
            answer.pieces.append(piece)

    generation = answer.generation
    note_work(request, len(generation.request.prompt_token_ids), [generation])
    try:
        await unless_gone(request.receive, read_all())
    finally:
        generation.abort()
    set_headers(request, timing_headers(generation))
    return JSONResponse(answer.response(answer.status))


async def stream(request: Request, answer: Answer) -> Response:
    """The events of a response. The first token is awaited before, for a real status."""
    generation = answer.generation
    note_work(request, len(generation.request.prompt_token_ids), [generation])
    pieces = aiter(generation)
    first = await first_of(pieces, request.receive, generation.abort)
    set_headers(request, timing_headers(generation))
    return EventStream(_Events(answer).all(request, first, pieces), generation.abort)


class _Events:
    """The events of one stream, numbered."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._number = 0

    async def all(
        self, request: Request, first: Piece, rest: AsyncIterator[Piece]
    ) -> AsyncGenerator[bytes, None]:
        """Every event, to the end of the response or the error that broke it off."""
        try:
            for frame in self._opening():
                yield frame
            if frame := self._of(first):
                yield frame
            async for piece in rest:
                if frame := self._of(piece):
                    yield frame
            for frame in self._ending():
                yield frame
        except Exception as error:
            # The status has been sent: the stream itself must say that it is not whole.
            for frame in self._broken(error, request.url.path):
                yield frame

    def _opening(self) -> list[bytes]:
        answer = self._answer
        began = answer.response("in_progress")
        return [
            self._event("response.created", response=began),
            self._event("response.in_progress", response=began),
            self._event(
                "response.output_item.added",
                output_index=0,
                item=answer.message("in_progress", is_empty=True),
            ),
            self._event("response.content_part.added", **self._place, part=answer.part("", ())),
        ]

    def _of(self, piece: Piece) -> bytes:
        self._answer.pieces.append(piece)
        # Nothing is sent for a token that only begins a character, unless it is of use by itself.
        if not piece.added and self._answer.num_top_logprobs is None:
            return b""
        return self._event(
            "response.output_text.delta",
            **self._place,
            delta=piece.added,
            logprobs=self._answer.logprobs([piece]),
        )

    def _ending(self) -> list[bytes]:
        answer, status = self._answer, self._answer.status
        message = answer.message(status)
        part = message["content"][0]
        return [
            self._event(
                "response.output_text.done",
                **self._place,
                text=part["text"],
                logprobs=part["logprobs"],
            ),
            self._event("response.content_part.done", **self._place, part=part),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(f"response.{status}", response=answer.response(status)),
        ]

    def _broken(self, error: Exception, path: str) -> list[bytes]:
        report = describe(error)
        if report.refusal is UNFORESEEN:
            log.exception("stream_failed", path=path, error=type(error).__name__)
        body = body_of(report, path)["error"]
        why: shapes.FailedWhy = {"code": "server_error", "message": body["message"]}
        said = {name: body[name] for name in ("code", "message", "param")}
        return [
            self._event("response.failed", response=self._answer.response("failed", why)),
            # OpenAI's clients raise on this one.
            self._event("error", **said, error=body),
        ]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._answer.message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {compact(data)}\n\n".encode()
