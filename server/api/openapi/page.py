"""FastAPI's OpenAPI page, completed from the table of routes.

FastAPI writes what routes take. What they answer, the errors with their codes, the headers and the
examples are put in here, once, when the page is first asked for.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server import errors as ours
from server.api.middleware.authentication import asks_for_keys
from server.api.middleware.route_scopes import ANY_KEY, PUBLIC, rule_of
from server.api.openapi import links
from server.api.openapi.bodies import BODIES, PARAMETERS, UNNAMED, merge
from server.api.openapi.refusals import ERROR_BODIES, Kind, responses
from server.api.openapi.routes import EVENTS, JSON, ROUTES, Answer, Doc
from server.api.training.openai.body import MethodBlock

_REFERENCE = "#/components/schemas/{model}"
# Parts of bodies that stand under a name of the client's choice, where FastAPI does not see them.
_PARTS: tuple[type[BaseModel], ...] = (MethodBlock,)
# FastAPI's own shape of a refusal, which no route answers with.
_NOT_OURS = ("HTTPValidationError", "ValidationError")
# What names in paths and pages of lists mean, where a route does not say more.
_PARAMETERS = {
    "name": "An adapter's name.",
    "alias": "Another name for one version of it.",
    "job_id": "A training job's id.",
    "file_id": "An uploaded file's id.",
    "offset": "How many to pass over.",
    "limit": "How many at most.",
}
# Two ways to send one key; a server that asks for none takes requests without.
_KEYS: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same.",
    },
}
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"x-api-key": []}]
_TEXT: dict[str, Any] = {"type": "string"}
_HEADERS = {
    "x-request-id": "The request's own, or a new one.",
    "x-adapter-id": "The adapter that it was about; the base's name; - for neither.",
    "x-adapter-version": "Its version; of the base, its digest.",
}
_TIMING_HEADERS = {
    "x-queue-time": "Milliseconds until the engine began.",
    "x-time-to-first-token": "Milliseconds until the first token.",
    "x-ignored-parameters": "Fields of the body that had no effect, where there are any.",
}


class DocumentedApp(FastAPI):
    """An app whose OpenAPI page says all there is to know of its routes."""

    def openapi(self) -> dict[str, Any]:
        """The page; made once."""
        if self.openapi_schema is None:
            complete(super().openapi(), keys_required=asks_for_keys(self))
        return super().openapi()


def complete(page: dict[str, Any], *, keys_required: bool = False) -> None:
    """Put the table's entries into a page. Routes that have none are left as they are.

    Args:
        page: FastAPI's.
        keys_required: whether the server asks for keys; else they are optional.
    """
    security = _SECURITY if keys_required else [{}, *_SECURITY]
    page["components"]["securitySchemes"] = _KEYS
    schemas = page["components"]["schemas"]
    for name in _NOT_OURS:
        schemas.pop(name, None)
    schemas |= _schemas()
    for name, more in BODIES.items():
        merge(schemas[name], more)
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            doc = ROUTES.get((method.upper(), path))
            if doc is not None:
                _complete_operation(method.upper(), path, operation, doc, schemas)
                _say_who(method.upper(), path, operation, doc, security)
    links.put_in(page["paths"])


def models() -> list[type[BaseModel]]:
    """Every model of a reply that the table names."""
    answers = [answer for doc in ROUTES.values() for answer in doc.answers.values()]
    named = [model for answer in answers for model in (answer.model, answer.frame)]
    return list(dict.fromkeys(model for model in (*named, *ERROR_BODIES) if model is not None))


def _schemas() -> dict[str, Any]:
    """Schemas of the replies by name, those of their parts included."""
    _, found = models_json_schema(
        [(model, "validation") for model in (*models(), *_PARTS)], ref_template=_REFERENCE
    )
    schemas: dict[str, Any] = found["$defs"]
    return schemas


def _complete_operation(
    method: str, path: str, operation: dict[str, Any], doc: Doc, schemas: dict[str, Any]
) -> None:
    for parameter in operation.get("parameters", []):
        name = parameter["name"]
        said = doc.parameters.get(name) or parameter.get("description") or _PARAMETERS.get(name)
        if said is not None:
            parameter["description"] = said
        merge(parameter["schema"], PARAMETERS.get((method, path, name), {}))
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        merge(body["schema"], UNNAMED.get((method, path, kind), {}))
    if doc.example is not None:
        operation["requestBody"]["content"][JSON]["example"] = doc.example
    answers = {
        str(status): _response(answer, doc, schemas) for status, answer in doc.answers.items()
    }
    operation["responses"] = answers


def _say_who(
    method: str,
    path: str,
    operation: dict[str, Any],
    doc: Doc,
    security: list[dict[str, list[str]]],
) -> None:
    """Which keys a route takes, and everything that it refuses."""
    rule = rule_of(method, path)
    at_the_door: tuple[Kind, ...] = ()
    if rule != PUBLIC:
        at_the_door = (ours.KeyRequired, ours.RateLimited)
        operation["security"] = security
    if rule not in (None, PUBLIC, ANY_KEY):
        scopes = " or ".join(f"`{scope}`" for scope in sorted(rule))
        operation["description"] += f"\n\nWhere keys are asked for: one with the scope {scopes}."
        at_the_door += (ours.ScopeMissing,)
    kinds = (*at_the_door, *doc.refused, "internal_error")
    operation["responses"] |= responses(path, kinds)


def _response(answer: Answer, doc: Doc, schemas: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if answer.model is not None:
        reference = {"$ref": _REFERENCE.format(model=answer.model.__name__)}
        content[JSON] = {"schema": reference, "example": example_of(reference, schemas)}
    if answer.frame is not None:
        reference = {"$ref": _REFERENCE.format(model=answer.frame.__name__)}
        content[EVENTS] = {"schema": _event(reference), "example": answer.example}
    if answer.media is not None:
        kind = _TEXT if answer.media == "text/plain" else {**_TEXT, "format": "binary"}
        content[answer.media] = {"schema": kind}
        if answer.example is not None:
            content[answer.media]["example"] = answer.example
    headers = {**_HEADERS, **(_TIMING_HEADERS if doc.timed else {})}
    response: dict[str, Any] = {
        "description": answer.description,
        "headers": {name: {"description": said, "schema": _TEXT} for name, said in headers.items()},
    }
    return {**response, "content": content} if content else response


def _event(data: dict[str, Any]) -> dict[str, Any]:
    """One event of a stream. OpenAPI 3.1 has no word for events; this is how 3.2 describes one."""
    read = {"contentMediaType": JSON, "contentSchema": data}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {
                **_TEXT,
                "description": "JSON; of OpenAI's routes the last one is [DONE].",
                "anyOf": [{"const": "[DONE]"}, read],
            },
            "event": {**_TEXT, "description": "What happened, where the events have names."},
            "id": {**_TEXT, "description": "Of the event, where a client may go on from it."},
        },
    }


def example_of(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """An example put together of those of a schema's fields; what may be absent is."""
    given = schema.get("examples", [{}])[0]
    if given not in ({}, []):
        return given
    if "$ref" in schema:
        return example_of(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "anyOf" in schema:
        return example_of(schema["anyOf"][0], schemas)
    if schema.get("type") == "array":
        items = schema.get("items", {})
        return [example_of(items, schemas)] if "$ref" in items or "anyOf" in items else given or []
    required = schema.get("required", [])
    properties = schema.get("properties", {})
    return {name: example_of(properties[name], schemas) for name in required}
