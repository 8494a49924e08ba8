"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, over directories that an operator allows.

They load PEFT folders of the methods served here; the names are vLLM's. What a client uploaded, trained
or combined is not theirs to replace or to unload.
"""

from __future__ import annotations

import functools
from pathlib import Path

import anyio.to_thread
import structlog
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import ConfigDict, Field

from adapters.errors import AdapterExists, AdapterNotFound
from server.api.adapter_choice import only_query
from server.api.adapter_headers import name_adapter
from server.api.middleware.headers import note_ignored, set_headers
from server.api.openapi.constraints import NAME, constrained
from server.api.openapi.refusals import CHECKPOINT, refuses
from server.api.openapi.responses import plain
from server.api.schemas import OpenBody, Text, set_extras
from server.errors import FolderNotFound, LoadingDisabled, NotLoaded, NotReady
from server.generation.generator import adapter_ref
from server.services import Services, UseServices
from server.store.directories import find_folder, is_from, publish_folder, remove_versions
from server.store.registry import AdapterRecord, Registry

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1", tags=["adapters"])


class LoadBody(OpenBody):
    """vLLM's body of `/v1/load_lora_adapter`."""

    model_config = ConfigDict(
        json_schema_extra=constrained(
            properties={"lora_name": NAME},
            examples=[{"lora_name": "refunds", "lora_path": "/srv/runs/refunds"}],
        )
    )

    lora_name: Text = Field(min_length=1, description="The adapter's name here.")
    lora_path: Text = Field(
        min_length=1,
        description="A PEFT folder on the server, inside a directory of its setting load_dirs; "
        "absolute, or relative to one of them.",
    )
    load_inplace: bool | None = Field(
        None,
        description="Publish a new version under a name that was loaded before. Left out or false, "
        "a name in use is refused.",
    )


class UnloadBody(OpenBody):
    """vLLM's body of `/v1/unload_lora_adapter`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "refunds"}]})

    lora_name: Text = Field(min_length=1, description="An adapter that was loaded.")
    lora_int_id: int | None = Field(None, description="Taken and not used, as in vLLM.")


@router.post(
    "/load_lora_adapter",
    response_class=PlainTextResponse,
    summary="Load a PEFT folder of the server, as vLLM does",
    responses={
        200: plain("text/plain", "Loaded.", "Success: LoRA adapter 'refunds' added successfully.")
    },
    openapi_extra=refuses(NotReady, LoadingDisabled, FolderNotFound, *CHECKPOINT),
)
async def load_adapter(
    request: Request, services: UseServices, body: LoadBody
) -> PlainTextResponse:
    """A new adapter, or with `load_inplace` a new version. The same checks as an upload's."""
    only_query(request)
    note_ignored(request, set_extras(body))
    allowed = _allowed(services)
    services.need_generator()
    record = await anyio.to_thread.run_sync(functools.partial(_load, services, body, allowed))
    name_adapter(request, services, record)
    services.preload(adapter_ref(record))
    log.info("adapter_loaded", name=record.name, version=record.version, path=record.source_path)
    return PlainTextResponse(f"Success: LoRA adapter '{record.name}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    response_class=PlainTextResponse,
    summary="Unload an adapter that was loaded, as vLLM does",
    responses={
        200: plain(
            "text/plain", "Unloaded.", "Success: LoRA adapter 'refunds' removed successfully."
        )
    },
    openapi_extra=refuses(AdapterNotFound, LoadingDisabled, NotLoaded),
)
async def unload_adapter(
    request: Request, services: UseServices, body: UnloadBody
) -> PlainTextResponse:
    """Its name is unknown afterwards; requests that run keep it to the end."""
    only_query(request)
    note_ignored(request, set_extras(body))
    _allowed(services)
    name = body.lora_name
    unused = await anyio.to_thread.run_sync(_unload, services.registry, name)
    services.placements.forget_names([name])
    if services.ready:
        for digest in unused:
            services.client.unload(digest)
    set_headers(request, {"x-adapter-id": name})
    log.info("adapter_unloaded", name=name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _allowed(services: Services) -> tuple[Path, ...]:
    allowed = services.settings.load_dirs
    if not allowed:
        raise LoadingDisabled(
            "loading from the server's own directories is off; the operator allows some with the "
            "setting load_dirs (GRAFTWORK_LOAD_DIRS). POST /adapters uploads an adapter",
            expected="the setting load_dirs",
        )
    return allowed


def _load(services: Services, body: LoadBody, allowed: tuple[Path, ...]) -> AdapterRecord:
    registry, name = services.registry, body.lora_name
    in_place = _require_free(registry, name, in_place=bool(body.load_inplace))
    return publish_folder(
        registry,
        services.client.base,
        name,
        find_folder(body.lora_path, allowed),
        source="loaded",
        allowed=allowed,
        create_only=not in_place,
        base_names=(services.base_id, services.settings.base),
    ).record


def _require_free(registry: Registry, name: str, *, in_place: bool) -> bool:
    """Whether a version of this name, which a client loaded, is to be replaced.

    Raises:
        NameInvalid: not a name.
        AdapterExists: the name is in use, and not to be replaced.
    """
    registry.require_free(name)
    try:
        versions = registry.versions(name)
    except AdapterNotFound:
        return False
    if not in_place:
        raise AdapterExists(
            f"the lora adapter {name!r} has already been loaded; set load_inplace to true to load "
            "a new version of it",
            field="lora_name",
            came=name,
        )
    if others := [one for one in versions if not is_from(one, "loaded")]:
        raise AdapterExists(
            f"adapter {name!r} was {others[-1].source}, not loaded: it is not replaced from a folder",
            field="lora_name",
            expected="a name that is free or was loaded",
            came=name,
        )
    return True


def _unload(registry: Registry, name: str) -> tuple[str, ...]:
    others = [one for one in registry.versions(name) if not is_from(one, "loaded")]
    if others:
        raise NotLoaded(
            f"adapter {name!r} was {others[-1].source}, not loaded with /v1/load_lora_adapter: it "
            f"is not unloaded by it. DELETE /adapters/{name} deletes it, and "
            f"POST /adapters/{name}/unload takes it off the device",
            field="lora_name",
            expected="an adapter that was loaded",
            came=name,
        )
    return remove_versions(registry, name, lambda one: is_from(one, "loaded"))
