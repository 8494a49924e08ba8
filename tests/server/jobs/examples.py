"""A training job and rows as the store takes them."""

from __future__ import annotations

from typing import Any

from adapters.training.job import Hyperparameters, TrainingJob

ROWS: list[dict[str, Any]] = [
    {"text": "é\u2028\n😀", "label": "a", "n": 1, "x": 0.1, "flag": True},
    {"text": "=1+1", "label": "b", "n": -(2**62), "x": 1e-300, "flag": False},
]


def a_job(adapter: str = "mine", **changes: Any) -> TrainingJob:
    return TrainingJob(
        **{
            "adapter": adapter,
            "method": "ia3",
            "peft_type": "IA3",
            "config": {"peft_type": "IA3", "target_modules": ["k_proj"], "x": 0.1},
            "template": "Text : {text} Label :",
            "target": "label",
            "labels": ["a", "b"],
            "label_names": None,
            "target_separator": " ",
            "append_eos": True,
            "tokenization": "boundary",
            "max_length": 64,
            "on_too_long": "error",
            "init_text": None,
            "init_token_ids": [1, 2],
            "context_examples": None,
            "context_seed": None,
            "train_on_context": None,
            "if_exists": "new_version",
            "description": "é😀",
            "hyperparameters": Hyperparameters(learning_rate=1e-2, epochs=8),
            "base_digest": "b" * 64,
            "base_name": "somebody/base",
            "num_rows": len(ROWS),
            "trainable_params": 8,
            **changes,
        }
    )
