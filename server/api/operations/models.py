"""What is served: `/v1/models`, `/info`, `/methods`. Reads only."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request

from adapters.method import AdapterMethod
from adapters.training.job import METHOD_NAMES
from adapters.training.recipes import RECIPES
from server.api.adapter_choice import only_query
from server.api.generation.openai.model import chosen_model
from server.api.schemas import MAX_TOP_TOKENS
from server.services import Services, UseServices
from server.store.registry import AdapterRecord

router = APIRouter(tags=["models"])

_PAGE = 1000


@router.get("/v1/models", summary="The base first, then every adapter")
async def list_models(request: Request, services: UseServices) -> dict[str, Any]:
    """OpenAI's list; adapters carry their base in `parent`."""
    only_query(request)
    services.need_generator()
    records = await anyio.to_thread.run_sync(lambda: _all_records(services))
    return {
        "object": "list",
        "data": [_base_model(services), *(_adapter_model(services, one) for one in records)],
    }


@router.get("/v1/models/{name:path}", summary="One of them")
async def retrieve_model(request: Request, services: UseServices, name: str) -> dict[str, Any]:
    """The base by its id, or an adapter: NAME, NAME@VERSION or NAME@ALIAS."""
    only_query(request)
    record = await chosen_model(request, services, name)
    return _base_model(services) if record is None else _adapter_model(services, record)


@router.get("/info", summary="The base, the limits and the version, in TGI's shape")
async def info(request: Request, services: UseServices) -> dict[str, Any]:
    """TGI's fields first, then ours."""
    only_query(request)
    generator = services.need_generator()
    base, settings, stats = services.client.base, services.settings, services.client.stats
    return {
        "model_id": services.base_id,
        "model_sha": settings.revision or base.digest,
        "model_dtype": base.dtype,
        "model_device_type": settings.device.split(":")[0],
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": settings.max_running + settings.max_queued,
        "max_best_of": settings.max_best_of,
        "max_stop_sequences": settings.max_stops,
        "max_top_n_tokens": MAX_TOP_TOKENS,
        "max_input_tokens": generator.max_prompt_tokens,
        "max_total_tokens": generator.max_sequence_tokens,
        "max_batch_total_tokens": settings.max_step_tokens,
        "router": "graftwork",
        "version": version("graftwork"),
        "base": {
            "model_type": base.model_type,
            "digest": base.digest,
            "notes": list(services.base_notes),
            "num_layers": base.num_layers,
            "hidden_size": base.hidden_size,
            "vocab_size": base.vocab_size,
            "max_positions": base.max_positions,
        },
        "engine": {
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "kv_blocks_used": stats.kv_blocks_used,
            "kv_blocks_total": stats.kv_blocks_total,
        },
    }


@router.get("/methods", summary="Every method with its config fields and how it is trained")
async def methods(request: Request) -> dict[str, Any]:
    """PEFT's field names and defaults as a JSON schema a method; `training` is its recipe.

    `POST /train` takes what is left out from the recipe, and then from the schema's defaults.
    """
    only_query(request)
    table = await anyio.to_thread.run_sync(_method_table)
    return {
        "methods": [
            {
                "name": method.name,
                "aliases": _aliases(method.name, peft_type),
                "peft_type": peft_type,
                "config": method.config_class.model_json_schema(),
                "training": RECIPES[peft_type].model_dump(mode="json"),
            }
            for peft_type, method in table.items()
        ]
    }


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


def _base_model(services: Services) -> dict[str, Any]:
    base = services.client.base
    return {
        "id": services.base_id,
        "object": "model",
        "created": int(services.started_at),
        "owned_by": "graftwork",
        "root": services.base_id,
        "parent": None,
        "max_model_len": services.need_generator().max_sequence_tokens,
        "digest": base.digest,
        "residency": "device",
        "notes": list(services.base_notes),
    }


def _adapter_model(services: Services, record: AdapterRecord) -> dict[str, Any]:
    return {
        "id": record.name,
        "object": "model",
        "created": int(record.created_at.timestamp()),
        "owned_by": "graftwork",
        "root": services.base_id,
        "parent": services.base_id,
        "max_model_len": services.need_generator().max_sequence_tokens,
        "peft_type": record.peft_type,
        "version": record.version,
        "digest": record.digest,
        "status": record.status,
        "residency": services.client.residency(record.digest),
    }
