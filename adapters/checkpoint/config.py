"""An `adapter_config.json` as people have it, read as PEFT reads it.

PEFT drops fields that its config class lacks, and never looks at what only training needs. So a null is
the default, a field that has no effect in PEFT is named in a warning, whatever it says, and only what
decides the numbers is refused. Independent of tensors, files and single methods.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from adapters.checkpoint.field_names import FORK_FIELDS, PEFT_FIELDS
from adapters.errors import ConfigInvalid
from adapters.field_errors import quoted
from adapters.method import (
    AdapterMethod,
    PeftConfig,
    config_refused,
    without_nulls,
)

_MOST_NAMED = 20  # unknown fields in a warning

# Words in the name of an unknown field that say that it may take part in the computation.
_IN_THE_NUMBERS = frozenset(
    {
        "activation",
        "alpha",
        "append",
        "attention",
        "attn",
        "bias",
        "bottleneck",
        "compose",
        "composition",
        "concat",
        "cross",
        "deep",
        "ensemble",
        "expert",
        "experts",
        "fn",
        "func",
        "function",
        "fuse",
        "fusion",
        "gate",
        "gated",
        "gates",
        "gating",
        "gelu",
        "insert",
        "insertion",
        "layer",
        "layers",
        "location",
        "mask",
        "merge",
        "merged",
        "mixture",
        "moe",
        "multiplier",
        "nonlinearity",
        "norm",
        "parallel",
        "placement",
        "position",
        "positions",
        "postprocess",
        "proj",
        "projection",
        "rank",
        "relu",
        "reparam",
        "reparameterization",
        "reparametrization",
        "residual",
        "rope",
        "rotary",
        "router",
        "routing",
        "scalar",
        "scale",
        "scaled",
        "scales",
        "scaling",
        "source",
        "sources",
        "suffix",
        "temperature",
        "transform",
        "weighting",
    }
)
# Unknown fields with such a word that describe a training run.
_HARMLESS = frozenset(
    {
        "attn_implementation",
        "bf16_full_eval",
        "fp16_scale_window",
        "group_by_position",
        "initial_loss_scale",
        "layer_freeze",
        "loss_scale",
        "max_grad_norm",
        "base_model_layers",
        "data_source",
        "dataset_source",
        "source",
        "sources",
        "mask_prompt",
        "mlm_mask",
        "train_on_source",
    }
)
_SCALES = frozenset(
    {"alpha", "multiplier", "scale", "scales", "scaling", "temperature", "weighting"}
)
_NEUTRAL_WORDS = frozenset({"", "none", "null", "default", "auto", "false", "off", "no"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")


@dataclass(frozen=True)
class ReadConfig:
    """A config that could be read.

    Attributes:
        config: its fields; unknown ones and those without effect are left out.
        warnings: a sentence for each field that has no effect here although something stands in it.
    """

    config: PeftConfig
    warnings: tuple[str, ...]


def read_peft_config(method: AdapterMethod[Any], raw: Mapping[str, Any]) -> ReadConfig:
    """Parse the fields of an untrusted `adapter_config.json`.

    Raises:
        ConfigInvalid: a field that decides the numbers is wrong, or an unknown one may be such a field.
    """
    known = method.config_class.model_fields
    unknown = {name: value for name, value in raw.items() if name not in known}
    warnings = _warn_of_unknown(unknown, method)
    given = without_nulls({name: value for name, value in raw.items() if name in known})
    config, idle = _parse(method.config_class, given)
    for name, value in idle.items():
        warnings.append(
            f"{name} is {quoted(value)}, which is no value for it: ignored, because PEFT does not read it "
            "when it loads an adapter"
        )
    for name in ("num_virtual_tokens", "num_transformer_submodules"):
        used = getattr(config, name, None)
        if name in given and name not in idle and given[name] != used:
            warnings.append(
                f"{name} is {quoted(given[name])}, this adapter has {used}: ignored, because PEFT "
                "computes it again"
            )
    return ReadConfig(config, tuple(warnings))


def _parse(
    config_class: type[PeftConfig], given: Mapping[str, Any]
) -> tuple[PeftConfig, dict[str, Any]]:
    """The config, and the faulty fields that were left out because only training reads them."""
    values, idle = dict(given), dict[str, Any]()
    while True:
        try:
            return config_class.model_validate(values), idle
        except ValidationError as error:
            faulty = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}
            found = sorted(faulty & config_class.only_training)
            if not found:
                raise config_refused(config_class, error) from error
            idle |= {name: values.pop(name) for name in found}


# --- fields that the method's config does not have ---------------------------------------------


def _warn_of_unknown(unknown: Mapping[str, Any], method: AdapterMethod[Any]) -> list[str]:
    for name, value in unknown.items():
        if not is_neutral(name, value) and (reason := _in_the_numbers(name)) is not None:
            raise _may_change_numbers(name, value, reason, method.peft_type)
    if not unknown:
        return []
    return [f"unknown to {method.peft_type}, so ignored as in PEFT: {shown_fields(unknown)}"]


def shown_fields(fields: Mapping[str, Any]) -> str:
    """Untrusted fields and their values, for a message; at most the first few."""
    shown = [shown_field(name, fields[name]) for name in sorted(fields)]
    more = len(shown) - _MOST_NAMED
    return ", ".join(shown[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def shown_field(name: str, value: object) -> str:
    """An untrusted field and its value, for a message."""
    return f"{quoted(name)[1:-1]} ({quoted(value)})"


def _may_change_numbers(name: str, value: object, reason: str, peft_type: str) -> ConfigInvalid:
    return ConfigInvalid(
        f"adapter_config.json: {shown_field(name, value)} is no field of {peft_type} in PEFT, and "
        f"{reason}, so the adapter's output here might not be that of the program that trained it; "
        "expected null, or the field left out if it had no effect",
        field=quoted(name)[1:-1],
        expected="null, or the field left out",
        came=quoted(value),
    )


def _in_the_numbers(name: str) -> str | None:
    """Why an unknown field that is set may take part in the computation; None if it does not."""
    if name in FORK_FIELDS:
        return f"{FORK_FIELDS[name]} computes with it"
    if name in PEFT_FIELDS or name in _HARMLESS:
        return None
    words = {word.lower() for word in _WORD.findall(name)}
    return "its name is that of a part of the computation" if words & _IN_THE_NUMBERS else None


def is_neutral(name: str, value: object) -> bool:
    """Whether a value says that the field is not used: empty, false, or a scale of 1."""
    if isinstance(value, str):
        return value.strip().lower() in _NEUTRAL_WORDS
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        is_scale = bool({word.lower() for word in _WORD.findall(name)} & _SCALES)
        return value == (1 if is_scale else 0)
    return not value
