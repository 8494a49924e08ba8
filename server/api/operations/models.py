"""What is served: `/v1/models`, `/info`, `/methods`. Reads only."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from adapters.method import AdapterMethod
from adapters.training.job import METHOD_NAMES
from adapters.training.recipes import RECIPES
from server.api.adapter_choice import only_query
from server.api.generation.openai.model import chosen_model
from server.api.openapi.constraints import NOT_BLANK
from server.api.openapi.refusals import SERVED, refuses
from server.api.reply_fields import ReplyModel, UnixTime, fixed, may_show, shows
from server.api.schemas import MAX_TOP_TOKENS
from server.errors import NotReady
from server.services import Services, UseServices
from server.store.caller import Caller
from server.store.registry import AdapterRecord

router = APIRouter(tags=["models"])

_PAGE = 1000
Name = Annotated[
    str,
    Path(
        description="The base, or an adapter: NAME, NAME@VERSION or NAME@ALIAS.",
        json_schema_extra=NOT_BLANK,
    ),
]
_DIGEST = "6e0e5b0c1d22a7f0…"


class Model(ReplyModel):
    """The base or an adapter, as OpenAI's model with our fields."""

    id: str = shows("complaints", "What `model` may say.")
    object: Literal["model"] = fixed("model", "What this is.")
    created: UnixTime = shows(1795376932, "Unix time, seconds.")
    owned_by: str = fixed("graftwork", "Always graftwork.")
    root: str = shows("SmolLM2-135M-Instruct", "The base.")
    parent: str | None = shows("SmolLM2-135M-Instruct", "The base; null for the base itself.")
    max_model_len: int = shows(8192, "Positions that prompt and output may take.")
    peft_type: str | None = may_show("PREFIX_TUNING", "Of an adapter: its method.")
    version: int | None = may_show(1, "Of an adapter: what its name means now.")
    digest: str = shows(_DIGEST, "Of the weights.")
    status: str | None = may_show("ok", "Of an adapter: ok or corrupt.")
    residency: str = shows("device", "Where it is now.")
    default_temperature: float | None = may_show(
        0.0, "Of an adapter with labels: the temperature where a request gives none."
    )
    notes: list[str] | None = may_show([], "Of the base: facts about its weights.")


class ModelList(ReplyModel):
    """Everything that `model` may say."""

    object: Literal["list"] = fixed("list", "What this is.")
    data: list[Model] = shows([], "The base first.")


class BaseInfo(ReplyModel):
    """The base's dimensions."""

    model_type: str = shows("llama", "transformers' name of the architecture.")
    digest: str = shows("1a45f6bea123…", "Of its weights.")
    notes: list[str] = fixed([], "Facts about them.")
    num_layers: int = shows(30, "Layers.")
    hidden_size: int = shows(576, "Width.")
    vocab_size: int = shows(49152, "Tokens of the vocabulary.")
    max_positions: int = shows(8192, "Positions.")


class EngineInfo(ReplyModel):
    """The engine. Its load reveals other callers' requests, so only an admin gets it."""

    num_running: int | None = may_show(0, "For admin: sequences in the batch.")
    num_waiting: int | None = may_show(0, "For admin: sequences that wait.")
    kv_blocks_used: int | None = may_show(0, "For admin: blocks of keys and values in use.")
    kv_blocks_total: int = shows(1024, "Blocks there are.")


class Info(ReplyModel):
    """TGI's fields, then ours."""

    model_id: str = shows("SmolLM2-135M-Instruct", "The base's name.")
    model_sha: str = shows("1a45f6bea123…", "Its revision, or its digest.")
    model_dtype: str = shows("bfloat16", "Number format of the weights.")
    model_device_type: str = shows("cpu", "Where it runs.")
    model_pipeline_tag: str = fixed("text-generation", "Always text-generation.")
    max_concurrent_requests: int = shows(1088, "Running and waiting ones.")
    max_best_of: int = shows(8, "Samples of one request.")
    max_stop_sequences: int = shows(16, "Stop strings of one request.")
    max_top_n_tokens: int = shows(20, "Likeliest tokens that a request may report.")
    max_input_tokens: int = shows(8192, "Tokens of a prompt.")
    max_total_tokens: int = shows(8193, "Tokens of prompt and output.")
    max_batch_total_tokens: int = shows(512, "Tokens of one step.")
    router: str = fixed("graftwork", "Always graftwork.")
    version: str = shows("0.1.0", "Of the server.")
    base: BaseInfo = shows({}, "The base.")
    engine: EngineInfo = shows({}, "The engine.")


class MethodInfo(ReplyModel):
    """A method of making adapters."""

    name: str = shows("ia3", "What `method` may say.")
    aliases: list[str] = shows([], "What it may say as well.")
    peft_type: str = shows("IA3", "PEFT's name.")
    config: dict[str, Any] = shows({"properties": {}}, "PEFT's fields as a JSON Schema.")
    training: dict[str, Any] = shows({"hyperparameters": {}}, "The recipe: what is left out.")


class Methods(ReplyModel):
    """Every method."""

    methods: list[MethodInfo] = shows([], "One entry each.")


@router.get(
    "/v1/models",
    summary="The base first, then every adapter",
    response_model=ModelList,
    openapi_extra=refuses(NotReady),
)
async def list_models(request: Request, services: UseServices) -> Response:
    """OpenAI's list; adapters carry their base in `parent`."""
    only_query(request)
    services.need_generator()
    # Written there, too: ten thousand take seconds.
    body = await anyio.to_thread.run_sync(lambda: _all_models(services).model_dump_json())
    return Response(body, media_type="application/json")


@router.get("/v1/models/{name:path}", summary="One of them", openapi_extra=refuses(*SERVED))
async def retrieve_model(request: Request, services: UseServices, name: Name) -> Model:
    """The base by its id, or an adapter: NAME, NAME@VERSION or NAME@ALIAS."""
    only_query(request)
    record = await chosen_model(request, services, name)
    return _base_model(services) if record is None else _adapter_model(services, record)


@router.get(
    "/info",
    summary="The base, the limits and the version, in TGI's shape",
    openapi_extra=refuses(NotReady),
)
async def info(request: Request, services: UseServices) -> Info:
    """TGI's fields first, then ours. Where keys are required, the live counters are the admin's."""
    only_query(request)
    generator = services.need_generator()
    base, settings, stats = services.client.base, services.settings, services.client.stats
    caller: Caller = request.state.caller
    engine = EngineInfo(kv_blocks_total=stats.kv_blocks_total)
    if caller.only_owner is None:
        engine = EngineInfo.model_validate(stats)
    return Info(
        model_id=services.base_id,
        model_sha=settings.revision or base.digest,
        model_dtype=base.dtype,
        model_device_type=settings.device.split(":")[0],
        max_concurrent_requests=settings.max_running + settings.max_queued,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stops,
        max_top_n_tokens=MAX_TOP_TOKENS,
        max_input_tokens=generator.max_prompt_tokens,
        max_total_tokens=generator.max_sequence_tokens + 1,
        max_batch_total_tokens=settings.max_step_tokens,
        version=version("graftwork"),
        base=BaseInfo.model_validate(base).model_copy(update={"notes": list(services.base_notes)}),
        engine=engine,
    )


@router.get(
    "/methods",
    summary="Every method with its config fields and how it is trained",
)
async def methods(request: Request) -> Methods:
    """PEFT's field names and defaults as a JSON schema a method; `training` is its recipe.

    `POST /train` takes what is left out from the recipe, and then from the schema's defaults.
    """
    only_query(request)
    table = await anyio.to_thread.run_sync(_method_table)
    return Methods(
        methods=[
            MethodInfo(
                name=method.name,
                aliases=_aliases(method.name, peft_type),
                peft_type=peft_type,
                config=method.config_class.model_json_schema(),
                training=RECIPES[peft_type].model_dump(mode="json"),
            )
            for peft_type, method in table.items()
        ]
    )


def _method_table() -> dict[str, AdapterMethod[Any]]:
    # Loads torch, which a server at rest does without.
    from adapters.methods import METHODS

    return METHODS


def _aliases(name: str, peft_type: str) -> list[str]:
    """Other names under which `POST /train` knows a method."""
    return [other for other, kind in METHOD_NAMES.items() if kind == peft_type and other != name]


def _all_records(services: Services) -> list[AdapterRecord]:
    records: list[AdapterRecord] = []
    while page := services.registry.list(len(records), _PAGE):
        records += page
    return records


def _all_models(services: Services) -> ModelList:
    adapters = [_adapter_model(services, one) for one in _all_records(services)]
    return ModelList(data=[_base_model(services), *adapters])


def _base_model(services: Services) -> Model:
    return Model(
        id=services.base_id,
        created=int(services.started_at),
        root=services.base_id,
        parent=None,
        max_model_len=services.need_generator().max_sequence_tokens,
        digest=services.client.base.digest,
        residency="device",
        notes=list(services.base_notes),
    )


def _adapter_model(services: Services, record: AdapterRecord) -> Model:
    return Model(
        id=record.name,
        created=record.created_at,
        root=services.base_id,
        parent=services.base_id,
        max_model_len=services.need_generator().max_sequence_tokens,
        peft_type=record.peft_type,
        version=record.version,
        digest=record.digest,
        status=record.status,
        default_temperature=record.default_temperature,
        residency=services.residency(record),
    )
