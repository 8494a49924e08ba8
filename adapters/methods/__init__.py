"""The table of methods. A new method is one file here and one line in `METHODS`.

Every method is implemented in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters import foreign_configs
from adapters.errors import MethodUnsupported
from adapters.field_errors import close_to, quoted
from adapters.method import AdapterMethod
from adapters.methods.cpt import CPT_METHOD
from adapters.methods.ia3 import IA3_METHOD
from adapters.methods.p_tuning import P_TUNING
from adapters.methods.prefix_tuning import PREFIX_TUNING
from adapters.methods.prompt_tuning import PROMPT_TUNING
from adapters.peft_names import letters
from adapters.peft_types import PeftType

METHODS: dict[str, AdapterMethod[Any]] = {
    "PREFIX_TUNING": PREFIX_TUNING,
    "P_TUNING": P_TUNING,
    "IA3": IA3_METHOD,
    "CPT": CPT_METHOD,
    "PROMPT_TUNING": PROMPT_TUNING,
}

# Other values of PEFT's peft_type; "BONE" is one of older versions.
OTHER_PEFT_TYPES = frozenset(PeftType).difference(METHODS) | {"BONE"}

REASONS = {
    "LORA": "LoRA adapters are not served",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning is not served yet",
}

# PEFT's methods that it cannot merge into a base, or only for some inputs of theirs.
_NOT_MERGEABLE = {
    "ADAPTION_PROMPT",
    "BEFT",
    "CARTRIDGE",
    "LILY",
    "MULTITASK_PROMPT_TUNING",
    "POLY",
    "SHADOW",
    "XLORA",
}
_MERGE = (
    "Merge it into its base and serve the result as a base: "
    "from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer; "
    'AutoPeftModelForCausalLM.from_pretrained("ADAPTER").merge_and_unload().save_pretrained("MERGED"); '
    'AutoTokenizer.from_pretrained("BASE").save_pretrained("MERGED"); '
    "then graftwork serve --base MERGED"
)

# Types that forks of PEFT write. They compute something else than the type whose name they resemble.
FORK_PEFT_TYPES = {
    "BOTTLENECK": "LLM-Adapters",
    "MULTITASK_PROMPT_TUNING_LORA": "DePT",
    "PROMPT_TUNING_LORA": "DePT",
    "PROMPT_VECTOR": "prompt arithmetics",
}

# What people write for a method: letters and digits -> PEFT's name.
_ALIASES = {
    "ia³": "IA3",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "promptencoder": "P_TUNING",
    "ptuningv1": "P_TUNING",
    "ptuningv2": "PREFIX_TUNING",
    "ptv2": "PREFIX_TUNING",
    "softprompt": "PROMPT_TUNING",
    "softprompts": "PROMPT_TUNING",
}


def method_of(raw_config: Mapping[str, Any]) -> AdapterMethod[Any]:
    """The method of an `adapter_config.json`, by its `peft_type`.

    Raises:
        MethodUnsupported: no `peft_type`, or an unsupported one; the message lists the supported ones, and
            says what a config of another program is.
    """
    served = ", ".join(METHODS)
    came = raw_config.get("peft_type")
    if isinstance(came, str) and came in METHODS:
        return METHODS[came]
    raise MethodUnsupported(
        f"{_reason(came, raw_config)}; served are {served}",
        field="peft_type",
        expected=served,
        came=quoted(came),
    )


def _instead(peft_type: str) -> str:
    """What to do with an adapter of a method of PEFT that is not served."""
    if peft_type in _NOT_MERGEABLE:
        return "PEFT cannot merge it into a base either; serve it with PEFT itself"
    elsewhere = " (or serve it unmerged with vLLM, say)" if peft_type == "LORA" else ""
    return _MERGE + elsewhere


def _reason(peft_type: object, raw_config: Mapping[str, Any]) -> str:
    if peft_type is None:
        known = foreign_configs.what_it_is(raw_config)
        if known is not None:
            return f"adapter_config.json has no peft_type: {known}"
        missing = "adapter_config.json has no peft_type, so its method is unknown"
        looks_like = _by_fields(raw_config)
        return missing if looks_like is None else f"{missing}; its fields are those of {looks_like}"
    if not isinstance(peft_type, str):
        return f"peft_type is {quoted(peft_type)}, expected a text"
    if peft_type in OTHER_PEFT_TYPES:
        default = f"{peft_type} is a method of PEFT that is not served"
        return f"peft_type {peft_type!r}: {REASONS.get(peft_type, default)}. {_instead(peft_type)}"
    if peft_type in FORK_PEFT_TYPES:
        return f"peft_type {peft_type!r} belongs to a fork of PEFT ({FORK_PEFT_TYPES[peft_type]})"
    unknown = f"peft_type {quoted(peft_type)} is no method of PEFT that is known here"
    meant = _meant(peft_type)
    return unknown if meant is None else f"{unknown}; did you mean {meant}?"


def _by_fields(raw_config: Mapping[str, Any]) -> str | None:
    """The only method whose own fields a config has."""
    fields = {name: frozenset(method.config_class.model_fields) for name, method in METHODS.items()}
    own = {
        name: found.difference(*(fields[other] for other in fields if other != name))
        for name, found in fields.items()
    }
    alike = [name for name, found in own.items() if not found.isdisjoint(raw_config)]
    return alike[0] if len(alike) == 1 else None


def _meant(peft_type: str) -> str | None:
    """The name of PEFT's that was probably meant: by alias, or by its letters."""
    name = peft_type.rpartition("PeftType.")[2]
    alias = _ALIASES.get(letters(name[:60]))
    return alias or close_to(name, [*METHODS, *OTHER_PEFT_TYPES])


__all__ = ["METHODS", "method_of"]
