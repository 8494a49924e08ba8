"""Configs by their `peft_type`: what PEFT's `from_pretrained` and `get_peft_config` do.

Uses the strict reader of checkpoints and the table of methods. Independent of tensors and bases.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.checkpoint.config import read_peft_config
from adapters.checkpoint.folder import read_config
from adapters.method import PeftConfig
from adapters.methods import METHODS, method_of
from adapters.python_config import plain

PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, type[PeftConfig]] = {
    peft_type: method.config_class for peft_type, method in METHODS.items()
}


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of an `adapter_config.json`. Raises as `read_config`."""
    fields = read_config(path)
    fields.pop("runtime_config", None)  # PEFT leaves it out as well
    return fields


def config_of(config_class: type[PeftConfig], fields: Mapping[str, Any]) -> PeftConfig:
    """The config of these fields: of their `peft_type`'s class, else of the given one.

    Warns of fields without effect, such as those that PEFT drops because it does not know them.

    Raises:
        MethodUnsupported: another `peft_type` than the served ones.
        ConfigInvalid: a field is wrong.
        ValueError: PEFT's class refuses the values.
    """
    raw = {name: plain(value) for name, value in fields.items()}
    if "peft_type" in raw or config_class not in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        config_class = method_of(raw).config_class
    read = read_peft_config(METHODS[config_class.model_fields["peft_type"].default], raw)
    for warning in read.warnings:
        warnings.warn(warning, stacklevel=3)
    read.config.check_as_peft()
    return read.config


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config of a dict with a `peft_type`. Raises as `config_of`."""
    return config_of(PeftConfig, config_dict)
