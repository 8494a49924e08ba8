"""Tiny random base checkpoints on disk, made from configs; no hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def tiny_config(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**fields, **changes})


def save_tiny(
    directory: Path, *, seed: int = 0, dtype: str = "float32", shard: str = "1GB", **changes: Any
) -> Path:
    """A Llama of about 20,000 weights in `directory`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(**changes))
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    return directory


def edit_config(directory: Path, **changes: Any) -> Path:
    """Change keys of `config.json` in place, as a person with an editor would."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(config))
    return directory
