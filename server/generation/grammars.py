"""Converts the APIs' structured-output parameters to the engine's `Grammar`.

    response_format    OpenAI's  {"type": "text" | "json_object" | "json_schema", "json_schema": {"schema"}}
    structured_outputs vLLM's    {"json" | "json_object" | "regex" | "choice": ...}
    guided_*           vLLM's older names of the same
    grammar            TGI's     {"type": "json" | "json_object" | "json_schema" | "regex", "value"}

Checks types, sizes and depth only. Whether a schema or an expression is supported is determined when it
is compiled, off the request path. Independent of routes, tensors and grammar libraries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from adapters.strict_json import StrictJsonError, parse_object
from server.engine.request import Grammar
from server.errors import Contradiction, RequestInvalid

MAX_SCHEMA_BYTES = 64 * 1024
# Nesting depth of the schema's JSON; the compiler's parser stops at 128.
MAX_SCHEMA_DEPTH = 100
MAX_REGEX_CHARS = 4 * 1024
MAX_CHOICES = 1_000
MAX_CHOICE_CHARS = 10_000
# Total size of all choices: the limit of a schema, times four.
MAX_CHOICES_BYTES = 256 * 1024

_ANY_OBJECT = '{"type":"object"}'
# Values under these keys are data, not schemas: a "$ref" in them is not a reference.
_DATA = frozenset({"const", "default", "enum", "examples"})
_SCHEMA_PLACE = frozenset({"name", "description", "schema", "strict"})


def grammar_from(
    *,
    response_format: object = None,
    structured_outputs: object = None,
    guided_json: object = None,
    guided_regex: str | None = None,
    guided_choice: list[str] | None = None,
    tgi_grammar: object = None,
    field_prefix: str = "",
) -> Grammar | None:
    """The grammar that a request specifies; None if it specifies none.

    Args:
        response_format: OpenAI's object; `{"type": "text"}` specifies none. TGI's and LoRAX's variants
            ("json" or "regex" with "value", "json_object" with "schema") are accepted too.
        structured_outputs: vLLM's object with one of json, json_object, regex and choice.
        guided_json: a JSON Schema, as an object or as its text.
        guided_regex: a regular expression for the whole output.
        guided_choice: texts, one of which is the output.
        tgi_grammar: TGI's object with type and value.
        field_prefix: prefix of field names in errors, such as "parameters.".

    Raises:
        Contradiction: more than one is given.
        RequestInvalid: one of them is malformed, too large, or of an unknown type.
    """
    given: dict[str, tuple[object, Callable[[object, str], Grammar | None]]] = {
        "response_format": (response_format, _typed),
        "structured_outputs": (structured_outputs, _structured_outputs),
        "guided_json": (guided_json, _schema),
        "guided_regex": (guided_regex, _regex),
        "guided_choice": (guided_choice, _choice),
        "grammar": (tgi_grammar, _typed),
    }
    found = {
        f"{field_prefix}{name}": grammar
        for name, (value, read) in given.items()
        if value is not None and (grammar := read(value, f"{field_prefix}{name}")) is not None
    }
    if len(found) > 1:
        first, second, *_ = found
        raise Contradiction(
            f"{first} and {second} are both given; an output follows one of them",
            field=second,
            expected="one of them",
            came="both",
        )
    return next(iter(found.values()), None)


# --- objects that say their kind -----------------------------------------------------------


def _typed(value: object, field: str) -> Grammar | None:
    """OpenAI's response_format and TGI's grammar, which name their types differently."""
    fields = _object(value, field)
    kind = fields.get("type")
    if kind == "text":
        return None
    if kind in ("json_object", "json"):
        for name in ("schema", "value"):
            if fields.get(name) is not None:
                return _schema(fields[name], f"{field}.{name}")
        if kind == "json_object":
            return Grammar("json_schema", _ANY_OBJECT)
        raise _wrong(f"{field}.value", "a JSON Schema", "nothing")
    if kind == "json_schema":
        name = "json_schema" if fields.get("value") is None else "value"
        return _named_schema(fields.get(name), f"{field}.{name}")
    if kind == "regex":
        return _regex(fields.get("value"), f"{field}.value")
    raise _wrong(f"{field}.type", "text, json_object, json_schema, json or regex", kind)


def _named_schema(value: object, field: str) -> Grammar:
    """OpenAI's {"name", "schema", "strict"}; TGI's clients also send the schema itself."""
    if value is None:
        raise _wrong(field, 'an object with a JSON Schema under "schema"', "nothing")
    if isinstance(value, Mapping) and value and value.keys() <= _SCHEMA_PLACE:
        return _schema(value.get("schema"), f"{field}.schema")
    return _schema(value, field)


def _structured_outputs(value: object, field: str) -> Grammar | None:
    readers: dict[str, Callable[[object, str], Grammar | None]] = {
        "json": _schema,
        "json_object": _flag,
        "regex": _regex,
        "choice": _choice,
    }
    given = {name: one for name, one in _object(value, field).items() if one is not None}
    unknown = given.keys() - readers.keys()
    if unknown or len(given) != 1:
        came = ", ".join(sorted(given)) or "none of them"
        raise _wrong(field, "one of json, json_object, regex and choice", came)
    [(name, one)] = given.items()
    return readers[name](one, f"{field}.{name}")


def _flag(value: object, field: str) -> Grammar | None:
    if not isinstance(value, bool):
        raise _wrong(field, "true or false", value)
    return Grammar("json_schema", _ANY_OBJECT) if value else None


# --- kinds ---------------------------------------------------------------------------------


def _schema(value: object, field: str) -> Grammar:
    if isinstance(value, str):
        return _schema_text(value, field)
    schema = _object(value, field, "a JSON Schema (an object)")
    # Checked before serialisation, which recurses.
    _check_depth(schema, field)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
    except (TypeError, ValueError) as error:  # NaN, half a surrogate pair, an endless integer
        raise _wrong(field, "a JSON Schema in plain JSON", str(error)) from None
    _check_size(size, field)
    _check_refs(schema, field)
    return Grammar("json_schema", text)


def _schema_text(text: str, field: str) -> Grammar:
    data = text.encode("utf-8", "surrogatepass")
    _check_size(len(data), field)
    try:
        schema = parse_object(data, MAX_SCHEMA_DEPTH)
    except StrictJsonError as error:
        raise _wrong(field, "the text of a JSON Schema", str(error)) from None
    _check_refs(schema, field)
    return Grammar("json_schema", text)


def _regex(value: object, field: str) -> Grammar:
    text = _text(value, field, "a regular expression")
    if not 1 <= len(text) <= MAX_REGEX_CHARS:
        expected = f"a regular expression of 1 to {MAX_REGEX_CHARS} characters"
        raise _wrong(field, expected, f"{len(text)} characters")
    return Grammar("regex", text)


def _choice(value: object, field: str) -> Grammar:
    if not isinstance(value, (list, tuple)):
        raise _wrong(field, "a list of texts", value)
    if not 1 <= len(value) <= MAX_CHOICES:
        raise _wrong(field, f"1 to {MAX_CHOICES} texts", f"{len(value)} of them")
    size = 0
    for index, one in enumerate(value):
        place = f"{field}.{index}"
        text = _text(one, place, "a text")
        if not 1 <= len(text) <= MAX_CHOICE_CHARS:
            expected = f"a text of 1 to {MAX_CHOICE_CHARS} characters"
            raise _wrong(place, expected, f"{len(text)} characters")
        size += len(text.encode())
    if size > MAX_CHOICES_BYTES:
        expected = f"at most {MAX_CHOICES_BYTES} bytes of texts in all"
        raise _wrong(field, expected, f"{size} bytes")
    return Grammar("choice", json.dumps(list(dict.fromkeys(value)), ensure_ascii=False))


# --- checks --------------------------------------------------------------------------------


def _object(value: object, field: str, expected: str = "an object") -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(field, expected, value)
    return value


def _text(value: object, field: str, expected: str) -> str:
    if not isinstance(value, str):
        raise _wrong(field, expected, value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(field, expected, "half a surrogate pair") from None
    return value


def _check_size(size: int, field: str) -> None:
    if size > MAX_SCHEMA_BYTES:
        raise _wrong(field, f"a JSON Schema of at most {MAX_SCHEMA_BYTES} bytes", f"{size} bytes")


def _check_depth(schema: Mapping[str, Any], field: str) -> None:
    level: list[Any] = [schema]
    number = 0
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [inner for value in level for inner in _parts(value)]
        # Each takes at least a byte: refuse half a million of them before serialising any.
        number += len(level)
        if number > MAX_SCHEMA_BYTES:
            raise _wrong(field, f"a JSON Schema of at most {MAX_SCHEMA_BYTES} bytes", "more")
        if not level:
            return
    expected = f"a JSON Schema of at most {MAX_SCHEMA_DEPTH} levels"
    raise _wrong(field, expected, "a deeper one")


def _parts(value: object) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value


def _check_refs(schema: Mapping[str, Any], field: str) -> None:
    """Refuse a `$ref` that points outside its own schema; nothing is fetched."""
    pending: list[Any] = [schema]
    while pending:
        value = pending.pop()
        if not isinstance(value, Mapping):
            pending.extend(_parts(value))
            continue
        ref = value.get("$ref")
        if isinstance(ref, str) and not ref.startswith("#"):
            raise _wrong(field, 'a "$ref" inside the schema itself ("#...")', ref)
        pending.extend(one for name, one in value.items() if name not in _DATA)


def _wrong(field: str, expected: str, came: object) -> RequestInvalid:
    shown = _shown(came)
    return RequestInvalid(
        f"{field}: expected {expected}, came {shown}", field=field, expected=expected, came=shown
    )


def _shown(came: object) -> str:
    if isinstance(came, str):
        return came if len(came) <= 200 else came[:197] + "..."
    # The repr of a container can be arbitrarily long, or nested too deeply to be produced.
    kinds: dict[type, str] = {dict: "an object", list: "a list", type(None): "null"}
    return kinds.get(type(came)) or str(came)[:200]
