"""The body of `POST /train`: JSON with its rows, or a form with a job and a file of rows.

Parses the body within limits. `adapters.training.job` defines the fields of a job; what rows may be is the
business of `server.api.training.training_data`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
from pydantic import ConfigDict, Field, ValidationError
from starlette.requests import Request

from adapters.strict_json import StrictJsonError, parse_object
from adapters.training.job import JobRequest
from adapters.training.json_rows import DEPTH
from server.api.content_type import is_json, media_type
from server.api.error_replies import quoted, refuse_invalid
from server.api.middleware.headers import body_too_large
from server.api.middleware.value_count import ValueCount
from server.api.openapi.constraints import (
    CLOSED,
    NAME,
    SOME_LIST,
    Schema,
    constrained,
    not_both,
    only_with,
)
from server.api.training.training_data import TrainingData, Wish, read_file, read_inline
from server.api.upload import Form, Upload, UploadedFile, receive_upload
from server.config.settings import MIB, Settings
from server.errors import Contradiction, RequestInvalid, WrongContentType
from server.text.tokenizer import TextTokenizer

# Columns that nothing names may hold anything, as in a file.
_DEPTH = DEPTH
# Bytes that are counted at a time: others may run in between.
_SLICE = 1 << 16
_CURL = "-F job=@job.json -F data=@rows.jsonl"
_FLAT = """-F 'job={"adapter": "mine", "method": "ia3"}' -F data=@rows.jsonl"""


_ROW: Schema = {
    "type": "object",
    "minProperties": 1,
}
_EXAMPLE = {
    "adapter": "mine",
    "method": "ia3",
    "template": "Tweet text : {text} Label :",
    "target": "label",
    "rows": [
        {"text": "Late again.", "label": "complaint"},
        {"text": "Lovely!", "label": "no complaint"},
    ],
    "hyperparameters": {"epochs": 1},
}


class TrainBody(JobRequest):
    """A job and its rows, as JSON."""

    model_config = ConfigDict(
        json_schema_extra=constrained(
            required=["adapter", "method", "rows"],
            properties={
                "adapter": NAME,
                "rows": {"anyOf": [{**SOME_LIST, "items": _ROW}]},
                "label_names": {"minProperties": 1},
                "hyperparameters": {"anyOf": not_both("epochs", "max_steps")},
            },
            allOf=[
                only_with(
                    {"method": {"const": "cpt"}},
                    "context_examples",
                    "context_seed",
                    "train_on_context",
                ),
                only_with(
                    {"method": {"enum": ["prefix_tuning", "p_tuning_v2", "prompt_tuning"]}},
                    "init_text",
                ),
            ],
            example=_EXAMPLE,
        )
    )

    rows: list[dict[str, Any]] | None = Field(
        None,
        description="The data: objects of columns, or conversations. Columns that nothing names are not "
        "read. Left out where a file part has it.",
    )


@dataclass(frozen=True)
class Received:
    """A body that parsed.

    Attributes:
        request: the job.
        read: reads and checks its rows, with the base's tokenizer; slow, to be called off the event
            loop.
    """

    request: JobRequest
    read: Callable[[TextTokenizer], TrainingData]


async def receive_job(request: Request, directory: Path, settings: Settings) -> Received:
    """Read the body of a training request.

    Args:
        request: its body is unread.
        directory: an empty folder for a file of rows.
        settings: limits.

    Raises:
        WrongContentType: neither JSON nor a form.
        BodyTooLarge: more bytes than the limit, checked while they arrive.
        RequestInvalid: a field is unknown, missing or invalid.
        Contradiction: rows both in the body and in a file.
    """
    content_type = request.headers.get("content-type", "")
    if media_type(content_type) == "multipart/form-data":
        return await _receive_form(request, directory, settings)
    if not is_json(content_type):
        raise WrongContentType(
            f"the body's content-type is {content_type or 'not given'!r}; send application/json "
            f"with rows, or a form (curl: {_CURL})",
            field="content-type",
            expected="application/json or multipart/form-data",
            came=quoted(content_type),
        )
    raw = await _parse(await _read_body(request, settings), "body", settings)
    rows = raw.pop("rows", None)
    return _with_rows(_validated(raw), rows, settings)


async def _receive_form(request: Request, directory: Path, settings: Settings) -> Received:
    max_job, max_data = settings.max_body_mib * MIB, settings.max_data_mib * MIB
    form = Form({"job": max_job}, "data", max_job + max_data, settings.max_parts, _CURL)
    try:
        upload = await receive_upload(request, directory, form)
    except RequestInvalid as error:
        if error.field not in [quoted(name) for name in TrainBody.model_fields]:
            raise
        raise RequestInvalid(
            f"{error.message}; the fields of a job go as one JSON object in the form field job: {_FLAT}",
            field=error.field,
            expected="a field of the JSON object job",
            came=error.came,
        ) from error
    job = upload.one("job")
    if job is None:
        raise RequestInvalid(
            "job: expected a form field with the job as JSON, came none",
            field="job",
            expected="a form field",
            came="nothing",
        )
    raw = await _parse(job.encode(), "job", settings)
    rows = raw.pop("rows", None)
    file = _one_file(upload)
    if file is None:
        return _with_rows(_validated(raw), rows, settings)
    if rows is not None:
        raise Contradiction(
            "rows are in the job and in the file part data; send one of them",
            field="rows",
            expected="rows or a file",
            came="both",
        )
    job_request, path, limits = _validated(raw), file.path, settings.data_limits()
    wish = Wish.of(job_request)
    return Received(job_request, lambda tokenizer: read_file(path, wish, tokenizer, limits))


async def _read_body(request: Request, settings: Settings) -> bytes:
    max_bytes = settings.max_body_mib * MIB
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise body_too_large(max_bytes)
    return bytes(body)


async def _parse(data: bytes, field: str, settings: Settings) -> dict[str, Any]:
    return await anyio.to_thread.run_sync(_parsed, data, field, settings.max_json_values)


def _parsed(data: bytes, field: str, max_values: int) -> dict[str, Any]:
    values = ValueCount(max_values)
    for start in range(0, len(data), _SLICE):
        values.feed(data[start : start + _SLICE])
    try:
        return parse_object(data, _DEPTH)
    except StrictJsonError as error:
        raise RequestInvalid(
            f"{field}: expected a JSON object; {error}",
            field=field,
            expected="a JSON object",
            came=str(error),
        ) from error


def _validated(raw: dict[str, Any]) -> JobRequest:
    if "dry_run" in raw:
        raise RequestInvalid(
            "dry_run: expected as a query parameter, POST /train?dry_run=true; came a field of the body",
            field="dry_run",
            expected="?dry_run=true",
            came="a field of the body",
        )
    try:
        return JobRequest.model_validate(raw)
    except ValidationError as error:
        raise refuse_invalid(error, TrainBody) from error  # `rows` may have been meant too


def _with_rows(request: JobRequest, rows: Any, settings: Settings) -> Received:
    if rows is None:
        raise RequestInvalid(
            "rows: expected a list of rows, or a file part data in a form; came neither",
            field="rows",
            expected="a list of rows, or a file part data",
            came="nothing",
        )
    if not isinstance(rows, list):
        raise RequestInvalid(
            f"rows: expected a list of objects; came: {quoted(rows)}",
            field="rows",
            expected="a list of objects",
            came=quoted(rows),
        )
    wish, limits = Wish.of(request), settings.data_limits()
    return Received(request, lambda tokenizer: read_inline(rows, wish, tokenizer, limits))


def _one_file(upload: Upload) -> UploadedFile | None:
    if len(upload.files) > 1:
        raise RequestInvalid(
            f"data: expected one file part, came {len(upload.files)}",
            field="data",
            expected="one file part",
            came=str(len(upload.files)),
        )
    return upload.files[0] if upload.files else None


# --- for /docs --------------------------------------------------------------------------------


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references: an operation's own schema has no place for definitions."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    definition: dict[str, Any] = {}
    if "$ref" in schema:
        definition = _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    own = {key: part for key, part in schema.items() if key not in ("$defs", "$ref")}
    return definition | {key: _inlined(part, definitions) for key, part in own.items()}


def _schema(model: type[JobRequest]) -> dict[str, Any]:
    schema = model.model_json_schema()
    inlined: dict[str, Any] = _inlined(schema, schema.get("$defs", {}))
    return inlined


OPENAPI_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _schema(TrainBody)},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["job", "data"],
                    **CLOSED,
                    "properties": {
                        "job": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "description": "The same JSON, without rows.",
                        },
                        "data": {
                            "type": "string",
                            "format": "binary",
                            "description": "A file of rows: JSON lines, a JSON array or CSV.",
                        },
                    },
                },
                "encoding": {"job": {"contentType": "application/json"}},
                "example": {
                    "job": '{"adapter": "mine", "method": "ia3", "template": "{text}", '
                    '"target": "label"}',
                    "data": '{"text": "late", "label": "complaint"}\n'
                    '{"text": "fine", "label": "no complaint"}\n',
                },
            },
        },
    }
}
