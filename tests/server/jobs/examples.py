"""A training job and examples as the store takes them."""

from __future__ import annotations

from typing import Any

from adapters.training.examples import Example, Examples
from adapters.training.job import Hyperparameters, TrainingJob

EXAMPLES = Examples(
    [Example((1, 50, 6), (7, 2), 0, 1, (0, 2, 3, 4, 4)), Example((8,), (9, 2), 1, 2, (2, 4, 4))],
    [],
    [(7, 2), (9, 2)],
)


def many(times: int) -> Examples:
    """The examples again and again; their job needs `num_rows=times * 2`."""
    return Examples(EXAMPLES.train * times, [], EXAMPLES.label_ids)


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
            "num_rows": len(EXAMPLES.train),
            "trainable_params": 8,
            **changes,
        }
    )
