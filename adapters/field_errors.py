"""Sentences about fields that are wrong: from pydantic's findings to the words that users read.

    unknown field 'lr'; did you mean 'learning_rate'?
    missing: adapter, method and target
    epochs: expected a whole number, came 'three'

The only place that knows pydantic's kinds of errors; none of its words reach a message. Independent of HTTP
and of what the fields are for.
"""

from __future__ import annotations

import difflib
import itertools
import json
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel

_MAX_SHOWN = 6
# Of each kind of finding. Explaining takes time with the square of their number, and a body may have a
# hundred thousand.
_MAX_EXPLAINED = 50
_MAX_CHOICES = 24
_MAX_CHARACTERS = 80
_CUTOFF = 0.65

# What other libraries and tutorials call a field that we have. Only names that the place has are suggested.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "learningrate", "rate"),
    "epochs": ("num_epochs", "num_train_epochs", "n_epochs", "epoch"),
    "batch_size": (
        "bs",
        "per_device_train_batch_size",
        "train_batch_size",
        "per_device_batch_size",
        "micro_batch_size",
    ),
    "max_steps": ("steps", "num_steps", "train_steps", "num_training_steps"),
    "gradient_accumulation_steps": ("grad_accum", "gradient_accumulation", "accumulation_steps"),
    "warmup_ratio": ("warmup", "warmup_steps", "num_warmup_steps"),
    "lr_scheduler_type": ("scheduler", "lr_scheduler", "schedule"),
    "optimizer": ("optim",),
    "max_grad_norm": ("grad_clip", "gradient_clipping", "clip_grad_norm", "max_gradient_norm"),
    "validation_split": ("val_split", "test_size", "validation_size", "eval_split", "val_size"),
    "early_stopping_patience": ("patience", "early_stopping"),
    "adapter": ("name", "adapter_name", "adapter_id", "output_name"),
    "name": ("adapter", "adapter_name", "adapter_id"),
    "adapters": ("parts", "models", "adapter_names"),
    "method": ("peft_type", "type", "algorithm", "peft_method"),
    "config": ("peft_config", "adapter_config", "method_config"),
    "num_virtual_tokens": ("virtual_tokens", "pre_seq_len", "prefix_length", "prompt_length"),
    "config.num_virtual_tokens": ("num_virtual_tokens", "virtual_tokens", "pre_seq_len"),
    "rows": ("data", "dataset", "examples", "samples", "train_data", "records"),
    "template": ("prompt_template", "prompt", "prompt_column", "format"),
    "target": ("target_column", "label_column", "output", "label", "response_column", "answer"),
    "labels": ("classes", "label_list", "class_names", "choices"),
    "max_length": ("max_seq_length", "max_seq_len", "max_source_length", "cutoff_len"),
    "max_tokens": ("max_new_tokens", "max_token", "max_output_tokens"),
    "max_new_tokens": ("max_tokens", "max_token", "max_length"),
    "max_completion_tokens": ("max_new_tokens",),
    "inputs": ("input", "text", "texts", "prompt", "prompts"),
    "append_eos": ("add_eos", "add_eos_token"),
    "init_text": ("prompt_tuning_init_text", "initial_text"),
    "version": ("adapter_version", "ver"),
    "stop": ("stop_sequences", "stop_words", "stops"),
}
_BY_OTHER_NAME: dict[str, list[str]] = {}
for _ours, _others in _OTHER_NAMES.items():
    for _other in _others:
        _BY_OTHER_NAME.setdefault(_other, []).append(_ours)

# Kind of pydantic's error -> what was expected, with the facts of its context.
_EXPECTED: Mapping[str, str] = {
    "string_type": "text",
    "string_sub_type": "text",
    "string_unicode": "text in UTF-8",
    "string_pattern_mismatch": "text of another form",
    "bytes_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of at most 18 digits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "iterable_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
    "none_required": "null",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "path_not_directory": "a folder that is there",
    "path_not_file": "a file that is there",
    "recursion_loop": "a value that does not hold itself",
    "union_tag_invalid": "one of {expected_tags}",
    "union_tag_not_found": "an object that says its kind in {discriminator}",
}
_COUNTED = {"too_short": "at least {min_length}", "too_long": "at most {max_length}"}
_SAID_BY_PYDANTIC = ("Input should be ", "Input should ", "Value should ", "Field ")


@dataclass(frozen=True)
class FieldError:
    """One or more fields that are wrong, for people and for programs.

    Attributes:
        message: all findings; the first ones in full.
        field: the first field at fault; "" for the value as a whole.
        expected: what would have been accepted there.
        came: what came there.
    """

    message: str
    field: str
    expected: str
    came: str


def explain(
    errors: Sequence[Any], model: Any = None, shown: Callable[[str], str] = str
) -> FieldError:
    """Make one message of all findings of a validation.

    Args:
        errors: `ValidationError.errors()`; at least one.
        model: the model or type that was validated; its fields are suggested for unknown ones.
        shown: what a place is called in messages, such as an option of the command line.
    """
    by_kind: dict[str, list[Any]] = {"missing": [], "extra_forbidden": [], "": []}
    for one in errors:
        by_kind.get(one["type"], by_kind[""]).append(one)
    left = sum(max(0, len(alike) - _MAX_EXPLAINED) for alike in by_kind.values())
    missing, unknown, others = (alike[:_MAX_EXPLAINED] for alike in by_kind.values())
    found = [*_unknown(unknown, model, shown), *_missing(missing, shown), *_wrong(others, shown)]
    left += max(0, len(found) - _MAX_SHOWN)
    message = "; ".join(one.message for one in found[:_MAX_SHOWN])
    if left:
        message = f"{message}; and {left} more"
    return FieldError(message, found[0].field, found[0].expected, found[0].came)


def unknown_name(name: str, known: Collection[str], what: str = "field") -> str:
    """The sentence about a name that a place does not have.

    Args:
        name: as it came.
        known: what the place has.
        what: what such names stand for.
    """
    said = f"unknown {what} {quoted(name)}"
    if close := close_to(name, known):
        return f"{said}; did you mean {quoted(close)}?"
    if not known or len(known) > _MAX_CHOICES:
        return said
    return f"{said}; known are {listed(sorted(known))}"


def close_to(name: str, known: Collection[str], cutoff: float = _CUTOFF) -> str | None:
    """The known name that was probably meant; None if none is near.

    Args:
        name: as it came.
        known: what the place has.
        cutoff: how alike the letters must be, from 0 to 1.
    """
    plain = {_plain(one): one for one in known}
    asked = _plain(name[:_MAX_CHARACTERS])
    if asked in plain:
        return plain[asked]
    for ours in _BY_OTHER_NAME.get(asked, ()):
        if ours in known:
            return ours
        outer, dot, _ = ours.partition(".")
        if dot and outer in known:
            return ours
    near = difflib.get_close_matches(asked, plain, n=1, cutoff=cutoff)
    return plain[near[0]] if near else None


def quoted(value: Any, limit: int = _MAX_CHARACTERS) -> str:
    """A value as it may stand in a message: text in quotes, anything else as JSON; short.

    What cannot be printed, or would change the direction of the text around it, is escaped.
    """
    if isinstance(value, bytes | bytearray):
        value = bytes(value[: limit + 1]).decode("utf-8", "backslashreplace")
    short = _beginning(value, [limit + 1])
    if isinstance(short, str):
        text = repr(short)
    else:
        text = _escaped(json.dumps(short, ensure_ascii=False, default=str))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names in a sentence: a, b and c."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


# --- the three kinds of findings -----------------------------------------------------------------


def _missing(errors: Sequence[Any], shown: Callable[[str], str]) -> list[FieldError]:
    places = list(dict.fromkeys(place_of(one["loc"]) for one in errors))
    if not places:
        return []
    if len(places) == 1:
        message = f"{shown(places[0])}: missing"
    else:
        message = f"missing: {listed([shown(one) for one in places[:_MAX_CHOICES]])}"
    return [FieldError(message, places[0], "a value", "nothing")]


def _unknown(
    errors: Sequence[Any], model: Any, shown: Callable[[str], str]
) -> Iterator[FieldError]:
    listed_for: set[str] = set()
    for one in errors:
        *outer, name = map(str, one["loc"])
        place = "" if outer == ["body"] else place_of(outer)
        here = _model_at(model, one["loc"][:-1])
        known = () if here is None else field_names(here)
        near = close_to(name, known)
        # A place's fields are listed once.
        message = unknown_name(name, () if place in listed_for and near is None else known)
        expected = listed(known) or "a known field"
        if (inner := _inside(name, here)) and inner != near:
            message = f"unknown field {quoted(name)}; did you mean {quoted(inner)}?"
        elif near is None:
            listed_for.add(place)
        at = f"{shown(place)}: " if place else ""
        field = quoted(f"{place}.{name}" if place else name)[1:-1]
        yield FieldError(f"{at}{message}", field, expected, quoted(name))


def _wrong(errors: Sequence[Any], shown: Callable[[str], str]) -> Iterator[FieldError]:
    """Findings at one place are those of the kinds that it may have: they become one sentence."""
    by_place: dict[str, list[Any]] = {}
    for one in errors:
        by_place.setdefault(place_of(one["loc"]), []).append(one)
    for place, found in by_place.items():
        within = any(place and other.startswith(f"{place}.") for other in by_place)
        if within and all(one["type"] in _OF_ANOTHER_TYPE for one in found):
            continue  # another kind of value was meant, and something in it is wrong
        if any(one["type"] == "json_invalid" for one in found):
            why = found[0].get("ctx", {}).get("error", "")
            yield FieldError(
                f"body: expected JSON, came invalid JSON ({why})",
                "body",
                "JSON",
                f"invalid ({why})",
            )
            continue
        deeper = [one for one in found if one["type"] not in _OF_ANOTHER_TYPE] or found
        expected = listed(_distinct(map(_expected, deeper)), "or")
        came = _came(deeper[0])
        at = f"{shown(place)}: " if place else ""
        yield FieldError(f"{at}expected {expected}, came {came}", place, expected, came)


# The value is of another JSON type; a finding of another sort at or in the same place says more.
_OF_ANOTHER_TYPE = frozenset(
    {"none_required", "bool_parsing", "int_parsing", "int_from_float", "float_parsing"}
    | {name for name in _EXPECTED if name.endswith("_type")}
)


def _came(error: Mapping[str, Any]) -> str:
    value = error.get("input")
    if error["type"] in ("too_short", "too_long", "string_too_long") and isinstance(value, Sized):
        return str(len(value))
    return quoted(value)


def _distinct(expected: Iterable[str]) -> list[str]:
    found = list(dict.fromkeys(expected))
    return [one for one in found if one != "a whole number" or "a number" not in found]


def _expected(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    context = {name: f"{one:g}" if isinstance(one, float) else one for name, one in context.items()}
    if kind in ("literal_error", "enum"):
        return _one_of(str(context.get("expected", "")), error.get("input"))
    if kind in _COUNTED:
        what = "entries" if isinstance(error.get("input"), dict) else "values"
        if context.get("min_length") == 1:
            return f"one or more {what}"
        return f"{_COUNTED[kind].format(**context)} {what}"
    if kind == "string_too_short" and context.get("min_length") == 1:
        return "text that is not empty"
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**context)
    said = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    for start in _SAID_BY_PYDANTIC:
        said = said.removeprefix(start)
    return said.removeprefix("expected ").partition(", came ")[0]


def _one_of(choices: str, came: Any) -> str:
    # pydantic writes 'a', 'b' or 'c'.
    names = [name for part in choices.split(" or ") for name in part.split(", ")]
    said = listed(names, "or")
    if not isinstance(came, str):
        return said
    close = close_to(came, [name.strip("'") for name in names])
    return f"{said} (did you mean {quoted(close)}?)" if close else said


def place_of(loc: Sequence[Any]) -> str:
    """The place of a finding, as its names joined by dots."""
    # Between the names stand the kinds that a value of several kinds was held against.
    parts = [part for one in loc if "[" not in (part := str(one)) and part not in _ARMS]
    if len(parts) > 1 and parts[0] in ("body", "query", "path"):
        parts = parts[1:]
    elif parts == ["body"]:
        return "body"
    return ".".join(parts)


_ARMS = frozenset({"str", "int", "float", "bool", "none", "constrained-str", "constrained-int"})


# --- the fields of a model -----------------------------------------------------------------------


def field_names(model: type[BaseModel]) -> list[str]:
    """Names under which a model takes its fields."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _inside(name: str, model: type[BaseModel] | None) -> str | None:
    """OUTER.NAME, where an object in the model has the field that was probably meant."""
    if model is None:
        return None
    for outer, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            names = field_names(inner)
            exact = _plain(name) in map(_plain, names)
            if exact or any(ours in names for ours in _BY_OTHER_NAME.get(_plain(name), ())):
                return f"{outer}.{close_to(name, names)}"
    return None


def _model_at(model: Any, loc: Sequence[Any]) -> type[BaseModel] | None:
    """The model of the object at a place; None if that is not plain."""
    steps = list(loc)
    if steps and steps[0] in ("body", "query", "path"):
        steps = steps[1:]
    here = _models_in(model)
    for step in steps:
        named = [one for one in here if one.__name__ == str(step)]
        inner = [
            found
            for one in here
            if step in one.model_fields
            for found in _models_in(one.model_fields[str(step)].annotation)
        ]
        here = inner or named or here
    return here[0] if here else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every model that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin is Literal or annotation is None:
        return []
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        arguments = arguments[:1]
    if origin in (Union, types.UnionType, Annotated, list, tuple, dict):
        return [model for one in arguments for model in _models_in(one)]
    return []


# --- text ----------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return name.strip().lower().lstrip("-").replace("-", "_").replace(" ", "_")


def _escaped(text: str) -> str:
    is_shown: Callable[[str], bool] = str.isprintable
    return "".join(one if is_shown(one) else repr(one)[1:-1] for one in text)


def _beginning(value: Any, left: list[int]) -> Any:
    """As much of a value as its quotation needs: it may be of megabytes.

    Args:
        value: as JSON has them.
        left: how many more characters are of use; every value takes one at least.
    """
    left[0] -= 1
    if isinstance(value, str):
        return value[: max(left[0], 0) + 2]
    if isinstance(value, list | tuple):
        return [_beginning(one, left) for one in itertools.takewhile(lambda _: left[0] > 0, value)]
    if isinstance(value, dict):
        items = itertools.takewhile(lambda _: left[0] > 0, value.items())
        return {_beginning(str(key), left): _beginning(one, left) for key, one in items}
    return value
