"""The one table from domain errors to HTTP, and the three shapes in which they are written.

    /v1/...        OpenAI's  {"error": {"message", "type", "param", "code"}}
    TGI's routes   TGI's     {"error", "error_type"}
    the rest       ours      {"error", "error_type", "code"}, and field, expected, came, row if known

A test fails when a class of `adapters.errors`, `server.errors` or the engine's client is missing
here. Every refusal gets a reply: unknown routes, methods and unforeseen errors included.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters import errors as library
from adapters.field_errors import explain
from adapters.field_errors import quoted as quoted  # the routes' refusals use it from here
from server import errors as ours
from server.api.content_type import is_json
from server.api.reply_fields import ReplyModel, may_show, shows
from server.engine import errors as engine
from server.http.event_stream import ClientGone
from server.http.scope import RefusalReply

TGI_PATHS = frozenset({"/", "/generate", "/generate_stream", "/info", "/health", "/tokenize"})


@dataclass(frozen=True)
class Refusal:
    """How one kind of error is reported.

    Attributes:
        status: HTTP status.
        code: stable name, for programs.
        error_type: TGI's coarser word; its clients choose an exception class by it.
    """

    status: int
    code: str
    error_type: str = "validation"


UNFORESEEN = Refusal(500, "internal_error", "generation")

TABLE: dict[type[Exception], Refusal] = {
    # the adapter library
    library.Refused: UNFORESEEN,
    library.AdapterError: Refusal(422, "adapter_invalid"),
    library.CheckpointError: Refusal(422, "checkpoint_invalid"),
    library.CheckpointTooLarge: Refusal(413, "checkpoint_too_large"),
    library.UnsupportedFile: Refusal(415, "unsupported_file"),
    library.FileSetInvalid: Refusal(422, "file_set_invalid"),
    library.ArchiveInvalid: Refusal(422, "archive_invalid"),
    library.HeaderInvalid: Refusal(422, "header_invalid"),
    library.ConfigInvalid: Refusal(422, "config_invalid"),
    library.MethodUnsupported: Refusal(422, "method_unsupported"),
    library.TensorMismatch: Refusal(422, "tensor_mismatch"),
    library.TargetNotFound: Refusal(422, "target_not_found"),
    library.NonFinite: Refusal(422, "non_finite"),
    library.BaseMismatch: Refusal(422, "base_mismatch"),
    library.BaseUnsupported: Refusal(503, "base_unsupported", "unavailable"),
    library.TemplateInvalid: Refusal(422, "template_invalid"),
    library.CombineInvalid: Refusal(422, "combine_invalid"),
    library.MergeInvalid: Refusal(422, "merge_invalid"),
    library.TrainingError: Refusal(422, "training_refused"),
    library.JobInvalid: Refusal(422, "job_invalid"),
    library.DataInvalid: Refusal(422, "data_invalid"),
    library.TrainingDiverged: Refusal(422, "training_diverged"),
    library.RegistryError: Refusal(422, "registry_refused"),
    library.NameInvalid: Refusal(422, "name_invalid"),
    library.AdapterNotFound: Refusal(404, "adapter_not_found"),
    library.VersionNotFound: Refusal(404, "version_not_found"),
    library.AdapterExists: Refusal(412, "adapter_exists"),
    library.AdapterCorrupt: Refusal(424, "adapter_corrupt", "generation"),
    library.StorageFull: Refusal(507, "storage_full", "unavailable"),
    library.StorageUnavailable: Refusal(503, "storage_unavailable", "unavailable"),
    # the server itself
    ours.RequestRefused: Refusal(400, "refused"),
    ours.Contradiction: Refusal(400, "contradiction"),
    ours.UnknownParameter: Refusal(400, "unknown_parameter"),
    ours.RequestInvalid: Refusal(422, "invalid"),
    ours.TooLong: Refusal(422, "too_long"),
    ours.BodyTooLarge: Refusal(413, "body_too_large"),
    ours.WrongContentType: Refusal(415, "wrong_content_type"),
    ours.RequestTimeout: Refusal(408, "request_timeout"),
    ours.UrlTooLong: Refusal(414, "url_too_long"),
    ours.HeadersTooLarge: Refusal(431, "headers_too_large"),
    ours.TooManyConnections: Refusal(503, "too_many_connections", "unavailable"),
    ours.NotReady: Refusal(503, "not_ready", "unavailable"),
    ours.JobNotFound: Refusal(404, "job_not_found"),
    ours.UploadNotFound: Refusal(404, "file_not_found"),
    ours.ResponseNotFound: Refusal(404, "response_not_found"),
    ours.NoEmbeddings: Refusal(400, "no_embeddings"),
    ours.FilesFull: Refusal(413, "files_full"),
    ours.JobActive: Refusal(400, "job_active"),
    ours.TooManyJobs: Refusal(429, "too_many_jobs", "overloaded"),
    ours.TooManyAliases: Refusal(422, "too_many_aliases"),
    ours.LoadingDisabled: Refusal(403, "loading_disabled"),
    ours.FolderNotFound: Refusal(404, "folder_not_found"),
    ours.NotLoaded: Refusal(400, "not_loaded"),
    ours.KeyRequired: Refusal(401, "key_required", "authentication"),
    ours.HostRefused: Refusal(403, "host_refused", "authentication"),
    ours.OriginRefused: Refusal(403, "origin_refused", "authentication"),
    ours.ScopeMissing: Refusal(403, "scope_missing", "authentication"),
    ours.RateLimited: Refusal(429, "rate_limited", "overloaded"),
    ours.QuotaExceeded: Refusal(429, "quota_exceeded", "overloaded"),
    ours.KeyInvalid: UNFORESEEN,
    ours.KeyNotFound: UNFORESEEN,
    ours.LeaseLost: UNFORESEEN,
    # the engine
    engine.EngineError: UNFORESEEN,
    engine.EngineStartFailed: Refusal(503, "engine_start_failed", "unavailable"),
    engine.EngineOverloaded: Refusal(429, "overloaded", "overloaded"),
    engine.AdapterOverloaded: Refusal(429, "adapter_overloaded", "overloaded"),
    engine.EngineUnavailable: Refusal(503, "engine_unavailable", "unavailable"),
    engine.RequestFailed: UNFORESEEN,
}

# What a request can fail of inside the engine: `FailedEvent.code`.
FAILED: dict[str, Refusal] = {
    "adapter_corrupt": Refusal(424, "adapter_corrupt", "generation"),
    "adapter_not_loaded": Refusal(424, "adapter_not_loaded", "generation"),
    "too_long": Refusal(422, "too_long"),
    "grammar_invalid": Refusal(422, "grammar_invalid"),
    "non_finite": Refusal(424, "non_finite", "generation"),
    "aborted": Refusal(503, "aborted", "incomplete_generation"),
    "engine_error": Refusal(500, "engine_error", "generation"),
    "engine_unavailable": Refusal(503, "engine_unavailable", "unavailable"),
}

# Refusals that the framework makes before any of our code runs.
HTTP_CODES: dict[int, str] = {
    400: "bad_request",
    404: "route_not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "wrong_content_type",
}

# No client reads it; nginx logs the same number.
CLIENT_GONE = 499

_OPENAI_TYPES = {
    404: "not_found_error",
    429: "rate_limit_error",
    401: "authentication_error",
    403: "permission_error",
}


@dataclass(frozen=True)
class ErrorReport:
    """An error, ready to be written in any of the shapes."""

    refusal: Refusal
    message: str
    field: str | None = None
    expected: str | None = None
    came: str | None = None
    row: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


def describe(error: Exception) -> ErrorReport:
    """Look an error up; one that is in no table is reported as unforeseen, without its message."""
    if isinstance(error, engine.RequestFailed):
        refusal = FAILED.get(error.code, UNFORESEEN)
        return ErrorReport(refusal, error.message, headers=_retry_headers(error))
    if isinstance(error, RequestValidationError):
        return describe_validation(error.errors())
    if isinstance(error, HTTPException):
        return _describe_http(error)
    for kind in type(error).__mro__:
        if kind in TABLE:
            return ErrorReport(
                TABLE[kind],
                str(error),
                field=getattr(error, "field", None),
                expected=getattr(error, "expected", None),
                came=getattr(error, "came", None),
                row=getattr(error, "row", None),
                headers=_retry_headers(error),
            )
    return ErrorReport(
        UNFORESEEN, "an unforeseen error; the server's log has it under this request id"
    )


class OpenAIError(ReplyModel):
    """What is wrong, for people and programs."""

    message: str = shows("there is no adapter 'complaints'", "One sentence.")
    type: str = shows("not_found_error", "OpenAI's coarse category.")
    param: str | None = shows("model", "The field at fault, if one is.")
    code: str = shows("adapter_not_found", "Stable; the documentation lists them.")


class OpenAIErrorBody(ReplyModel):
    """An error under /v1, in OpenAI's shape."""

    error: OpenAIError = shows({}, "The error.")


class TgiErrorBody(ReplyModel):
    """An error of TGI's routes."""

    error: str = shows("there is no adapter 'complaints'", "One sentence.")
    error_type: str = shows("validation", "TGI's coarse category.")


class ErrorBody(TgiErrorBody):
    """An error of our own routes."""

    code: str = shows("adapter_not_found", "Stable; the documentation lists them.")
    field: str | None = may_show("name", "The field, header or parameter at fault.")
    expected: str | None = may_show("an adapter", "What would have been accepted.")
    came: str | None = may_show("complaints", "What was found.")
    row: int | None = may_show(7, "The row of data at fault, counted from 1.")


def body_model(path: str) -> type[OpenAIErrorBody | TgiErrorBody]:
    """The shape that errors of a path have."""
    if path.startswith("/v1/"):
        return OpenAIErrorBody
    return TgiErrorBody if path in TGI_PATHS else ErrorBody


def body_of(report: ErrorReport, path: str) -> dict[str, Any]:
    """The reply's body in the shape that clients of this path expect."""
    refusal, message = report.refusal, _sendable(report.message)
    model = body_model(path)
    if model is OpenAIErrorBody:
        kind = "invalid_request_error" if refusal.status < 500 else "server_error"
        error = OpenAIError(
            message=message,
            type=_OPENAI_TYPES.get(refusal.status, kind),
            param=report.field and _sendable(report.field),
            code=refusal.code,
        )
        return OpenAIErrorBody(error=error).model_dump()
    if model is TgiErrorBody:
        return TgiErrorBody(error=message, error_type=refusal.error_type).model_dump()
    return ErrorBody(
        error=message,
        error_type=refusal.error_type,
        code=refusal.code,
        field=report.field and _sendable(report.field),
        expected=report.expected and _sendable(report.expected),
        came=report.came and _sendable(report.came),
        row=report.row,
    ).model_dump()


def _sendable(text: str) -> str:
    # What a client sent may be quoted, and JSON can smuggle in what UTF-8 cannot say.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def reply_to(error: Exception, path: str) -> JSONResponse:
    """The whole reply to an error."""
    report = describe(error)
    return JSONResponse(body_of(report, path), report.refusal.status, report.headers)


def refusal_reply(error: Exception, path: str) -> RefusalReply:
    """The reply to an error, for a server that refuses before it asks the app."""
    report = describe(error)
    body = json.dumps(body_of(report, path)).encode()
    return RefusalReply(report.refusal.status, report.refusal.code, report.headers, body)


def install(app: FastAPI, explained: Callable[[HTTPException, str], HTTPException]) -> None:
    """Answer every error of the tables, and the framework's own, in our shapes.

    Args:
        app: gets the handlers.
        explained: the framework's refusal of a path, with what was probably meant.
    """

    async def handle(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            if refused := _wrong_content_type(request):
                return reply_to(refused, request.url.path)
            report = describe_validation(error.errors(), _body_model(request))
            return JSONResponse(body_of(report, request.url.path), report.refusal.status)
        if isinstance(error, HTTPException):
            error = explained(error, request.scope["path"])
        return reply_to(error, request.url.path)

    async def no_reply(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ClientGone, no_reply)
    app.add_exception_handler(ClientDisconnect, no_reply)
    for kind in (*TABLE, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def _retry_headers(error: Exception) -> dict[str, str]:
    if isinstance(error, ours.KeyRequired):
        return {"www-authenticate": 'Bearer realm="graftwork"'}
    if isinstance(error, (engine.EngineOverloaded, ours.RateLimited)):
        return {"retry-after": str(retry_after(error.retry_after_seconds))}
    if isinstance(error, ours.RequestTimeout):
        return {"connection": "close"}
    if isinstance(error, ours.TooManyConnections):
        return {"retry-after": "5", "connection": "close"}
    if isinstance(error, ours.TooManyJobs):
        return {"retry-after": "30"}
    if isinstance(error, engine.RequestFailed):
        # The engine is started again, or another server takes over.
        passes = FAILED.get(error.code, UNFORESEEN).status == 503
        return {"retry-after": "5"} if passes else {}
    if isinstance(error, (ours.NotReady, engine.EngineUnavailable, library.StorageUnavailable)):
        return {"retry-after": "5"}
    return {}


def retry_after(seconds: float) -> int:
    """Whole seconds for the header, at least one."""
    return max(1, math.ceil(seconds))


def _describe_http(error: HTTPException) -> ErrorReport:
    # The framework wraps what a middleware raised while the body was being read.
    if isinstance(error.__cause__, ours.RequestRefused):
        return describe(error.__cause__)
    if why := _unreadable(error.__cause__):
        expected = "JSON in UTF-8"
        return ErrorReport(
            Refusal(422, "invalid"), f"body: expected {expected}; {why}", "body", expected, why
        )
    code = HTTP_CODES.get(error.status_code, "http_error")
    return ErrorReport(
        Refusal(error.status_code, code), str(error.detail), headers=dict(error.headers or {})
    )


def _unreadable(error: BaseException | None) -> str | None:
    """Why Python's reader of JSON gave up, where it has no error of its own for that."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.start})"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    # The one other thing that it refuses: int() takes quadratic time.
    return "a number in it has too many digits" if isinstance(error, ValueError) else None


def describe_validation(errors: Sequence[Any], model: Any = None) -> ErrorReport:
    """All of pydantic's findings in our words; `model` is what was validated, for suggestions."""
    found = explain(errors, model)
    return ErrorReport(
        Refusal(422, "invalid"), found.message, found.field, found.expected, found.came
    )


def refuse_invalid(error: ValidationError, model: Any = None) -> ours.RequestInvalid:
    """The refusal of a part of a body that is validated by itself."""
    found = explain(error.errors(include_url=False), model)
    return ours.RequestInvalid(
        found.message, field=found.field, expected=found.expected, came=found.came
    )


def _body_model(request: Request) -> Any:
    """The model of a route's JSON body, if it has one."""
    dependant = getattr(request.scope.get("route"), "dependant", None)
    parameters = getattr(dependant, "body_params", None)
    return parameters[0].field_info.annotation if parameters else None


def invalid(field: str, expected: str, came: object) -> ours.RequestInvalid:
    """The refusal of one value of a request."""
    return ours.RequestInvalid(
        f"{field}: expected {expected}, came {came}", field=field, expected=expected, came=str(came)
    )


def both_given(first: str, second: str) -> ours.Contradiction:
    """The refusal of two fields of which one may be given."""
    return ours.Contradiction(
        f"{first} and {second} are both given; send one of them",
        field=second,
        expected=f"{first} or {second}",
        came="both",
    )


def _wrong_content_type(request: Request) -> ours.WrongContentType | None:
    came = request.headers.get("content-type", "")
    if request.method not in ("POST", "PUT") or is_json(came):
        return None
    length = request.headers.get("content-length", "")
    if length in ("", "0") and "transfer-encoding" not in request.headers:
        return None
    return ours.WrongContentType(
        f"the body's content-type is {came or 'not given'!r}; send application/json",
        field="content-type",
        expected="application/json",
        came=quoted(came),
    )
