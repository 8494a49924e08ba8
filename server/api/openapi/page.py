"""FastAPI's OpenAPI page, completed with what all routes have in common.

FastAPI makes the page from the routes: their bodies, their replies, what their decorators say. Added
here: errors with their codes, scopes of keys, common headers, examples of replies and links. The page
is made once, on the first request for it. Knows no route's code.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from server.api.error_replies import ErrorBody, OpenAIErrorBody, TgiErrorBody
from server.api.middleware.authentication import asks_for_keys
from server.api.middleware.route_scopes import ANY_KEY, PUBLIC, rule_of
from server.api.openapi import links
from server.api.openapi.refusals import EXTENSION, common, responses
from server.api.openapi.responses import EVENTS, REFERENCE, event_schema, headers
from server.api.training.openai.body import MethodBlock

# Errors, and a part of bodies that stands under a name of the client's choice.
_MODELS: list[tuple[type[BaseModel], JsonSchemaMode]] = [
    (OpenAIErrorBody, "serialization"),
    (TgiErrorBody, "serialization"),
    (ErrorBody, "serialization"),
    (MethodBlock, "validation"),
]
# FastAPI's own shape of a refusal, which no route answers with.
_NOT_OURS = ("HTTPValidationError", "ValidationError")
# What parameters of many routes mean, where a route does not say more.
_PARAMETERS = {
    "name": "An adapter's name.",
    "alias": "Another name for one version of it.",
    "job_id": "A training job's id.",
    "file_id": "An uploaded file's id.",
    "offset": "How many to skip.",
    "limit": "How many at most.",
}
# Two ways to send one key.
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
_HEADERS = {
    "x-request-id": "The request's own, or a new one.",
    "x-adapter-id": "The adapter that it was about; the base's name; - for neither.",
    "x-adapter-version": "Its version; of the base, its digest.",
}


class DocumentedApp(FastAPI):
    """An app with a complete OpenAPI page."""

    def openapi(self) -> dict[str, Any]:
        """The page; made once."""
        if self.openapi_schema is None:
            complete(super().openapi(), keys_required=asks_for_keys(self))
        return super().openapi()


def complete(page: dict[str, Any], *, keys_required: bool = False) -> None:
    """Complete a page in place.

    Args:
        page: FastAPI's.
        keys_required: whether the server requires keys; else they are optional.
    """
    security = _SECURITY if keys_required else [{}, *_SECURITY]
    page["components"]["securitySchemes"] = _KEYS
    schemas = page["components"]["schemas"]
    for name in _NOT_OURS:
        schemas.pop(name, None)
    schemas |= _schemas()
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            _complete_operation(operation, schemas)
            _add_refusals(method.upper(), path, operation, security)
    links.put_in(page["paths"])


def _schemas() -> dict[str, Any]:
    """Schemas by name of the models that FastAPI does not see."""
    _, found = models_json_schema(_MODELS, ref_template=REFERENCE)
    schemas: dict[str, Any] = found["$defs"]
    return schemas


def _complete_operation(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    for parameter in operation.get("parameters", []):
        if description := _PARAMETERS.get(parameter["name"]):
            parameter.setdefault("description", description)
    # FastAPI adds its own refusal.
    operation["responses"] = {
        status: response for status, response in operation["responses"].items() if int(status) < 400
    }
    for response in operation["responses"].values():
        response["headers"] = headers(_HEADERS) | response.get("headers", {})
        for kind, content in response.get("content", {}).items():
            if kind == EVENTS:
                content["schema"] = event_schema(_hoisted(content["schema"], schemas))
            elif "example" not in content and content["schema"].get("format") != "binary":
                content["example"] = example_of(content["schema"], schemas)


def _hoisted(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Put a schema and its definitions among the components; returns a reference to it."""
    schemas |= schema.pop("$defs", {})
    schemas[schema["title"]] = schema
    return {"$ref": REFERENCE.format(model=schema["title"])}


def _add_refusals(
    method: str, path: str, operation: dict[str, Any], security: list[dict[str, list[str]]]
) -> None:
    """Say which keys a route accepts, and everything that it refuses."""
    rule = rule_of(method, path)
    kinds = common(operation, rule) + operation.pop(EXTENSION, [])
    if method != "GET":
        kinds.append("OriginRefused")
    operation["responses"] |= responses(path, kinds)
    if rule != PUBLIC:
        operation["security"] = security
    if rule not in (None, PUBLIC, ANY_KEY):
        scopes = " or ".join(f"`{scope}`" for scope in sorted(rule))
        operation["description"] += f"\n\nWhere keys are required: one with the scope {scopes}."


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
