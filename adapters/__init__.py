"""The adapter library: PEFT checkpoints of five methods, without PEFT, HTTP or scheduling.

The public names below load on first use, so that a process which only needs the error tree or the
base's description does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.methods import METHODS, method_of
    from adapters.methods.cpt import CPTConfig, CPTEmbedding
    from adapters.methods.ia3 import IA3Config, IA3Linear, attach_ia3, detach_ia3
    from adapters.methods.p_tuning import (
        PromptEncoder,
        PromptEncoderConfig,
        PromptEncoderReparameterizationType,
    )
    from adapters.methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
    from adapters.methods.prompt_tuning import (
        PromptEmbedding,
        PromptTuningConfig,
        PromptTuningInit,
    )

_HOMES = {
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
    "CPTConfig",
    "CPTEmbedding",
    "IA3Config",
    "IA3Linear",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "attach_ia3",
    "detach_ia3",
    "method_of",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
