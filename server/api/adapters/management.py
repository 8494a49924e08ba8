"""Management of adapters: upload, list, look at, download, delete, move between tiers and versions.

Thin: the registry decides, off the event loop. These routes refuse what they do not know.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

from anyio.to_thread import run_sync
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from adapters.checkpoint.archive import stage_upload
from adapters.checkpoint.folder import CONFIG_FILE, read_config
from adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterNotFound,
    ArchiveInvalid,
    NameInvalid,
    TemplateInvalid,
    UnsupportedFile,
)
from adapters.metadata import SETTABLE_FIELDS, AdapterMetadata
from adapters.template import Template, Tokenization, default_separator
from server.api.adapter_choice import only_query
from server.api.adapter_headers import name_adapter
from server.api.adapters import versions as replies
from server.api.error_replies import invalid, quoted
from server.api.middleware.headers import set_headers
from server.api.openapi.constraints import CLOSED, NAME
from server.api.openapi.refusals import (
    CHECKPOINT,
    NAMED,
    SERVED,
    STORED,
    refuses,
)
from server.api.openapi.responses import plain
from server.api.schemas import AliasBody, RollbackBody
from server.api.upload import Form, Upload, receive_upload, small_fields
from server.config.settings import MIB
from server.errors import NotReady, RequestInvalid, TooManyAliases
from server.services import Services, UseServices
from server.store.registry import AdapterRecord, Published, Registry

router = APIRouter(prefix="/adapters", tags=["adapters"])

Alias = Annotated[str, Path(json_schema_extra={**NAME, "not": {"pattern": "^[0-9]+$"}})]
Version = Annotated[
    int | None, Query(ge=1, lt=2**63, description="A version; left out, see the route.")
]

_LABELS = 'a JSON list such as ["complaint", "no complaint"], or the field repeated'
# Longer lists are not shown whole.
_MAX_SHOWN_LIST = 300
FORM_FIELDS = ("name", *SETTABLE_FIELDS)
_CURL = "-F name=NAME -F files=@adapter_config.json -F files=@adapter_model.safetensors"
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "files"],
                    **CLOSED,
                    "properties": {
                        "name": {"type": "string", "description": "The adapter's name.", **NAME},
                        "description": {"type": "string", "description": "Free text."},
                        "template": {
                            "type": "string",
                            "description": "Makes prompts of rows: {column} substitution.",
                        },
                        "labels": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "description": "At least two texts: a JSON list, or the field repeated.",
                        },
                        "target_separator": {
                            "type": "string",
                            "description": "Left out: white space that the template ends with, "
                            "else one space.",
                        },
                        "append_eos": {
                            "type": "boolean",
                            "description": "Whether targets ended with the end of sequence.",
                        },
                        "tokenization": {
                            "type": "string",
                            "enum": ["boundary", "as_written"],
                            "default": "boundary",
                            "description": "Whether white space at the template's end belongs to "
                            "the target.",
                        },
                        "files": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "adapter_config.json and adapter_model.safetensors, or "
                            "one .zip or .tar of them.",
                        },
                    },
                },
                "example": {
                    "name": "complaints",
                    "files": ["adapter_config.json", "adapter_model.safetensors"],
                },
            }
        },
    }
}


@router.post(
    "",
    status_code=201,
    summary="Upload an adapter in PEFT's format",
    response_model=replies.UploadedVersion,
    response_description="A new version.",
    responses={
        200: {
            "model": replies.UploadedVersion,
            "description": "The newest version has the same content.",
        }
    },
    openapi_extra=_FORM
    | refuses(NotReady, UnsupportedFile, ArchiveInvalid, TemplateInvalid, *CHECKPOINT),
)
async def upload_adapter(request: Request, services: UseServices) -> Response:
    """201 for a new version, 200 where the newest version is just this already."""
    only_query(request)
    services.need_generator()
    registry, settings = services.registry, services.settings
    with registry.staging_dir() as received, registry.staging_dir() as staged:
        form = Form(
            small_fields(FORM_FIELDS, settings),
            "files",
            settings.max_upload_mib * MIB,
            settings.max_parts,
            _CURL,
        )
        upload = await receive_upload(request, received, form)
        create_only = _create_only(request)
        published, ignored = await run_sync(
            lambda: _publish(services, upload, staged, create_only=create_only)
        )
    name_adapter(request, services, published.record)
    version = _version(services, published.record)
    reply = replies.UploadedVersion(**dict(version), ignored_files=list(ignored))
    location = {"location": f"/adapters/{published.record.name}"}
    return JSONResponse(
        reply.model_dump(by_alias=True), 201 if published.created else 200, location
    )


@router.get("", summary="Every adapter, at its default version")
async def list_adapters(
    request: Request,
    services: UseServices,
    offset: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> replies.AdapterList:
    """By name; `total` says whether there are more."""
    only_query(request, "offset", "limit")
    registry = services.registry
    records = await run_sync(lambda: registry.list(offset, limit))
    total = await run_sync(registry.count)
    listed = [
        replies.ListedAdapter(
            **dict(_version(services, one)), counters=_counters(services, one.name)
        )
        for one in records
    ]
    return replies.AdapterList(adapters=listed, total=total)


@router.get(
    "/{name}",
    summary="One adapter: its versions, config, template and counters",
    openapi_extra=refuses(AdapterNotFound),
)
async def get_adapter(request: Request, services: UseServices, name: str) -> replies.AdapterDetails:
    """The version that a bare name means, and all versions."""
    only_query(request)
    registry = services.registry
    versions = await run_sync(lambda: registry.versions(name))
    default = next((record for record in versions if record.is_default), versions[-1])
    config = await run_sync(lambda: _config(registry, default))
    name_adapter(request, services, default)
    listed = [replies.VersionWithRecipe.of(one, residency_of(services, one)) for one in versions]
    return replies.AdapterDetails(
        **dict(listed[versions.index(default)]),
        config=config,
        counters=_counters(services, name),
        versions=listed,
    )


@router.get(
    "/{name}/download",
    summary="PEFT's folder of an adapter as a zip",
    response_class=StreamingResponse,
    responses={200: plain("application/zip", "A zip of the folder.")},
    openapi_extra=refuses(*NAMED, AdapterCorrupt),
)
async def download_adapter(
    request: Request, services: UseServices, name: str, version: Version = None
) -> Response:
    """The version that a bare name means, unless one is given."""
    only_query(request, "version")
    registry = services.registry
    record = await run_sync(lambda: registry.resolve(_reference(name, version)))
    blocks = await run_sync(lambda: registry.download_zip(record.name, record.version))
    name_adapter(request, services, record)
    file_name = f"{record.name}-v{record.version}.zip"
    headers = {
        "content-disposition": f'attachment; filename="{file_name}"',
        "etag": f'"{record.digest}"',
    }
    return StreamingResponse(blocks, media_type="application/zip", headers=headers)


@router.delete(
    "/{name}",
    summary="Delete an adapter, or one version of it",
    openapi_extra=refuses(*NAMED, *STORED),
)
async def delete_adapter(
    request: Request, services: UseServices, name: str, version: Version = None
) -> replies.AdapterDeleted:
    """Every version, unless one is given. Requests that run keep theirs to the end."""
    only_query(request, "version")
    registry = services.registry
    versions = await run_sync(lambda: registry.versions(name))
    unused = await run_sync(lambda: registry.delete(name, version))
    if services.ready:
        for digest in unused:
            services.client.unload(digest)
    removed = [record for record in versions if version in (None, record.version)]
    for record in removed:
        services.placements.forget(record.digest, name)
    gone = [record.version for record in removed]
    shown_version = "-" if version is None else str(version)
    set_headers(request, {"x-adapter-id": name, "x-adapter-version": shown_version})
    return replies.AdapterDeleted(name=name, deleted_versions=gone)


@router.post(
    "/{name}/preload",
    status_code=202,
    summary="Bring an adapter to the device",
    openapi_extra=refuses(*SERVED),
)
async def preload_adapter(
    request: Request, services: UseServices, name: str, version: Version = None
) -> replies.AdapterVersion:
    """Started, not awaited: `residency` of `GET /adapters/{name}` says when it is there."""
    from server.generation.generator import adapter_ref

    record = await _servable(request, services, name, version)
    services.preload(adapter_ref(record))
    return _version(services, record)


@router.post(
    "/{name}/unload",
    status_code=202,
    summary="Take an adapter off the device",
    openapi_extra=refuses(*SERVED),
)
async def unload_adapter(
    request: Request, services: UseServices, name: str, version: Version = None
) -> replies.AdapterVersion:
    """Once no sequence uses it. The adapter stays and loads again with the next request for it.

    Bytes that another name uses as well stay on the device for that name.
    """
    record = await _servable(request, services, name, version)
    services.unload(record.digest, record.name)
    return _version(services, record)


@router.post(
    "/{name}/rollback",
    summary="Make a bare name mean an older version",
    openapi_extra=refuses(*NAMED, *STORED),
)
async def rollback_adapter(
    request: Request, services: UseServices, name: str, body: RollbackBody
) -> replies.AdapterVersion:
    """Until the next new version is published."""
    only_query(request)
    record = await run_sync(lambda: services.registry.rollback(name, body.version))
    name_adapter(request, services, record)
    return _version(services, record)


@router.put(
    "/{name}/aliases/{alias}",
    summary="Name a version of an adapter",
    openapi_extra=refuses(*NAMED, NameInvalid, TooManyAliases, *STORED),
)
async def set_alias(
    request: Request, services: UseServices, name: str, alias: Alias, body: AliasBody
) -> replies.AdapterVersion:
    """Set it, or move it to another version."""
    only_query(request)
    record = await run_sync(lambda: services.registry.set_alias(name, alias, body.version))
    name_adapter(request, services, record)
    return _version(services, record)


@router.delete(
    "/{name}/aliases/{alias}",
    summary="Remove an alias of an adapter",
    openapi_extra=refuses(*NAMED, *STORED),
)
async def remove_alias(
    request: Request, services: UseServices, name: str, alias: str
) -> replies.AdapterVersion:
    """Its version stays; the reply is that version."""
    only_query(request)
    record = await run_sync(lambda: services.registry.remove_alias(name, alias))
    name_adapter(request, services, record)
    return _version(services, record)


async def _servable(
    request: Request, services: Services, name: str, version: int | None
) -> AdapterRecord:
    only_query(request, "version")
    services.need_generator()
    record = await run_sync(lambda: services.registry.resolve(_reference(name, version)))
    name_adapter(request, services, record)
    return record


def _reference(name: str, version: int | None) -> str:
    return name if version is None else f"{name}@{version}"


def _config(registry: Registry, record: AdapterRecord) -> dict[str, Any] | None:
    try:
        return read_config(registry.blob_path(record.digest) / CONFIG_FILE)
    except (AdapterError, OSError):
        return None  # `status` says that the stored bytes are damaged


def _version(services: Services, record: AdapterRecord) -> replies.AdapterVersion:
    return replies.AdapterVersion.of(record, residency_of(services, record))


def _counters(services: Services, name: str) -> replies.AdapterCounters:
    return replies.AdapterCounters.model_validate(services.adapter_use[name])


def residency_of(services: Services, record: AdapterRecord) -> replies.Residency:
    """Where an adapter is now; "disk" while no engine is ready."""
    return services.residency(record)


# --- the upload's form ---------------------------------------------------------------------


def _publish(
    services: Services, upload: Upload, staged: Any, *, create_only: bool
) -> tuple[Published, tuple[str, ...]]:
    name = upload.one("name")
    if name is None:
        raise invalid("name", "a form field with the adapter's name", "nothing")
    template = upload.one("template")
    tokenization = upload.one("tokenization")
    if tokenization is None:
        tokenization = "boundary"
    separator = upload.one("target_separator")
    metadata = AdapterMetadata(
        description=upload.one("description"),
        template=template,
        target_separator=_separator(separator, template, tokenization),
        labels=_labels(upload, services.settings.max_labels),
        append_eos=_flag(upload, "append_eos"),
        tokenization=cast("Tokenization", tokenization),  # checked by `publish`
    )
    if not upload.files:
        raise invalid(
            "files",
            "adapter_config.json and adapter_model.safetensors, or one archive of them, as file "
            "parts called files",
            "nothing",
        )
    found = stage_upload([(file.name, file.path) for file in upload.files], staged)
    base, generator = services.client.base, services.generator
    knows = None if generator is None else generator.tokenizer.has_token
    published = services.registry.publish(
        name,
        staged,
        base,
        metadata,
        warnings=found.warnings(base.vocab_size, knows),
        create_only=create_only,
        base_names=(services.base_id, services.settings.base),
    )
    return published, found.ignored


def _create_only(request: Request) -> bool:
    condition = request.headers.get("if-none-match")
    if condition is None:
        return False
    if condition.strip() != "*":
        raise invalid("if-none-match", "*", quoted(condition))
    return True


def _separator(given: str | None, template: str | None, tokenization: str) -> str:
    """What stands between prompt and target; a template that cannot be used is refused here."""
    if template is not None:
        Template.parse(template).require_column()
    return default_separator(template or "", tokenization) if given is None else given


def _flag(upload: Upload, name: str) -> bool | None:
    value = upload.one(name)
    if value is None:
        return None
    if value not in ("true", "false"):
        raise invalid(name, "true or false", quoted(value))
    return value == "true"


def _labels(upload: Upload, most: int) -> tuple[str, ...] | None:
    values = upload.fields.get("labels")
    if values is None:
        return None
    is_json = len(values) == 1 and values[0].lstrip().startswith("[")
    labels = _json_list(values[0], most) if is_json else values
    texts = [label for label in labels if isinstance(label, str) and label.strip()]
    if len(texts) != len(labels) or len(set(texts)) != len(texts) or not texts:
        raise _labels_invalid(
            most, "a list with an empty, repeated or non-text label, or without any"
        )
    if len(texts) == 1:
        raise _labels_invalid(most, "a list of 1" if is_json else _one_text(texts[0]))
    if len(texts) > most:
        raise _labels_invalid(most, f"a list of {len(texts)}")
    return tuple(texts)


def _one_text(text: str) -> str:
    """What came where one text did: often a list with commas, shown as the list that it may mean."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    came = f"the one text {quoted(text)}"
    meant = json.dumps(parts, ensure_ascii=False)
    if len(parts) < 2 or len(meant) > _MAX_SHOWN_LIST:
        return came
    return f"{came}; if its commas separate labels, send labels={meant}"


def _json_list(text: str, most: int) -> list[Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        raise _labels_invalid(most, "a list that is not JSON") from None
    if not isinstance(parsed, list):
        raise _labels_invalid(most, "a list that is not JSON")
    return parsed


def _labels_invalid(most: int, came: str) -> RequestInvalid:
    expected = f"2 to {most} different texts: {_LABELS}"
    return invalid("labels", expected, came)
