"""Errors as documented responses: the statuses, codes and bodies that the one table of errors gives.

Knows no route: a route lists kinds of errors, by their class, or by the code that the engine gives a
request that it could not finish.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from server.api.error_replies import (
    FAILED,
    TABLE,
    TGI_PATHS,
    UNFORESEEN,
    ErrorReport,
    Refusal,
    body_of,
)
from server.api.openapi.fields import Reply, may_show, shows

Kind = type[Exception] | str

# What the engine's codes mean, and the code of what nobody foresaw.
_SENTENCES = {
    "adapter_corrupt": "The stored bytes no longer match their digest.",
    "adapter_not_loaded": "The adapter could not be brought to the device.",
    "too_long": "More tokens than the base or the engine can hold.",
    "grammar_invalid": "The schema, regular expression or choice cannot guide an output.",
    "non_finite": "The logits of this request are no finite numbers.",
    "aborted": "The engine ended the request early.",
    "engine_error": "The engine failed.",
    "internal_error": "Nobody foresaw it; the server's log has it under the request id.",
}


class OpenAIError(Reply):
    """What is wrong, for people and programs."""

    message: str = shows("there is no adapter 'complaints'", "One sentence.")
    type: str = shows("not_found_error", "OpenAI's coarse word.")
    param: str | None = shows("model", "The field at fault, if one is.")
    code: str = shows("adapter_not_found", "Stable; the README lists them.")


class OpenAIErrorBody(Reply):
    """An error under /v1, in OpenAI's shape."""

    error: OpenAIError = shows({}, "The error.")


class TgiErrorBody(Reply):
    """An error of TGI's routes."""

    error: str = shows("there is no adapter 'complaints'", "One sentence.")
    error_type: str = shows("validation", "TGI's coarse word.")


class ErrorBody(TgiErrorBody):
    """An error of our own routes."""

    code: str = shows("adapter_not_found", "Stable; the README lists them.")
    field: str | None = may_show("name", "The field, header or parameter at fault.")
    expected: str | None = may_show("an adapter", "What would have been taken.")
    came: str | None = may_show("complaints", "What was found.")
    row: int | None = may_show(7, "The row of data at fault, counted from 1.")


ERROR_BODIES: tuple[type[Reply], ...] = (OpenAIErrorBody, TgiErrorBody, ErrorBody)


def body_model(path: str) -> type[Reply]:
    """The shape that errors of a path have."""
    if path.startswith("/v1/"):
        return OpenAIErrorBody
    return TgiErrorBody if path in TGI_PATHS else ErrorBody


def responses(path: str, kinds: Iterable[Kind]) -> dict[str, Any]:
    """Documented responses by status, each with every code and an example body.

    Args:
        path: where the route is.
        kinds: what it refuses.
    """
    by_status: dict[int, dict[str, tuple[Refusal, str]]] = {}
    for kind in kinds:
        refusal, sentence = _looked_up(kind)
        by_status.setdefault(refusal.status, {}).setdefault(refusal.code, (refusal, sentence))
    schema = {"$ref": f"#/components/schemas/{body_model(path).__name__}"}
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


def _looked_up(kind: Kind) -> tuple[Refusal, str]:
    if isinstance(kind, str):
        return FAILED.get(kind, UNFORESEEN), _SENTENCES[kind]
    return TABLE[kind], (kind.__doc__ or "").partition("\n")[0]


def _retry_header(status: int) -> dict[str, Any]:
    if status not in (429, 503):
        return {}
    told = {"description": "Seconds to wait, where that is known.", "schema": {"type": "integer"}}
    return {"headers": {"Retry-After": told}}
