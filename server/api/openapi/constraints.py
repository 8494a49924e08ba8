"""Constraints that the types of a body's fields cannot state, as JSON Schema for the OpenAPI page.

Which fields exclude one another, which of several must be present, what a list of several kinds may
hold. Routes check all of it themselves and refuse with a sentence; a request that is made by the page's
schema is accepted. Knows no route and no body.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from server.api.adapter_choice import MARKS

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
SOME_TEXT: Schema = {"type": "string", "minLength": 1}
OBJECT: Schema = {"type": "object"}
SOME_LIST: Schema = {"type": "array", "minItems": 1}
# Of a name that means one thing, and may not be blank.
NOT_BLANK: Schema = {"pattern": r"\S"}
# The rule of adapters' names.
NAME: Schema = {"pattern": r"^[a-z0-9](\.?[a-z0-9_-])*\.?$", "maxLength": 63}
CLOSED: Schema = {"additionalProperties": False}
TYPED: Schema = {
    "required": ["type"],
    "properties": {
        "type": {
            "enum": ["text", "json_object", "json_schema", "json", "regex"],
            "description": "How the output is constrained.",
        }
    },
}
# Unknown fields are ignored and named in a header, except one whose name looks like an adapter's.
# A pattern of JSON Schema has no option to ignore case.
ADAPTERS = "|".join("".join(f"[{c}{c.upper()}]" for c in mark) for mark in MARKS)
NO_STRAY_ADAPTERS: Schema = {"propertyNames": {"not": {"pattern": ADAPTERS}}}


def constrained(**more: Any) -> Callable[[Schema], None]:
    """A `json_schema_extra` that merges these keywords into a schema."""
    return lambda schema: merge(schema, more)


def merge(schema: Schema, more: Schema) -> None:
    """Put `more` into a schema, in place: objects into objects; anything else replaces."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(schema.get(key), dict):
            merge(schema[key], value)
        else:
            schema[key] = deepcopy(value)


def one_of(**kinds: Schema) -> list[Schema]:
    """Branches of an `anyOf`: exactly one of these fields is present and not null, of its kind."""
    return [
        {
            "required": [name],
            "properties": {other: kind if other == name else NULL for other in kinds},
        }
        for name, kind in kinds.items()
    ]


def not_both(first: str, second: str) -> list[Schema]:
    """Branches of an `anyOf`: one of the two fields is left out, or null."""
    return [{"properties": {name: NULL}} for name in (first, second)]


def either(first: Schema, second: Schema) -> Schema:
    """Fields are as one of the two says; the fields of the first must be present."""
    return {
        "anyOf": [{"required": list(first), "properties": first}, {"properties": second}],
    }


def only_with(values: Schema, *names: str) -> Schema:
    """These fields are left out, or null, unless others are as `values` says."""
    return either(values, dict.fromkeys(names, NULL))


def nullable(*kinds: Schema) -> Schema:
    """Any of these kinds, or null."""
    return {"anyOf": [*kinds, NULL]}
