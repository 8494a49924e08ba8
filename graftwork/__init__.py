"""Graftwork from Python: `import graftwork`.

    graftwork.Engine      a base model with adapters in this process, without HTTP
    graftwork.Client      a running server
    graftwork.METHODS     the five methods by PEFT's name, with the config classes beside it

The names load on first use: `Client` does not load torch.

The code is installed as the packages `adapters` (the adapter library) and `server` (everything else);
this package only names the parts for use from other programs. Moving the code into this package would
need a symbolic link, or a second module name for each file, in a source tree that keeps the two
folders at its top. Editors and mypy then see every file twice and take its classes for different ones.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adapters.peft_names import check_absent

if TYPE_CHECKING:
    from adapters import (
        METHODS,
        CPTConfig,
        IA3Config,
        PeftConfig,
        PeftType,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptEncoderReparameterizationType,
        PromptTuningConfig,
        PromptTuningInit,
        TaskType,
        method_of,
    )
    from graftwork.client import Client, JobFailed, ServerRefused
    from server.engine.errors import EngineError
    from server.engine.offline import OfflineEngine as Engine
    from server.engine.python_calls import GenerationFailed, InvalidCall, UnknownAdapter
    from server.engine.python_calls import SamplingOptions as SamplingParams
    from server.engine.request import Grammar

# Public name -> its module, and its name there where it is another.
_HOMES: dict[str, tuple[str, str | None]] = {
    "METHODS": ("adapters", None),
    "CPTConfig": ("adapters", None),
    "Client": ("graftwork.client", None),
    "Engine": ("server.engine.offline", "OfflineEngine"),
    "EngineError": ("server.engine.errors", None),
    "GenerationFailed": ("server.engine.python_calls", None),
    "Grammar": ("server.engine.request", None),
    "IA3Config": ("adapters", None),
    "InvalidCall": ("server.engine.python_calls", None),
    "JobFailed": ("graftwork.client", None),
    "PeftConfig": ("adapters", None),
    "PeftType": ("adapters", None),
    "PrefixTuningConfig": ("adapters", None),
    "PromptEncoderConfig": ("adapters", None),
    "PromptEncoderReparameterizationType": ("adapters", None),
    "PromptTuningConfig": ("adapters", None),
    "PromptTuningInit": ("adapters", None),
    "SamplingParams": ("server.engine.python_calls", "SamplingOptions"),
    "TaskType": ("adapters", None),
    "UnknownAdapter": ("server.engine.python_calls", None),
    "ServerRefused": ("graftwork.client", None),
    "method_of": ("adapters", None),
}

__all__ = [
    "METHODS",
    "CPTConfig",
    "Client",
    "Engine",
    "EngineError",
    "GenerationFailed",
    "Grammar",
    "IA3Config",
    "InvalidCall",
    "JobFailed",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "SamplingParams",
    "ServerRefused",
    "TaskType",
    "UnknownAdapter",
    "method_of",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("graftwork")
    if name not in _HOMES:
        check_absent(name)
        # What else the library has, such as the modules of the methods, is found here as well.
        if name in importlib.import_module("adapters").__all__:
            return getattr(importlib.import_module("adapters"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _HOMES[name]
    return getattr(importlib.import_module(module), there or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
