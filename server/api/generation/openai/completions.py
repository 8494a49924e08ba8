"""`POST /v1/completions`: prompts go on as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.error_replies import invalid
from server.api.generation.openai import openai_types as shapes
from server.api.generation.openai.bodies import DEFAULT_MAX_TOKENS, CompletionBody
from server.api.generation.openai.logprobs import LogprobLists
from server.api.generation.openai.model import chosen_model, note_extras
from server.api.generation.openai.prepared import (
    Output,
    PreparedBatch,
    check_stream_options,
    prepare_batch,
)
from server.api.generation.openai.prompts import encode_all, from_row, require_one, token_offsets
from server.api.generation.openai.reply import stream, whole
from server.api.generation.openai.sampling import options_of, samples_of
from server.api.generation.prompt_warning import warn_of_prompts
from server.api.openapi.refusals import GENERATED, refuses
from server.api.openapi.responses import events
from server.generation.generator import Generator, Piece
from server.services import Services, UseServices

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/completions",
    summary="Complete prompts, in OpenAI's protocol",
    response_model=shapes.Completion,
    responses={
        200: events(shapes.CompletionChunk, shapes.COMPLETION_EVENTS, "Every choice.", timed=True)
    },
    openapi_extra=refuses(*GENERATED),
)
async def completions(request: Request, services: UseServices, body: CompletionBody) -> Response:
    """A choice, or `n` of them, for every prompt; a stream where the body says `stream`."""
    prepared = await _prepare(request, services, body)
    if body.stream:
        return await stream(request, prepared, body.stream_options)
    return await whole(request, prepared)


async def _prepare(request: Request, services: Services, body: CompletionBody) -> PreparedBatch:
    note_extras(request, body)
    _check(body)
    generator = services.need_generator()
    record = await chosen_model(request, services, body.model)
    samples = samples_of(body.n, body.best_of, services.settings.max_best_of)
    # A choice among samples needs log-probabilities whether they are reported or not.
    num_logprobs = 0 if samples[0] < samples[1] else None
    prompt_only = body.max_tokens == 0
    options = options_of(
        body,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        num_logprobs=num_logprobs if body.logprobs is None else body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        prompt_field="prompt" if body.row is None else "row",
        vocab_size=generator.vocab_size,
        adapter=record,
    )
    if prompt_only:
        options = replace(options, max_new_tokens=1)  # the engine makes one at least
    if body.row is not None:
        prompts = [await from_row(generator, body.row, record)]
    else:
        prompts = await encode_all(
            generator, body.prompt, lambda number: generator.check_length(number, record, options)
        )
    texts = [given.prompt.text for given in prompts if given.kind == "text"]
    await warn_of_prompts(request, services, generator, record, texts)
    return prepare_batch(
        services,
        generator,
        record,
        body.model,
        prompts,
        options,
        samples,
        CompletionShape(generator, bool(body.echo), body.logprobs is not None),
        streamed=bool(body.stream),
        prompt_only=prompt_only,
        logprobs=body.logprobs is not None,
    )


def _check(body: CompletionBody) -> None:
    require_one(body.prompt, body.row, "prompt")
    if body.suffix:
        raise invalid("suffix", "none: the base only goes forward", "one")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "at least 1, or 0 together with echo", 0)
    check_stream_options(body)


@dataclass(frozen=True)
class CompletionShape:
    """Choices with `text`.

    Attributes:
        generator: for offsets and names of tokens.
        echo: the text begins with the prompt.
        with_logprobs: whether choices carry log-probabilities.
    """

    generator: Generator
    echo: bool
    with_logprobs: bool
    id_prefix: str = "cmpl-"
    object_name: str = "text_completion"
    chunk_name: str = "text_completion"

    async def choice(self, output: Output, index: int) -> shapes.CompletionChoice:
        """A whole choice."""
        text, logprobs = await self._echoed(output)
        if logprobs is not None:
            logprobs.add_output(self.generator.tokenizer, output.pieces, len(text))
        return _choice(index, text + output.text, logprobs, output.finish_reason)

    async def opening(self, output: Output, index: int) -> shapes.CompletionChoice | None:
        """The echoed prompt."""
        if not self.echo:
            return None
        text, logprobs = await self._echoed(output)
        return _choice(index, text, logprobs, None)

    def delta(self, output: Output, index: int, pieces: Sequence[Piece]) -> shapes.CompletionChoice:
        """New text and the tokens it came from."""
        logprobs = LogprobLists() if self.with_logprobs else None
        if logprobs is not None:
            start = len(output.given.prompt.text) if self.echo else 0
            logprobs.add_output(self.generator.tokenizer, pieces, start)
        text = "".join(piece.added for piece in pieces)
        return _choice(index, text, logprobs, output.finish_reason)

    async def _echoed(self, output: Output) -> tuple[str, LogprobLists | None]:
        given = output.given
        logprobs = LogprobLists() if self.with_logprobs else None
        if not self.echo:
            return "", logprobs
        if logprobs is not None:
            offsets = await token_offsets(self.generator, given)
            logprobs.add_prompt(
                self.generator.tokenizer,
                given.prompt.token_ids,
                output.prompt_logprobs,
                offsets,
            )
        return given.prompt.text, logprobs


def _choice(
    index: int, text: str, logprobs: LogprobLists | None, reason: shapes.OpenAIFinishReason | None
) -> shapes.CompletionChoice:
    return {
        "index": index,
        "text": text,
        "logprobs": None if logprobs is None else logprobs.as_json(),
        "finish_reason": reason,
    }
