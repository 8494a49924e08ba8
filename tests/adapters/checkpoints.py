"""Sound checkpoints for a tiny base, written by our own writer. No torch model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adapters.base_model import BaseModelSpec, LinearSpec
from adapters.checkpoint.folder import write_checkpoint

BASE = BaseModelSpec(
    model_type="llama",
    digest="b" * 64,
    dtype="float32",
    num_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=50,
    max_positions=64,
    linear_modules={
        f"model.layers.{layer}.{path}": LinearSpec("linear", *widths)
        for layer in range(2)
        for path, widths in {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (8, 4),
            "self_attn.v_proj": (8, 4),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (8, 12),
            "mlp.up_proj": (8, 12),
            "mlp.down_proj": (12, 8),
        }.items()
    },
)
NUM_ROWS = 3


def soft_prompt_config(**changes: Any) -> dict[str, Any]:
    """PEFT's fields of a P-tuning adapter with three virtual tokens on BASE."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": "somebody/base",
        "encoder_dropout": 0.0,
        "encoder_hidden_size": 8,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
        "inference_mode": True,
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": NUM_ROWS,
        "peft_type": "P_TUNING",
        "peft_version": "0.21.2",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": 8,
        **changes,
    }


def rows(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"prompt_embeddings": torch.randn(NUM_ROWS, 8, generator=generator)}


def soft_prompt(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a sound P-tuning checkpoint; other seeds give other bytes."""
    write_checkpoint(directory, soft_prompt_config(**changes), rows(seed))
    return directory


def ia3(directory: Path, targets: list[str]) -> Path:
    """Write a sound IA3 checkpoint that scales keys and values of both layers."""
    config = {
        "base_model_name_or_path": "somebody/base",
        "feedforward_modules": [],
        "inference_mode": True,
        "peft_type": "IA3",
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.ia3_l": torch.ones(4, 1)
        for layer in range(2)
        for name in ("k_proj", "v_proj")
    }
    write_checkpoint(directory, config, tensors)
    return directory
