"""`POST /v1/chat/completions`: a conversation goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.error_replies import invalid
from server.api.generation.openai import openai_types as shapes
from server.api.generation.openai.bodies import ChatBody
from server.api.generation.openai.logprobs import chat_logprobs
from server.api.generation.openai.messages import conversation_prompt, templates_chats
from server.api.generation.openai.model import chosen_model, note_extras
from server.api.generation.openai.prepared import (
    Output,
    PreparedBatch,
    check_stream_options,
    prepare_batch,
)
from server.api.generation.openai.prompts import Given, from_row, require_one
from server.api.generation.openai.reply import stream, whole
from server.api.generation.openai.sampling import options_of, samples_of
from server.api.openapi.refusals import GENERATED, refuses
from server.api.openapi.responses import events
from server.errors import Contradiction
from server.generation.generator import Generator, Piece
from server.services import Services, UseServices
from server.store.registry import AdapterRecord
from server.text.tokenizer import TextTokenizer

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/chat/completions",
    summary="Continue a conversation, in OpenAI's protocol",
    response_model=shapes.ChatCompletion,
    responses={200: events(shapes.ChatChunk, shapes.CHAT_EVENTS, "Every choice.", timed=True)},
    openapi_extra=refuses(*GENERATED),
)
async def chat_completions(request: Request, services: UseServices, body: ChatBody) -> Response:
    """The assistant's next message, or `n` of them; a stream where the body says `stream`.

    The prompt is made by the base's chat template. An adapter that was stored with a template of
    its own gets that one: a single user message fills its column.
    """
    prepared = await _prepare(request, services, body)
    if body.stream:
        return await stream(request, prepared, body.stream_options)
    return await whole(request, prepared)


async def _prepare(request: Request, services: Services, body: ChatBody) -> PreparedBatch:
    note_extras(request, body)
    _check(body)
    generator = services.need_generator()
    record = await chosen_model(request, services, body.model)
    num_top = body.top_logprobs or 0
    with_logprobs = bool(body.logprobs)
    options = options_of(
        body,
        max_tokens=body.max_tokens,
        default_max_tokens=None,
        num_logprobs=num_top if with_logprobs else None,
        prompt_field="messages" if body.row is None else "row",
        vocab_size=generator.vocab_size,
        adapter=record,
    )
    samples = samples_of(body.n, None, services.settings.max_best_of)
    given = await _prompt(generator, body, record)
    shape = ChatShape(generator.tokenizer, num_top if with_logprobs else None)
    return prepare_batch(
        services,
        generator,
        record,
        body.model,
        [given],
        options,
        samples,
        shape,
        logprobs=with_logprobs,
    )


def _check(body: ChatBody) -> None:
    require_one(body.messages or None, body.row, "messages", "at least one message, or a row")
    check_stream_options(body)
    _check_tools(body)
    if body.chat_template is not None:
        raise invalid("chat_template", "none: templates come with the base only", "one")
    if body.top_logprobs and not body.logprobs:
        raise Contradiction(
            "top_logprobs is given without logprobs",
            field="top_logprobs",
            expected="logprobs: true",
            came="no logprobs",
        )
    if body.continue_final_message and body.add_generation_prompt:
        raise Contradiction(
            "continue_final_message goes on with the last message, add_generation_prompt begins "
            "another; send one of them",
            field="continue_final_message",
            expected="one of them",
            came="both",
        )


def _check_tools(body: ChatBody) -> None:
    if body.tool_choice == "none":
        return
    extra = body.model_extra or {}
    for name, value in (
        ("tools", body.tools),
        ("functions", extra.get("functions")),
        ("function_call", extra.get("function_call") not in (None, "none", "auto")),
        ("tool_choice", body.tool_choice not in (None, "auto")),
    ):
        if value:
            raise invalid(name, 'none, or tool_choice "none": tools are not supported', "some")


async def _prompt(generator: Generator, body: ChatBody, record: AdapterRecord | None) -> Given:
    if body.row is not None:
        return await from_row(generator, body.row, record)
    if not templates_chats(record) and body.use_adapter_template:
        raise invalid("use_adapter_template", "an adapter with a stored template", "none")
    if templates_chats(record) and body.use_adapter_template is not False:
        _check_own_template(body)
    goes_on = bool(body.continue_final_message)
    return await conversation_prompt(
        generator,
        body.messages or [],
        record,
        use_adapter_template=body.use_adapter_template,
        add_generation_prompt=not goes_on and body.add_generation_prompt is not False,
        continue_final_message=goes_on,
    )


def _check_own_template(body: ChatBody) -> None:
    for name, given in (
        ("continue_final_message", body.continue_final_message),
        ("add_generation_prompt", body.add_generation_prompt is False),
    ):
        if given:
            raise invalid(
                name, 'no such wish unless "use_adapter_template" is false', "one with its template"
            )


@dataclass(frozen=True)
class ChatShape:
    """Choices with a `message`.

    Attributes:
        tokenizer: for names of tokens.
        num_top_logprobs: likeliest tokens to report with each; None reports no log-probabilities.
    """

    tokenizer: TextTokenizer
    num_top_logprobs: int | None
    id_prefix: str = "chatcmpl-"
    object_name: str = "chat.completion"
    chunk_name: str = "chat.completion.chunk"

    async def choice(self, output: Output, index: int) -> shapes.ChatChoice:
        """A whole choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.pieces),
            "finish_reason": cast("shapes.OpenAIFinishReason", output.finish_reason),
        }

    async def opening(self, output: Output, index: int) -> shapes.ChatDeltaChoice | None:
        """Who speaks."""
        return _delta(index, {"role": "assistant", "content": ""}, None, None)

    def delta(self, output: Output, index: int, pieces: Sequence[Piece]) -> shapes.ChatDeltaChoice:
        """New text and the tokens it came from."""
        text = "".join(piece.added for piece in pieces)
        content: shapes.ChatDelta = {"content": text} if text else {}
        return _delta(index, content, self._logprobs(pieces), output.finish_reason)

    def _logprobs(self, pieces: Sequence[Piece]) -> shapes.ChatLogprobs | None:
        if self.num_top_logprobs is None:
            return None
        return chat_logprobs(self.tokenizer, pieces, self.num_top_logprobs)


def _delta(
    index: int,
    delta: shapes.ChatDelta,
    logprobs: shapes.ChatLogprobs | None,
    reason: shapes.OpenAIFinishReason | None,
) -> shapes.ChatDeltaChoice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
