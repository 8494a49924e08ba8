"""Errors as documented responses: statuses, codes and bodies from the one table of errors.

A route's decorator lists what the route refuses: classes of errors, or codes that the engine gives to
a request that it could not finish. Kinds that come together have a name here. Knows no route.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from adapters import errors as library
from server import errors as ours
from server.api.error_replies import (
    FAILED,
    TABLE,
    UNFORESEEN,
    ErrorReport,
    Refusal,
    body_model,
    body_of,
)
from server.api.middleware.route_scopes import ANY_KEY, PUBLIC, Rule
from server.api.openapi.responses import REFERENCE, headers
from server.engine import errors as engine

Kind = type[Exception] | str
Kinds = tuple[Kind, ...]

_BY_NAME = {kind.__name__: kind for kind in TABLE}
# Where an operation carries its kinds until the page is completed.
EXTENSION = "x-refuses"
# What the engine's codes mean, and the code of an error that is in no table. The documentation takes
# them from here.
MEANINGS = {
    "adapter_corrupt": "The stored bytes no longer match their digest.",
    "adapter_not_loaded": "The adapter could not be brought to the device.",
    "too_long": "More tokens than the base or the engine can hold.",
    "grammar_invalid": "The schema, regular expression or choice cannot guide an output.",
    "non_finite": "The logits of this request are no finite numbers.",
    "aborted": "The engine ended the request early.",
    "engine_error": "The engine failed.",
    "engine_unavailable": "The engine's process is not running, or ended with the request.",
    "internal_error": "An unexpected error; the server's log has it under the request id.",
}

# What a route refuses that checks its query, has query parameters or a body, or such a name in its path.
_QUERY = ("UnknownParameter", "Contradiction")
_VALUE = ("RequestInvalid",)
_BODY = (*_VALUE, "RequestTimeout", "BodyTooLarge", "WrongContentType")
_IN_PATH = {"job_id": "JobNotFound", "file_id": "UploadNotFound"}

NAMED: Kinds = (
    library.AdapterNotFound,
    library.VersionNotFound,
    library.StorageUnavailable,
)
STORED: Kinds = (library.StorageFull, library.StorageUnavailable)
SERVED: Kinds = (*NAMED, library.AdapterCorrupt, ours.NotReady)
GENERATED: Kinds = (
    *SERVED,
    library.BaseMismatch,
    library.TemplateInvalid,
    ours.TooLong,
    ours.QuotaExceeded,
    engine.EngineOverloaded,
    engine.AdapterOverloaded,
    engine.EngineUnavailable,
    *FAILED,
)
CHECKPOINT: Kinds = (
    library.ConfigInvalid,
    library.MethodUnsupported,
    library.TensorMismatch,
    library.TargetNotFound,
    library.NonFinite,
    library.HeaderInvalid,
    library.FileSetInvalid,
    library.CheckpointTooLarge,
    library.BaseMismatch,
    library.NameInvalid,
    library.AdapterExists,
    *STORED,
)
PLANNED: Kinds = (
    library.JobInvalid,
    library.DataInvalid,
    library.TemplateInvalid,
    library.ConfigInvalid,
    library.NameInvalid,
    library.AdapterExists,
    ours.TooManyJobs,
    ours.NotReady,
    *STORED,
)


def refuses(*kinds: Kind) -> dict[str, Any]:
    """What a route refuses, for `openapi_extra` of its decorator.

    Args:
        kinds: besides those that `common` finds.
    """
    return {EXTENSION: [kind if isinstance(kind, str) else kind.__name__ for kind in kinds]}


def common(operation: dict[str, Any], rule: Rule | None) -> list[str]:
    """What an operation refuses on account of its keys, its parameters and its body.

    Args:
        operation: on FastAPI's page.
        rule: which keys may use it.
    """
    parameters = operation.get("parameters", [])
    kinds: list[str] = ["HostRefused"]
    if rule != PUBLIC:
        kinds += ["KeyRequired", "RateLimited", *_QUERY]
    if rule not in (None, PUBLIC, ANY_KEY):
        kinds.append("ScopeMissing")
    if any(one["in"] == "query" for one in parameters):
        kinds += _VALUE
    if "requestBody" in operation:
        kinds += _BODY
    kinds += [_IN_PATH[one["name"]] for one in parameters if one["name"] in _IN_PATH]
    return [*kinds, "internal_error"]


def responses(path: str, kinds: Iterable[str]) -> dict[str, Any]:
    """Documented responses by status, each with every code and an example body.

    Args:
        path: of the route; errors have the shape of their path.
        kinds: names of classes of errors, or the engine's codes.
    """
    by_status: dict[int, dict[str, tuple[Refusal, str]]] = {}
    for kind in kinds:
        refusal, sentence = _described(kind)
        by_status.setdefault(refusal.status, {}).setdefault(refusal.code, (refusal, sentence))
    schema = {"$ref": REFERENCE.format(model=body_model(path).__name__)}
    return {
        str(status): {
            "description": " ".join(f"`{code}`: {said}" for code, (_, said) in codes.items()),
            "content": {
                "application/json": {
                    "schema": schema,
                    "examples": {
                        code: {"value": body_of(ErrorReport(refusal, said), path)}
                        for code, (refusal, said) in codes.items()
                    },
                }
            },
            **_retry_header(status),
        }
        for status, codes in sorted(by_status.items())
    }


def _described(kind: str) -> tuple[Refusal, str]:
    if kind in MEANINGS:
        return FAILED.get(kind, UNFORESEEN), MEANINGS[kind]
    error = _BY_NAME[kind]
    return TABLE[error], (error.__doc__ or "").partition("\n")[0]


def _retry_header(status: int) -> dict[str, Any]:
    if status not in (429, 503):
        return {}
    return {"headers": headers({"Retry-After": "Seconds to wait, where that is known."}, "integer")}
