"""Eight adapters of four methods on one base, for the benchmarks: made by PEFT, random, of small scale.

Knows PEFT and files; not the engine.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import CPTConfig, IA3Config, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from transformers import PreTrainedModel

NUM_VIRTUAL_TOKENS = 20
_CONFIGS = {
    "prefix": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL_TOKENS
    ),
    "p-tuning": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL_TOKENS, encoder_hidden_size=128
    ),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "cpt": lambda: CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=list(range(100, 100 + NUM_VIRTUAL_TOKENS)),
        cpt_mask=[1] * NUM_VIRTUAL_TOKENS,
        cpt_tokens_type_mask=[2] * NUM_VIRTUAL_TOKENS,
        num_virtual_tokens=NUM_VIRTUAL_TOKENS,
    ),
}


@dataclass(frozen=True)
class BenchAdapter:
    """One adapter, where PEFT has it and where it lies on disk.

    Attributes:
        name: also its name in `model`.
        model: the PEFT model that holds it, on a base of its own or shared with its method.
        directory: its checkpoint.
        num_virtual_tokens: positions it takes.
    """

    name: str
    model: Any
    directory: Path
    num_virtual_tokens: int


def make_adapters(base: PreTrainedModel, root: Path) -> list[BenchAdapter]:
    """Two adapters of each method; every method has a copy of the base, as PEFT changes it."""
    made = []
    for method, config in _CONFIGS.items():
        first, second = f"{method}-0", f"{method}-1"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(base), config(), adapter_name=first)
            model.add_adapter(second, config())
        _randomise(model, method)
        model.eval()
        model.save_pretrained(root)
        virtual = 0 if method == "ia3" else NUM_VIRTUAL_TOKENS
        for name in (first, second):
            (root / name / "README.md").unlink(missing_ok=True)
            made.append(BenchAdapter(name, model, root / name, virtual))
    return made


def _randomise(model: Any, method: str) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name or "prompt_encoder" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((1.0 + 0.1 * noise) if method == "ia3" else 0.1 * noise)
