"""`POST /v1/responses`: OpenAI's Responses API for text. Responses are not stored."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.adapter_choice import only_query, refuse_stray_adapters
from server.api.error_replies import invalid, quoted
from server.api.generation.openai.bodies import ChatBody
from server.api.generation.openai.messages import conversation_prompt, templates_chats
from server.api.generation.openai.model import chosen_model
from server.api.generation.openai.prompts import Given, from_row, require_one
from server.api.generation.openai.responses import types as shapes
from server.api.generation.openai.responses.body import ResponsesBody, as_chat
from server.api.generation.openai.responses.reply import Answer, stream, whole
from server.api.generation.openai.sampling import options_of
from server.api.middleware.headers import note_ignored
from server.api.openapi.refusals import GENERATED, refuses
from server.api.openapi.responses import events
from server.api.schemas import set_extras
from server.engine.request import SamplingParams
from server.errors import RequestInvalid, ResponseNotFound
from server.generation.generator import Generator
from server.services import Services, UseServices
from server.store.registry import AdapterRecord

router = APIRouter(prefix="/v1/responses", tags=["generation"])


@router.post(
    "",
    summary="Make a response, in OpenAI's protocol",
    response_model=shapes.ResponseObject,
    responses={200: events(shapes.ResponseEvent, shapes.EXAMPLE_EVENTS, "The output.", timed=True)},
    openapi_extra=refuses(*GENERATED),
)
async def create_response(request: Request, services: UseServices, body: ResponsesBody) -> Response:
    """A text that answers `input`; a stream of events where the body says `stream`.

    The prompt is made as for `/v1/chat/completions`. Responses are not stored: a next request sends
    the whole conversation.
    """
    answer = await _begin(request, services, body)
    return await (stream if body.stream else whole)(request, answer)


@router.get("/{response_id}", include_in_schema=False)
@router.delete("/{response_id}", include_in_schema=False)
async def find_response(response_id: str) -> Response:
    """Refused: responses are not stored."""
    raise ResponseNotFound(
        f"there is no response {quoted(response_id)}: responses are not stored here; each is in the "
        "reply that made it",
        field="response_id",
        expected="none: responses are not stored",
        came=quoted(response_id),
    )


async def _begin(request: Request, services: Services, body: ResponsesBody) -> Answer:
    only_query(request)
    refuse_stray_adapters(body.model_extra or {}, place="model")
    note_ignored(request, _without_effect(body))
    require_one(body.input, body.row, "input", "a text or a list of messages, or a row")
    chat = as_chat(body)
    generator = services.need_generator()
    record = await chosen_model(request, services, body.model)
    with _names_of_this_route():
        options = options_of(
            chat,
            max_tokens=body.max_output_tokens,
            default_max_tokens=None,
            num_logprobs=body.num_logprobs,
            prompt_field="input" if body.row is None else "row",
            vocab_size=generator.vocab_size,
            adapter=record,
        )
    options = replace(options, length_field="max_output_tokens")
    given = await _prompt(generator, chat, record)
    prepared = generator.prepare(given.prompt, record, options, uuid.uuid4().hex)
    if record is not None:
        services.adapter_use.count(record.name)
    generation = generator.submit(prepared, options)
    return Answer(generator, generation, _said(body, prepared.sampling), body.num_logprobs)


@contextmanager
def _names_of_this_route() -> Iterator[None]:
    """A refusal of a chat's `response_format` becomes one of `text.format`."""
    try:
        yield
    except RequestInvalid as error:
        field = _as_here(error.field or "")
        raise RequestInvalid(
            _as_here(error.message), field=field, expected=error.expected, came=error.came
        ) from error


def _as_here(text: str) -> str:
    return re.sub(r"response_format(\.json_schema)?", "text.format", text)


async def _prompt(generator: Generator, chat: ChatBody, record: AdapterRecord | None) -> Given:
    if chat.row is not None:
        return await from_row(generator, chat.row, record)
    if chat.use_adapter_template and not templates_chats(record):
        raise invalid("use_adapter_template", "an adapter with a stored template", "none")
    return await conversation_prompt(
        generator,
        chat.messages or [],
        record,
        use_adapter_template=chat.use_adapter_template,
        field="input",
    )


def _without_effect(body: ResponsesBody) -> list[str]:
    verbosity = ["text.verbosity"] if (body.text or {}).get("verbosity") else []
    # A client that sets `store` false means what happens anyway.
    is_stored = (body.model_extra or {}).get("store")
    return [*verbosity, *(name for name in set_extras(body) if name != "store" or is_stored)]


def _said(body: ResponsesBody, sampling: SamplingParams) -> dict[str, object]:
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": sampling.temperature if sampling.do_sample else 0.0,
        "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
    }
