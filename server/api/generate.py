"""TGI's generation routes: `/generate`, `/generate_stream` and `/`.

Thin: a body becomes `Options`, pieces become TGI's JSON. The first token is awaited before a stream
begins, so that a request which fails before it gets a real status.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from adapters.registry import AdapterRecord
from server.api.adapter_choice import chosen_adapter, only_query, refuse_stray_adapters
from server.api.errors import body_of, tell
from server.api.headers import note_ignored, set_headers, timing_headers
from server.api.schemas import GenerateBody, GenerateParameters, set_extras
from server.api.services import Services, UseServices
from server.api.sse import EventStream, event, unless_gone
from server.engine.request import GenerationRequest, SamplingParams
from server.errors import Contradiction, RequestInvalid
from server.generation import Generation, Generator, Options, Piece, Prompt, mean_logprob
from server.guidance import grammar_from
from server.text.tokenizer import TextTokenizer

router = APIRouter(tags=["generation"])

# lorax-client sends every parameter that it knows, these as nulls where nobody asked for them.
_LORAX = frozenset({"adapter_source", "merged_adapters"})
_ADAPTER = Query(None, description="Adapter: NAME, NAME@VERSION or NAME@ALIAS; none is the base.")


@router.post("/generate", summary="Generate, in TGI's protocol")
async def generate(
    request: Request, services: UseServices, body: GenerateBody, adapter: str | None = _ADAPTER
) -> Response:
    """One output, or a stream where the body says `stream`."""
    job = await _prepare(request, services, body, adapter)
    if body.stream:
        return await _stream(request, job)
    return JSONResponse(await _whole(request, job))


@router.post("/generate_stream", summary="Generate as server-sent events, in TGI's protocol")
async def generate_stream(
    request: Request, services: UseServices, body: GenerateBody, adapter: str | None = _ADAPTER
) -> Response:
    """A stream, whatever the body says."""
    return await _stream(request, await _prepare(request, services, body, adapter))


@router.post("/", summary="As /generate, with the output in a list")
async def compat_generate(
    request: Request, services: UseServices, body: GenerateBody, adapter: str | None = _ADAPTER
) -> Response:
    """Where huggingface_hub's `InferenceClient.text_generation` posts."""
    job = await _prepare(request, services, body, adapter)
    if body.stream:
        return await _stream(request, job)
    return JSONResponse([await _whole(request, job)])


@dataclass(frozen=True)
class _Job:
    """A request that has passed every check that needs no engine."""

    generator: Generator
    prompt: Prompt
    request: GenerationRequest
    options: Options
    parameters: GenerateParameters

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.generator.tokenizer

    @property
    def prefix(self) -> str:
        """What stands before the output in `generated_text`."""
        return self.prompt.text if self.parameters.return_full_text else ""

    @property
    def seed(self) -> int | None:
        sampling = self.request.sampling
        return sampling.seed if sampling.do_sample else None


async def _prepare(
    request: Request, services: Services, body: GenerateBody, adapter: str | None
) -> _Job:
    only_query(request, "adapter")
    parameters = body.parameters or GenerateParameters()
    _note_extras(request, body, parameters)
    name = chosen_adapter(adapter, parameters.adapter_id)
    _check_inputs(body)
    generator = services.need_generator()
    record = await generator.resolve(name)
    services.name_adapter(request, record)
    options = options_from(parameters, services.settings.max_best_of)
    prompt = await _prompt(generator, body, record)
    # The engine's ids are ours: two requests in flight may carry the same x-request-id.
    prepared = generator.prepare(prompt, record, options, uuid.uuid4().hex)
    if record is not None:
        services.requests_by_adapter[record.name] += 1
    return _Job(generator, prompt, prepared, options, parameters)


def _note_extras(request: Request, body: GenerateBody, parameters: GenerateParameters) -> None:
    inside = parameters.model_extra or {}
    named = [name for name, value in inside.items() if value is not None or name not in _LORAX]
    refuse_stray_adapters([*(body.model_extra or {}), *named], also=("model",))
    note_ignored(request, {*set_extras(body), *set_extras(parameters)})


def _check_inputs(body: GenerateBody) -> None:
    if body.inputs is not None and body.row is not None:
        raise Contradiction(
            "inputs and row are both given; send one of them",
            field="row",
            expected="inputs or row",
            came="both",
        )
    if body.row is None and not body.inputs:
        raise RequestInvalid(
            "inputs: expected a text of at least one character (or a row), came none",
            field="inputs",
            expected="a text of at least one character",
            came="nothing" if body.inputs is None else "''",
        )


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
        raise _invalid("best_of", f"at most {max_best_of}", best_of)
    if best_of > 1 and not sampled:
        raise _invalid("best_of", "1 unless do_sample is true", best_of)
    seed = parameters.seed
    if seed is None:
        # 53 bits: every JSON reader gets the seed back that was used.
        seed = secrets.randbits(53) if sampled else 0
    return Options(
        sampling=SamplingParams(
            do_sample=sampled,
            temperature=_or(parameters.temperature, 1.0),
            top_k=_or(parameters.top_k, 0),
            top_p=_or(parameters.top_p, 1.0),
            min_p=_or(parameters.min_p, 0.0),
            typical_p=_or(parameters.typical_p, 1.0),
            repetition_penalty=_or(parameters.repetition_penalty, 1.0),
            presence_penalty=_or(parameters.presence_penalty, 0.0),
            frequency_penalty=_or(parameters.frequency_penalty, 0.0),
            seed=seed,
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
    """Whether to sample: as said, or as TGI does, where something that shapes sampling is given."""
    if parameters.do_sample is not None:
        return parameters.do_sample
    return (
        parameters.temperature not in (None, 1.0)
        or bool(parameters.top_k)
        or parameters.top_p not in (None, 1.0)
        or parameters.typical_p not in (None, 1.0)
        or bool(parameters.min_p)
    )


def _or(value: Any, neutral: Any) -> Any:
    return neutral if value is None else value


def _invalid(name: str, expected: str, came: Any) -> RequestInvalid:
    return RequestInvalid(
        f"{name}: expected {expected}, came {came}", field=name, expected=expected, came=str(came)
    )


# --- whole replies -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Output:
    generation: Generation
    pieces: list[Piece]
    seed: int | None


async def _whole(request: Request, job: _Job) -> dict[str, Any]:
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


async def _run_all(job: _Job, count: int) -> list[_Output]:
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


def _details(job: _Job, output: _Output) -> dict[str, Any]:
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


def _prefill(job: _Job, generation: Generation) -> list[dict[str, Any]]:
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


def _token(job: _Job, piece: Piece) -> dict[str, Any]:
    token: dict[str, Any] = {
        "id": piece.token_id,
        "text": piece.text,
        "logprob": None if piece.logprob is None else piece.logprob.logprob,
        "special": piece.special,
    }
    if count := job.parameters.return_k_alternatives:
        token["alternative_tokens"] = _top(job, piece, count)
    return token


def _top(job: _Job, piece: Piece, count: int) -> list[dict[str, Any]]:
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


async def _stream(request: Request, job: _Job) -> Response:
    if job.parameters.decoder_input_details:
        raise _invalid("decoder_input_details", "false when streaming", "true")
    if (job.parameters.best_of or 1) > 1:
        raise _invalid("best_of", "1 when streaming", job.parameters.best_of)
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
    job: _Job,
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
        yield event(body_of(tell(error), request.url.path))


def _frame(job: _Job, generation: Generation, index: int, piece: Piece) -> dict[str, Any]:
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
