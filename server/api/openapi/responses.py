"""What a route's decorator says of replies that FastAPI has no parameter for: streams and plain text.

Each function gives one entry of the decorator's `responses`. Knows no route.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

EVENTS = "text/event-stream"
REFERENCE = "#/components/schemas/{model}"
TEXT: dict[str, Any] = {"type": "string"}
_TIMING_HEADERS = {
    "x-queue-time": "Milliseconds until the engine began.",
    "x-time-to-first-token": "Milliseconds until the first token.",
    "x-prompt-warning": "Once a caller: that the prompt looks unlike those of the adapter's training.",
    "x-ignored-parameters": "Fields of the body that had no effect, if there were any.",
    "x-did-you-mean": "Fields that were probably meant by those, if that is plain.",
}


def headers(descriptions: dict[str, str], kind: str = "string") -> dict[str, Any]:
    """Headers of a response, by their names."""
    schema = {"type": kind}
    return {name: {"description": text, "schema": schema} for name, text in descriptions.items()}


def events(data: type, example: str, description: str, *, timed: bool = False) -> dict[str, Any]:
    """A response that is, or may be, a stream of events.

    Args:
        data: the type of the JSON in an event; the page puts its schema among the components.
        example: a few events as they are sent.
        description: of the response.
        timed: whether the timing headers are on it.
    """
    schema = TypeAdapter(data).json_schema(ref_template=REFERENCE, mode="serialization")
    response = {
        "description": description,
        "content": {EVENTS: {"schema": schema, "example": example}},
    }
    return {**response, "headers": headers(_TIMING_HEADERS)} if timed else response


def plain(media: str, description: str, example: str | None = None) -> dict[str, Any]:
    """A response that is text, or bytes of some other type."""
    schema = TEXT if media == "text/plain" else {**TEXT, "format": "binary"}
    content = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {"description": description, "content": {media: content}}


def event_schema(data: dict[str, Any]) -> dict[str, Any]:
    """One event whose data has this schema. OpenAPI 3.1 cannot describe events; 3.2 does it so."""
    return {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {
                **TEXT,
                "description": "JSON. The last event of OpenAI's routes is [DONE].",
                "anyOf": [
                    {"const": "[DONE]"},
                    {"contentMediaType": "application/json", "contentSchema": data},
                ],
            },
            "event": {**TEXT, "description": "What happened, where events have names."},
            "id": {**TEXT, "description": "Of the event, where a client can resume from it."},
        },
    }
