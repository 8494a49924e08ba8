"""`/v1/files`: upload, list, look at, read and delete the files that jobs train on.

Bytes go to the disk while they arrive and are kept as they came; whether they can be trained on is
seen when a job names them. Thin: the store decides, off the event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from server.api.adapter_choice import only_query
from server.api.error_replies import invalid, quoted
from server.api.middleware.headers import body_too_large
from server.api.openapi.constraints import CLOSED
from server.api.openapi.refusals import STORED, refuses
from server.api.openapi.responses import plain
from server.api.reply_fields import ReplyModel, UnixTime, fixed, shows
from server.api.training.openai.replies import Page
from server.api.upload import Form, Upload, UploadedFile, receive_upload, small_fields
from server.config.settings import MIB
from server.errors import FilesFull, UploadNotFound
from server.services import Services, UseServices

router = APIRouter(prefix="/v1/files", tags=["fine-tuning"])


PURPOSE = "fine-tune"
MAX_PAGE = 10_000
_EXPIRY = ("expires_after[anchor]", "expires_after[seconds]")
_CURL = "-F purpose=fine-tune -F file=@rows.jsonl"
# The form around the file: its fields, headers and boundaries.
_FORM_BYTES = MIB
_CHUNK = 1 << 18
_ID = "file-0123456789abcdef01234567"
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    **CLOSED,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "Rows: JSON lines, a JSON array or CSV.",
                        },
                        "purpose": {
                            "type": "string",
                            "enum": [PURPOSE],
                            "description": "What the file is for.",
                        },
                    },
                },
                "example": {"purpose": PURPOSE, "file": "rows.jsonl"},
            }
        },
    }
}


class FileObject(ReplyModel):
    """OpenAI's `file`."""

    id: str = shows(_ID, "The file.")
    object: Literal["file"] = fixed("file", "What this is.")
    num_bytes: int = Field(
        serialization_alias="bytes", description="How long it is.", examples=[10240]
    )
    created_at: UnixTime = shows(1795376932, "Unix time, seconds.")
    expires_at: None = fixed(None, "Always null: files are kept until they are deleted.")
    filename: str = shows("rows.jsonl", "As the client called it.")
    purpose: str = shows("fine-tune", "What it is for.")
    status: str = fixed("processed", "Always processed; a job checks the lines.")
    status_details: None = fixed(None, "Always null.")


class FileList(Page[FileObject]):
    """A page of files."""


class FileDeleted(ReplyModel):
    """A file that is gone."""

    id: str = shows(_ID, "The file.")
    object: Literal["file"] = fixed("file", "What this was.")
    deleted: bool = fixed(True, "Always true.")


@router.post(
    "",
    summary="Upload a file to train on",
    response_description="The file is stored.",
    openapi_extra=_FORM | refuses(FilesFull, *STORED),
)
async def create_file(request: Request, services: UseServices) -> FileObject:
    """Keeps the bytes as they are; lines are checked when a job names the file."""
    only_query(request)
    files = services.need_files()
    with services.registry.staging_dir() as received:
        settings = services.settings
        max_bytes = settings.max_data_mib * MIB + _FORM_BYTES
        form = Form(
            small_fields(("purpose", *_EXPIRY), settings),
            "file",
            max_bytes,
            settings.max_parts,
            _CURL,
        )
        upload = await receive_upload(request, received, form)
        purpose, file = _purpose(upload), _one_file(upload)
        _check_size(file.path, services)
        record = await run_sync(lambda: files.add(file.path, file.name or "upload", purpose))
    return FileObject.model_validate(record)


@router.get("", summary="Uploaded files", openapi_extra=refuses(UploadNotFound))
async def list_files(
    request: Request,
    services: UseServices,
    after: Annotated[
        str | None, Query(description="Only files behind the one with this id.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="How many at most.")] = MAX_PAGE,
    purpose: Annotated[
        str | None, Query(description="Only files that were uploaded for this.")
    ] = None,
    order: Annotated[
        Literal["asc", "desc"], Query(description="desc: the newest first; asc: the oldest.")
    ] = "desc",
) -> FileList:
    """A page; `has_more` says whether there is another; `after` with `last_id` requests it."""
    only_query(request, "after", "limit", "purpose", "order")
    files = services.need_files()
    newest_first = order == "desc"
    found = await run_sync(
        lambda: files.list(after, limit + 1, purpose=purpose, newest_first=newest_first)
    )
    return FileList.of([FileObject.model_validate(record) for record in found], limit)


@router.get("/{file_id}", summary="One uploaded file")
async def get_file(request: Request, services: UseServices, file_id: str) -> FileObject:
    """Its name, size and purpose, without its bytes."""
    only_query(request)
    files = services.need_files()
    return FileObject.model_validate(await run_sync(lambda: files.get(file_id)))


@router.get(
    "/{file_id}/content",
    summary="The bytes of an uploaded file",
    response_class=StreamingResponse,
    responses={200: plain("application/octet-stream", "The bytes as they came.")},
)
async def get_content(request: Request, services: UseServices, file_id: str) -> StreamingResponse:
    """As they came, whatever they are."""
    only_query(request)
    files = services.need_files()
    record = await run_sync(lambda: files.get(file_id))
    chunks = await run_sync(lambda: _opened(files.path(file_id)))
    headers = {
        "content-length": str(record.num_bytes),
        "content-disposition": "attachment",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)


@router.delete(
    "/{file_id}",
    summary="Delete an uploaded file",
    openapi_extra=refuses(*STORED),
)
async def delete_file(request: Request, services: UseServices, file_id: str) -> FileDeleted:
    """Jobs that were made of it go on: each has its own rows."""
    only_query(request)
    files = services.need_files()
    await run_sync(lambda: files.delete(file_id))
    return FileDeleted(id=file_id)


# --- the form ----------------------------------------------------------------------------------


def _purpose(upload: Upload) -> str:
    for name in _EXPIRY:
        if upload.one(name) is not None:
            raise invalid(
                "expires_after",
                "the field left out: files are kept until they are deleted",
                quoted(upload.one(name)),
            )
    purpose = upload.one("purpose")
    if purpose != PURPOSE:
        came = "nothing" if purpose is None else quoted(purpose)
        raise invalid("purpose", f"{PURPOSE!r}, the only purpose of files here", came)
    return purpose


def _one_file(upload: Upload) -> UploadedFile:
    if len(upload.files) != 1:
        raise invalid("file", f"one file part (curl: {_CURL})", len(upload.files))
    return upload.files[0]


def _check_size(path: Path, services: Services) -> None:
    num_bytes, most = path.stat().st_size, services.settings.max_data_mib * MIB
    if num_bytes == 0:
        raise invalid("file", "at least one line", "0 bytes")
    if num_bytes > most:
        raise body_too_large(most)


def _opened(path: Path) -> Iterator[bytes]:
    """The bytes of a file that is open already, so that deleting it takes nothing away."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UploadNotFound("the file was deleted a moment ago", field="file_id") from None

    def chunks() -> Iterator[bytes]:
        with file:
            while chunk := file.read(_CHUNK):
                yield chunk

    return chunks()
