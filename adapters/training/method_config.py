"""Merges the PEFT fields of a request into the recipe's, and determines the initialisation.

A client may set the fields that configure the method. Fields that training determines (CPT's context) and
fields that cannot be trained (`modules_to_save`) are refused. A null counts as unset, since PEFT writes
nulls. Fields that change nothing, such as a number of heads that the base decides or the version of PEFT
in a saved config, are ignored with a warning. Rows and tokens are handled elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adapters.base_model import BaseModelSpec
from adapters.checkpoint.config import is_neutral, shown_fields
from adapters.errors import ConfigInvalid, JobInvalid
from adapters.field_errors import quoted
from adapters.method import PeftConfig, parse_config, without_nulls
from adapters.training.job import METHOD_NAMES, TrainingRequest
from adapters.training.recipes import Recipe

TASK_TYPE = "CAUSAL_LM"
_SHOWN = 80
# Parameter counts are checked before allocation, and these are counted by building their shapes.
_LARGEST: dict[str, int] = {
    "num_virtual_tokens": 1_000_000,
    "encoder_hidden_size": 65_536,
    "encoder_num_layers": 64,
}
_TAKES_TEXT = ("PREFIX_TUNING", "PROMPT_TUNING")

# Field -> why a client cannot set it; for all methods, then per method.
_NOT_YOURS: dict[str, str] = {
    "modules_to_save": "whole modules of the base are not trained, since every adapter shares it",
}
# Field -> why what a client says in it changes nothing. A saved adapter_config.json has them all.
_WRITTEN_HERE: dict[str, str] = {
    "auto_mapping": "it belongs to models that PEFT does not know",
    "base_model_name_or_path": "the base is the one that is served",
    "inference_mode": "it is written with the adapter",
    "peft_version": "it is written with the adapter",
    "revision": "the base is the one that is served",
}
_MADE_FROM_ROWS = "CPT's context is made from the rows; see context_examples and context_seed"
_NOT_YOURS_IN: dict[str, dict[str, str]] = {
    "CPT": {
        "cpt_token_ids": _MADE_FROM_ROWS,
        "cpt_mask": _MADE_FROM_ROWS,
        "cpt_tokens_type_mask": _MADE_FROM_ROWS,
        "num_virtual_tokens": _MADE_FROM_ROWS,
        "tokenizer_name_or_path": "the tokenizer is the base's",
    }
}


@dataclass(frozen=True)
class Start:
    """Initialisation of a prefix or a prompt.

    Attributes:
        kind: "text", "rows" (the text of training rows), "vocabulary" (random tokens), or "default"
            (as the config specifies, such as random numbers).
        text: only with "text".
    """

    kind: Literal["text", "rows", "vocabulary", "default"]
    text: str | None = None


def resolve(request: TrainingRequest, recipe: Recipe) -> tuple[dict[str, Any], Start]:
    """The unparsed config fields and the initialisation.

    Raises:
        JobInvalid: a field that a client cannot set, or one that conflicts with `init_text`.
    """
    peft_type = METHOD_NAMES[request.method]
    given = {
        name: value
        for name, value in without_nulls(request.config).items()
        if name not in _WRITTEN_HERE
    }
    _check_fields(given, peft_type, request.method)
    if request.init_text is not None and peft_type not in _TAKES_TEXT:
        raise wrong(
            "init_text", f"{request.method} does not start from a text", "no init_text", "a text"
        )
    unset = {name: None for name in request.config if name not in given}
    raw = {**unset, **recipe.config, **given, "peft_type": peft_type, "task_type": TASK_TYPE}
    raw["inference_mode"] = True
    if peft_type == "PROMPT_TUNING":
        return _prompt_start(raw, request, recipe)
    if peft_type == "PREFIX_TUNING":
        return raw, _prefix_start(raw, request, recipe)
    return raw, Start("default")


@dataclass(frozen=True)
class Completed:
    """A config with every field set for the base.

    Attributes:
        config: as PEFT would save it.
        warnings: sentences about given fields that change nothing.
    """

    config: PeftConfig
    warnings: tuple[str, ...]


def ignored(request: TrainingRequest) -> tuple[str, ...]:
    """A sentence for each field of a request that is written with the adapter, whatever it says."""
    given = without_nulls(request.config)
    return tuple(
        f"config.{name} is {quoted(given[name])}: ignored, because {why}"
        for name, why in _WRITTEN_HERE.items()
        if given.get(name) not in (None, False)
    )


def complete(raw: Mapping[str, Any], peft_type: str, base: BaseModelSpec) -> Completed:
    """Parse the fields, and complete them for the base.

    Raises:
        JobInvalid: an unknown field that says something, or one of the wrong type or size.
        CheckpointError: the config does not fit the base, see `AdapterMethod.complete_config`.
    """
    from adapters.methods import METHODS

    method = METHODS[peft_type]
    known = method.config_class.model_fields
    idle = {name: raw[name] for name in raw if name not in known and is_neutral(name, raw[name])}
    config = parse({name: raw[name] for name in raw if name not in idle}, peft_type)
    warnings = [f"config.{sentence}" for sentence in method.stale(config, base)]
    if idle:
        warnings.insert(0, f"config: unknown to {peft_type} and ignored: {shown_fields(idle)}")
    return Completed(method.complete_config(config, base), tuple(warnings))


def parse(raw: Mapping[str, Any], peft_type: str) -> PeftConfig:
    """Parse the fields into the method's config.

    Raises:
        JobInvalid: an unknown field, or one of the wrong type or size.
    """
    from adapters.methods import METHODS

    try:
        config = parse_config(METHODS[peft_type].config_class, raw)
    except ConfigInvalid as error:
        message = error.message.removeprefix("adapter_config.json: ")
        field = f"config.{error.field}" if error.field else "config"
        raise JobInvalid(
            f"config: {message}", field=field, expected=error.expected, came=error.came
        ) from error
    for name, most in _LARGEST.items():
        value = getattr(config, name, None)
        if value is not None and not 1 <= value <= most:
            raise wrong(f"config.{name}", f"it is {value}", f"1 to {most}", str(value))
    return config


def _check_fields(given: Mapping[str, Any], peft_type: str, method: str) -> None:
    refused = {**_NOT_YOURS, **_NOT_YOURS_IN.get(peft_type, {})}
    for name, value in given.items():
        if name in refused and value != []:
            came = repr(value)[:_SHOWN]
            raise wrong(f"config.{name}", refused[name], "the field left out", came)
    fixed = {"peft_type": peft_type, "task_type": TASK_TYPE}
    for name, want in fixed.items():
        if given.get(name, want) != want:
            came = repr(given[name])[:_SHOWN]
            raise wrong(f"config.{name}", f"{method} is trained with {want!r}", repr(want), came)


def _prefix_start(raw: Mapping[str, Any], request: TrainingRequest, recipe: Recipe) -> Start:
    for name in ("prefix_projection", "init_weights"):
        if request.init_text is not None and raw.get(name):
            raise wrong(
                "init_text",
                f"with {name} a prefix does not start from a text",
                f"no init_text, or no {name}",
                "both",
            )
    if request.init_text is not None:
        return Start("text", request.init_text)
    # An explicit null requests PEFT's default initialisation, random numbers.
    if (
        recipe.init_from_rows
        and not raw.get("prefix_projection")
        and "init_weights"
        not in (
            *request.config,
            *recipe.config,
        )
    ):
        return Start("rows")
    return Start("default")


def _prompt_start(
    raw: dict[str, Any], request: TrainingRequest, recipe: Recipe
) -> tuple[dict[str, Any], Start]:
    """Take over the initialisation that PEFT's own fields specify.

    The written config says RANDOM: with TEXT, PEFT would load a tokenizer whenever it loads the adapter.
    """
    fields = {
        name: raw.pop(name, None)
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
    }
    init = raw.get("prompt_tuning_init")
    if init is not None and init not in ("TEXT", "SAMPLE_VOCAB", "RANDOM"):
        return raw, Start("default")  # the config's own check reports the error
    for name, value in fields.items():
        if value is not None and (init != "TEXT" or name == "tokenizer_kwargs"):
            expected = "it left out" if init == "TEXT" else "prompt_tuning_init 'TEXT' with it"
            came = repr(value)[:_SHOWN]
            raise wrong(f"config.{name}", "it would change nothing", expected, came)
    raw["prompt_tuning_init"] = "RANDOM"
    text = _prompt_text(init, fields["prompt_tuning_init_text"], request.init_text)
    if text is not None:
        return raw, Start("text", text)
    if init == "SAMPLE_VOCAB":
        return raw, Start("vocabulary")
    return raw, Start("rows" if init is None and recipe.init_from_rows else "default")


def _prompt_text(init: str | None, in_config: Any, init_text: str | None) -> str | None:
    if init in ("SAMPLE_VOCAB", "RANDOM") and init_text is not None:
        raise wrong(
            "init_text",
            f"config.prompt_tuning_init is {init!r}, which does not start from a text",
            "one of the two",
            "both",
        )
    if init != "TEXT":
        return init_text
    if in_config is not None and (not isinstance(in_config, str) or not in_config):
        came = repr(in_config)[:_SHOWN]
        raise wrong("config.prompt_tuning_init_text", "it is no text", "a text", came)
    if None not in (in_config, init_text) and in_config != init_text:
        raise wrong(
            "init_text", "config.prompt_tuning_init_text says another text", "one text", "two"
        )
    text: str | None = in_config if init_text is None else init_text
    if text is None:
        raise wrong("config.prompt_tuning_init", "TEXT needs a text", "init_text", "none")
    return text


def wrong(field: str, fault: str, expected: str, came: str) -> JobInvalid:
    """The refusal of one field of a request."""
    return JobInvalid(
        f"{field}: {fault}; expected {expected}, came {came}",
        field=field,
        expected=expected,
        came=came[:200],
    )
