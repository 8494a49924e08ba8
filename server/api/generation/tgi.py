"""TGI's generation routes: `/generate`, `/generate_stream` and `/`.

Thin: a body becomes `Options`; `generate_reply` does the rest.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from server.api.adapter_choice import (
    LORAX_FIELDS,
    chosen_adapter,
    only_query,
    refuse_stray_adapters,
)
from server.api.adapter_headers import name_adapter
from server.api.error_replies import both_given, invalid
from server.api.generation.prompt_warning import warn_of_prompts
from server.api.generation.sampling import sampling_of
from server.api.generation.tgi_reply import PreparedRequest, stream, whole
from server.api.generation.tgi_types import EXAMPLE_EVENTS, Generated, GenerateFrame
from server.api.middleware.headers import note_ignored
from server.api.openapi.constraints import NOT_BLANK
from server.api.openapi.refusals import GENERATED, refuses
from server.api.openapi.responses import events
from server.api.schemas import GenerateBody, GenerateParameters, set_extras
from server.generation.generator import Generator, Options, Prompt
from server.generation.grammars import grammar_from
from server.services import Services, UseServices
from server.store.registry import AdapterRecord

router = APIRouter(tags=["generation"])

_ADAPTER = Query(
    None,
    description="Adapter: NAME, NAME@VERSION or NAME@ALIAS; none is the base.",
    json_schema_extra=NOT_BLANK,
)
# Where the fields that clients may misspell or misplace belong.
_FIELDS = {name: f"parameters.{name}" for name in GenerateParameters.model_fields}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: events(
        GenerateFrame,
        EXAMPLE_EVENTS,
        "The output; in a stream, a token an event.",
        timed=True,
    )
}


@router.post(
    "/generate",
    summary="Generate, in TGI's protocol",
    response_model=Generated,
    responses=_EVENTS,
    openapi_extra=refuses(*GENERATED),
)
async def generate(
    request: Request, services: UseServices, body: GenerateBody, adapter: str | None = _ADAPTER
) -> Response:
    """One output, or a stream where the body says `stream`."""
    prepared = await _prepare(request, services, body, adapter, streams=bool(body.stream))
    if body.stream:
        return await stream(request, prepared)
    return JSONResponse(await whole(request, prepared))


@router.post(
    "/generate_stream",
    summary="Generate as server-sent events, in TGI's protocol",
    response_class=Response,
    responses=_EVENTS,
    openapi_extra=refuses(*GENERATED),
)
async def generate_stream(
    request: Request, services: UseServices, body: GenerateBody, adapter: str | None = _ADAPTER
) -> Response:
    """A stream, whatever the body says."""
    return await stream(request, await _prepare(request, services, body, adapter, streams=True))


@router.post(
    "/",
    summary="As /generate, with the output in a list",
    response_model=list[Generated],
    responses=_EVENTS,
    openapi_extra=refuses(*GENERATED),
)
async def compat_generate(
    request: Request, services: UseServices, body: GenerateBody, adapter: str | None = _ADAPTER
) -> Response:
    """Where huggingface_hub's `InferenceClient.text_generation` posts."""
    prepared = await _prepare(request, services, body, adapter, streams=bool(body.stream))
    if body.stream:
        return await stream(request, prepared)
    return JSONResponse([await whole(request, prepared)])


async def _prepare(
    request: Request, services: Services, body: GenerateBody, adapter: str | None, *, streams: bool
) -> PreparedRequest:
    only_query(request, "adapter")
    parameters = body.parameters or GenerateParameters()
    _note_extras(request, body, parameters)
    name = chosen_adapter(adapter, parameters.adapter_id)
    _check_inputs(body)
    generator = services.need_generator()
    record = await generator.resolve(name)
    name_adapter(request, services, record)
    options = options_from(parameters, services.settings.max_best_of)
    if streams:
        _check_stream(parameters)
    prompt = await _prompt(generator, body, record)
    if body.row is None:
        await warn_of_prompts(request, services, generator, record, [prompt.text])
    # The engine's ids are ours: two requests in flight may carry the same x-request-id.
    engine_request = generator.prepare(prompt, record, options, uuid.uuid4().hex)
    if record is not None:
        services.adapter_use.count(record.name)
    return PreparedRequest(generator, prompt, engine_request, options, parameters)


def _note_extras(request: Request, body: GenerateBody, parameters: GenerateParameters) -> None:
    inside = parameters.model_extra or {}
    named = [
        name for name, value in inside.items() if value is not None or name not in LORAX_FIELDS
    ]
    refuse_stray_adapters([*(body.model_extra or {}), *named], also=("model",))
    note_ignored(request, {*set_extras(body), *set_extras(parameters)}, _FIELDS)


def _check_inputs(body: GenerateBody) -> None:
    if body.inputs is not None and body.row is not None:
        raise both_given("inputs", "row")
    if body.row is None and not body.inputs:
        raise invalid(
            "inputs",
            "a text of at least one character (or a row)",
            "nothing" if body.inputs is None else "''",
        )


def _check_stream(parameters: GenerateParameters) -> None:
    if parameters.decoder_input_details:
        raise invalid("decoder_input_details", "false when streaming", "true")
    if (parameters.best_of or 1) > 1:
        raise invalid("best_of", "1 when streaming", parameters.best_of)


async def _prompt(generator: Generator, body: GenerateBody, record: AdapterRecord | None) -> Prompt:
    if body.row is not None:
        return await generator.encode_row(body.row, record)
    return await generator.encode(body.inputs or "")


def options_from(parameters: GenerateParameters, max_best_of: int) -> Options:
    """TGI's parameters as options; the command line generates with them as well.

    Raises:
        RequestInvalid: more samples than may be drawn, or more than one of a greedy output.
        Contradiction: two grammars.
    """
    sampled = _samples(parameters)
    best_of = parameters.best_of or 1
    if best_of > max_best_of:
        raise invalid("best_of", f"at most {max_best_of}", best_of)
    if best_of > 1 and not sampled:
        raise invalid("best_of", "1 unless do_sample is true", best_of)
    return Options(
        sampling=sampling_of(
            parameters,
            do_sample=sampled,
            ignore_eos=bool(parameters.ignore_eos or parameters.ignore_eos_token),
            num_logprobs=max(parameters.top_n_tokens or 0, parameters.return_k_alternatives or 0),
            prompt_logprobs=bool(parameters.decoder_input_details),
            grammar=grammar_from(
                tgi_grammar=parameters.grammar,
                response_format=parameters.response_format,
                field_prefix="parameters.",
            ),
        ),
        max_new_tokens=parameters.max_new_tokens,
        stop=tuple(parameters.stop or ()),
        truncate=parameters.truncate,
    )


def _samples(parameters: GenerateParameters) -> bool:
    """Whether to sample: by do_sample, else as in TGI, where a parameter of sampling is given."""
    if parameters.do_sample is not None:
        return parameters.do_sample
    return (
        parameters.temperature not in (None, 1.0)
        or bool(parameters.top_k)
        or parameters.top_p not in (None, 1.0)
        or parameters.typical_p not in (None, 1.0)
        or bool(parameters.min_p)
    )
