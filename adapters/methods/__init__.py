"""The table of methods. A new method is one file here and one line in `METHODS`.

Every method is implemented in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.errors import MethodUnsupported
from adapters.method import AdapterMethod
from adapters.methods.cpt import CPT_METHOD
from adapters.methods.ia3 import IA3_METHOD
from adapters.methods.p_tuning import P_TUNING
from adapters.methods.prefix_tuning import PREFIX_TUNING
from adapters.methods.prompt_tuning import PROMPT_TUNING

METHODS: dict[str, AdapterMethod[Any]] = {
    "PREFIX_TUNING": PREFIX_TUNING,
    "P_TUNING": P_TUNING,
    "IA3": IA3_METHOD,
    "CPT": CPT_METHOD,
    "PROMPT_TUNING": PROMPT_TUNING,
}

# Other values of PEFT's peft_type, up to 0.21. Source: peft/utils/peft_types.py.
OTHER_PEFT_TYPES = {
    "ADALORA",
    "ADAMSS",
    "ADAPTION_PROMPT",
    "BEFT",
    "BOFT",
    "BONE",
    "C3A",
    "CARTRIDGE",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "LILY",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "MULTITASK_PROMPT_TUNING",
    "OFT",
    "OSF",
    "PEANUT",
    "POLY",
    "PSOFT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHADOW",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "TRAINABLE_TOKENS",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
    "XLORA",
}

REASONS = {
    "LORA": "LoRA adapters are not served",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning is not served yet",
}


def method_of(raw_config: Mapping[str, Any]) -> AdapterMethod[Any]:
    """The method of an `adapter_config.json`, by its `peft_type`.

    Raises:
        MethodUnsupported: no `peft_type`, or an unsupported one; the message lists the supported ones.
    """
    served = ", ".join(METHODS)
    came = raw_config.get("peft_type")
    if isinstance(came, str) and came in METHODS:
        return METHODS[came]
    raise MethodUnsupported(
        f"{_reason(came)}; served are {served}",
        field="peft_type",
        expected=served,
        came=repr(came)[:80],
    )


def _reason(peft_type: object) -> str:
    if peft_type is None:
        return "adapter_config.json has no peft_type, so its method is unknown"
    if not isinstance(peft_type, str):
        return f"peft_type is {peft_type!r:.80}, expected a text"
    if peft_type in OTHER_PEFT_TYPES:
        default = f"{peft_type} is a method of PEFT that is not served"
        return f"peft_type {peft_type!r}: {REASONS.get(peft_type, default)}"
    return f"peft_type {peft_type[:60]!r} is no method of PEFT that is known here"


__all__ = ["METHODS", "method_of"]
