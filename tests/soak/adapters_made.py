"""Adapter folders for the soak, as PEFT saves them: one a method, and some of several seeds.

Knows PEFT and files; no server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import (
    CPTConfig,
    IA3Config,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tests.adapters.methods.oracle import peft_save

_TASK = "CAUSAL_LM"
METHODS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuningConfig(task_type=_TASK, num_virtual_tokens=6),
    "p-tuning": lambda: PromptEncoderConfig(
        task_type=_TASK, num_virtual_tokens=5, encoder_hidden_size=16
    ),
    "ia3": lambda: IA3Config(task_type=_TASK),
    "cpt": lambda: CPTConfig(
        task_type=_TASK,
        cpt_token_ids=list(range(100, 108)),
        cpt_mask=[1] * 8,
        cpt_tokens_type_mask=[2] * 8,
        num_virtual_tokens=8,
    ),
    "prompt": lambda: PromptTuningConfig(task_type=_TASK, num_virtual_tokens=7),
}
# Those that come and go: methods that add up are there more than once.
CHANGING = ("prefix", "ia3", "prompt")
SEEDS = (11, 12, 13)


def make_stable(base: Path, root: Path) -> dict[str, Path]:
    """One folder a method, by name."""
    return {method: _make(base, root / method, method, 1) for method in METHODS}


def make_changing(base: Path, root: Path) -> dict[str, list[Path]]:
    """Folders of several seeds, by method."""
    return {
        method: [_make(base, root / f"{method}-{seed}", method, seed) for seed in SEEDS]
        for method in CHANGING
    }


def _make(base: Path, folder: Path, method: str, seed: int) -> Path:
    logging.disable_progress_bar()
    peft_save(AutoModelForCausalLM.from_pretrained(base), METHODS[method](), folder, seed)
    return folder
