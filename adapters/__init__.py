"""The adapter library: PEFT checkpoints of five methods, without PEFT, HTTP or scheduling.

The public names below load on first use, so that a process which only needs the error tree or the
base's description does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adapters.peft_names import check_absent

if TYPE_CHECKING:
    from adapters.config_loading import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config
    from adapters.method import PeftConfig, PromptLearningConfig
    from adapters.methods import METHODS, method_of
    from adapters.methods.cpt import CPTConfig, CPTEmbedding
    from adapters.methods.ia3 import IA3Config, IA3Linear, attach_ia3, detach_ia3
    from adapters.methods.p_tuning import (
        PromptEncoder,
        PromptEncoderConfig,
        PromptEncoderReparameterizationType,
    )
    from adapters.methods.prefix_tuning import (
        PrefixEncoder,
        PrefixTuningConfig,
        prompt_embeddings_from_past_key_values,
    )
    from adapters.methods.prompt_tuning import (
        PromptEmbedding,
        PromptTuningConfig,
        PromptTuningInit,
    )
    from adapters.peft_types import PeftType, TaskType

_HOMES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": "adapters.config_loading",
    "get_peft_config": "adapters.config_loading",
    "PeftConfig": "adapters.method",
    "PromptLearningConfig": "adapters.method",
    "PeftType": "adapters.peft_types",
    "TaskType": "adapters.peft_types",
    "prompt_embeddings_from_past_key_values": "adapters.methods.prefix_tuning",
    "METHODS": "adapters.methods",
    "method_of": "adapters.methods",
    "CPTConfig": "adapters.methods.cpt",
    "CPTEmbedding": "adapters.methods.cpt",
    "IA3Config": "adapters.methods.ia3",
    "IA3Linear": "adapters.methods.ia3",
    "attach_ia3": "adapters.methods.ia3",
    "detach_ia3": "adapters.methods.ia3",
    "PrefixEncoder": "adapters.methods.prefix_tuning",
    "PrefixTuningConfig": "adapters.methods.prefix_tuning",
    "PromptEmbedding": "adapters.methods.prompt_tuning",
    "PromptTuningConfig": "adapters.methods.prompt_tuning",
    "PromptTuningInit": "adapters.methods.prompt_tuning",
    "PromptEncoder": "adapters.methods.p_tuning",
    "PromptEncoderConfig": "adapters.methods.p_tuning",
    "PromptEncoderReparameterizationType": "adapters.methods.p_tuning",
}

__all__ = [
    "METHODS",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "CPTConfig",
    "CPTEmbedding",
    "IA3Config",
    "IA3Linear",
    "PeftConfig",
    "PeftType",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "attach_ia3",
    "detach_ia3",
    "get_peft_config",
    "method_of",
    "prompt_embeddings_from_past_key_values",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("graftwork")
    home = _HOMES.get(name)
    if home is None:
        check_absent(name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
