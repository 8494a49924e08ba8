"""What bodies and parameters must be beyond the types of their fields, in JSON Schema's words.

Which fields exclude one another, which of several must be there, what a list of several kinds may hold.
Routes check all of it and say what is wrong in a sentence; here it is said to readers of the page, so
that a request made by its schema is taken. Knows no route's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from server.api.adapter_choice import LORAX_FIELDS, MARKS
from server.api.training.openai.body import METHOD_TYPES, SUPERVISED

Schema = dict[str, Any]

_JSON = "application/json"
_FORM = "multipart/form-data"

_NULL: Schema = {"type": "null"}
_TEXT: Schema = {"type": "string"}
_SOME_TEXT: Schema = {"type": "string", "minLength": 1}
_OBJECT: Schema = {"type": "object"}


def one_of(**kinds: Schema) -> list[Schema]:
    """Branches of an `anyOf`: just one of these fields is there and no null, as its kind says."""
    return [
        {
            "required": [name],
            "properties": {other: kind if other == name else _NULL for other in kinds},
        }
        for name, kind in kinds.items()
    ]


def not_both(first: str, second: str) -> list[Schema]:
    """Branches of an `anyOf`: one of the two fields is left out, or null."""
    return [{"properties": {name: _NULL}} for name in (first, second)]


def _nullable(*kinds: Schema) -> list[Schema]:
    return [*kinds, _NULL]


def where_no_other(values: Schema, *names: str) -> Schema:
    """These fields are left out, or null, unless others are as `values` says."""
    return {
        "anyOf": [
            {"required": list(values), "properties": values},
            {"properties": dict.fromkeys(names, _NULL)},
        ]
    }


_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": 1000}
_IDS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_NOT_SET: Schema = {"enum": [False, None]}
_OBJECT_OR_NULL: Schema = {"type": ["object", "null"]}
# The rule of adapters' names.
_NAME: Schema = {"pattern": r"^[a-z0-9](\.?[a-z0-9_-])*\.?$", "maxLength": 63}
_ROW: Schema = {
    "type": "object",
    "minProperties": 1,
    "propertyNames": {"minLength": 1},
    "additionalProperties": {"type": ["string", "boolean", "integer", "number"]},
}
_CLOSED: Schema = {"additionalProperties": False}
_TYPED: Schema = {
    "required": ["type"],
    "properties": {
        "type": {
            "enum": ["text", "json_object", "json_schema", "json", "regex"],
            "description": "What the output is held to.",
        }
    },
}
_OPENAI_FIELDS: Schema = {
    "model": {"pattern": r"\S"},
    "stop": {
        "anyOf": _nullable(
            _STOP, {"type": "array", "maxItems": 16, "items": {"anyOf": [_STOP, _NULL]}}
        )
    },
    "logit_bias": {"propertyNames": {"pattern": "^[0-9]{1,9}$"}},
    "guided_choice": {
        "anyOf": _nullable({"type": "array", "minItems": 1, "items": _SOME_TEXT, "maxItems": 1000})
    },
    "guided_json": {"anyOf": _nullable(_OBJECT, {**_SOME_TEXT, "contentMediaType": _JSON})},
    "guided_regex": {"anyOf": _nullable({**_SOME_TEXT, "format": "regex", "maxLength": 4096})},
    "response_format": {**_OBJECT_OR_NULL, **_TYPED},
    "structured_outputs": {
        **_OBJECT_OR_NULL,
        **_CLOSED,
        "minProperties": 1,
        "properties": {
            "json": {"description": "A JSON Schema, or the text of one."},
            "json_object": {"type": ["boolean", "null"], "description": "Any object."},
            "regex": {"type": ["string", "null"], "description": "What the output matches."},
            "choice": {"type": ["array", "null"], "description": "Texts, one of which it is."},
        },
    },
}
# Fields that routes do not know are named in a header and ignored, but for one that looks like an adapter.
# A pattern of JSON Schema cannot leave its case open.
_ADAPTERS = "|".join("".join(f"[{c}{c.upper()}]" for c in mark) for mark in MARKS)
_NO_STRAY_ADAPTERS: Schema = {"propertyNames": {"not": {"pattern": _ADAPTERS}}}
_STREAM_OPTIONS = where_no_other({"stream": {"const": True}}, "stream_options")
_HYPERPARAMETERS: Schema = {"anyOf": not_both("epochs", "max_steps")}
_NO_TOOLS: Schema = {
    "anyOf": [
        {"required": ["tool_choice"], "properties": {"tool_choice": {"const": "none"}}},
        {"properties": {"tool_choice": {"enum": ["auto", None]}, "tools": {"maxItems": 0}}},
    ]
}
_BY_METHOD: list[Schema] = [
    where_no_other(
        {"method": {"const": "cpt"}}, "context_examples", "context_seed", "train_on_context"
    ),
    where_no_other(
        {"method": {"enum": ["prefix_tuning", "p_tuning_v2", "prompt_tuning"]}}, "init_text"
    ),
]
_BLOCK: Schema = {"anyOf": _nullable({"$ref": "#/components/schemas/MethodBlock"})}

# Merged into the schemas of these names: objects into objects, all else takes the place of what was.
BODIES: Mapping[str, Schema] = {
    "GenerateBody": {
        "anyOf": one_of(inputs=_SOME_TEXT, row=_OBJECT),
        "propertyNames": {"not": {"pattern": f"{_ADAPTERS}|^model$"}},
    },
    "GenerateParameters": {
        "propertyNames": {
            "anyOf": [
                {"enum": ["adapter_id", *LORAX_FIELDS]},
                {"not": {"pattern": f"{_ADAPTERS}|^model$"}},
            ]
        },
        "allOf": [
            {
                "properties": {
                    name: {**_NULL, "description": "Null, as LoRAX's client sends it."}
                    for name in LORAX_FIELDS
                }
            }
        ],
        "properties": {
            "adapter_id": {"pattern": r"\S"},
            "grammar": _TYPED,
            "response_format": _TYPED,
        },
    },
    "ClassifyBody": {
        **_CLOSED,
        "anyOf": one_of(
            inputs={"type": ["string", "array"]}, row=_OBJECT, rows={"type": "array", "minItems": 1}
        ),
    },
    "TokenizeBody": {"anyOf": one_of(inputs=_TEXT, prompt=_TEXT)},
    "CompletionBody": {
        **_NO_STRAY_ADAPTERS,
        "properties": {
            **_OPENAI_FIELDS,
            "prompt": {
                "anyOf": _nullable(
                    _SOME_TEXT,
                    {"type": "array", "minItems": 1, "items": _SOME_TEXT},
                    _IDS,
                    {"type": "array", "minItems": 1, "items": _IDS},
                )
            },
            "suffix": _NULL,
        },
        "allOf": [
            {"anyOf": one_of(prompt={"type": ["string", "array"]}, row=_OBJECT)},
            {
                "anyOf": [
                    {"required": ["echo"], "properties": {"echo": {"const": True}}},
                    {"properties": {"max_tokens": {"minimum": 1}}},
                ]
            },
            _STREAM_OPTIONS,
        ],
    },
    "ChatBody": {
        **_NO_STRAY_ADAPTERS,
        "properties": {**_OPENAI_FIELDS, "chat_template": _NULL},
        "allOf": [
            {"anyOf": one_of(messages={"type": "array", "minItems": 1}, row=_OBJECT)},
            {
                "anyOf": [
                    {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
                    {"properties": {"top_logprobs": {"enum": [0, None]}}},
                ]
            },
            {
                "anyOf": [
                    {"properties": {"continue_final_message": _NOT_SET}},
                    {"properties": {"add_generation_prompt": _NOT_SET}},
                ]
            },
            _NO_TOOLS,
            _STREAM_OPTIONS,
        ],
    },
    "CombineBody": {
        "properties": {
            "name": _NAME,
            "labels": {"uniqueItems": True, "items": {"pattern": r"\S"}},
        }
    },
    "LoadBody": {"properties": {"lora_name": _NAME}},
    "TuningBody": {**_NO_STRAY_ADAPTERS, "properties": {"suffix": _NAME}},
    "TuningHyperparameters": _HYPERPARAMETERS,
    "MethodChoice": {
        "properties": {
            "type": {"enum": list(METHOD_TYPES)},
            **{
                name: {**_BLOCK, "description": f"What there is to say about {name}."}
                for name in METHOD_TYPES
            },
        },
        "additionalProperties": _NULL,
        "allOf": [
            {
                "anyOf": [
                    {"properties": {"type": {"const": name}}}
                    if name == SUPERVISED
                    else {"required": ["type"], "properties": {"type": {"const": name}}},
                    {"properties": {name: _NULL}},
                ]
            }
            for name in METHOD_TYPES
        ],
    },
}
# The same for bodies that have no name.
UNNAMED: Mapping[tuple[str, str, str], Schema] = {
    ("POST", "/adapters", _FORM): {
        **_CLOSED,
        "properties": {
            "name": _NAME,
            "files": {"minItems": 1},
            "labels": {"contentMediaType": _JSON},
        },
    },
    ("POST", "/train", _FORM): {
        **_CLOSED,
        "properties": {"job": {"contentMediaType": _JSON}},
    },
    ("POST", "/train", _JSON): {
        "required": ["adapter", "method", "template", "target", "rows"],
        "properties": {
            "adapter": _NAME,
            "rows": {"anyOf": [{"type": "array", "minItems": 1, "items": _ROW}]},
            "label_names": {"minProperties": 1},
            "hyperparameters": _HYPERPARAMETERS,
        },
        "allOf": _BY_METHOD,
    },
    ("POST", "/v1/files", _FORM): _CLOSED,
}
# The same for parameters, by method, path and name.
PARAMETERS: Mapping[tuple[str, str, str], Schema] = {
    ("PUT", "/adapters/{name}/aliases/{alias}", "alias"): {
        **_NAME,
        "not": {"pattern": "^[0-9]+$"},
    },
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events", "after"): {
        "pattern": "^(ftevent-job-[0-9a-f]{24}-)?[0-9]{1,18}$"
    },
    ("GET", "/v1/models/{name}", "name"): {"pattern": r"\S"},
    **{
        ("POST", path, "adapter"): {"pattern": r"\S"}
        for path in ("/", "/generate", "/generate_stream", "/classify")
    },
}


def merge(schema: Schema, more: Schema) -> None:
    """Put `more` into a schema, in place."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(schema.get(key), dict):
            merge(schema[key], value)
        else:
            schema[key] = deepcopy(value)
