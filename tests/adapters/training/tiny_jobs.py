"""Jobs on tiny random bases: examples of random tokens, no text and no tokenizer."""

from __future__ import annotations

import random
from typing import Any

from adapters.base_model import BaseModelSpec
from adapters.method import parse_config
from adapters.methods import METHODS
from adapters.training.examples import Example, Examples
from adapters.training.job import Hyperparameters, TrainingJob
from tests.tiny_models import VOCAB

LABEL_IDS = [(10, 2), (11, 12, 2), (13, 2)]

# What every method and option of training is; `method_config` completes them.
CONFIGS: dict[str, dict[str, Any]] = {
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 7},
    "prefix-zero": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "init_weights": "zero"},
    "prefix-projection": {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": 7,
        "prefix_projection": True,
        "encoder_hidden_size": 12,
    },
    "p-tuning-mlp": {"peft_type": "P_TUNING", "num_virtual_tokens": 6, "encoder_hidden_size": 16},
    "p-tuning-lstm": {
        "peft_type": "P_TUNING",
        "num_virtual_tokens": 6,
        "encoder_hidden_size": 16,
        "encoder_reparameterization_type": "LSTM",
    },
    "prompt-tuning": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 6},
    "ia3": {"peft_type": "IA3"},
    "ia3-all-linear": {
        "peft_type": "IA3",
        "target_modules": "all-linear",
        "feedforward_modules": [],
    },
    "ia3-random": {"peft_type": "IA3", "init_ia3_weights": False},
    "cpt": {"peft_type": "CPT"},
    "cpt-decay": {
        "peft_type": "CPT",
        "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": 0.7,
    },
}
_CONTEXT = {
    "cpt_token_ids": [5, 9, 11, 3, 60, 2, 61, 7, 8, 30, 31, 2],
    "cpt_mask": [1] * 12,
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 0, 5, 6, 7, 8, 8, 0],
    # Small enough to be reached within ten steps.
    "opt_projection_epsilon": 1.5,
    "opt_projection_format_epsilon": 0.8,
}
# Started from tokens instead of random numbers.
FROM_TOKENS = {"prefix-text": "prefix", "prompt-tuning-text": "prompt-tuning"}
VARIANTS = (*CONFIGS, *FROM_TOKENS)


def tiny_job(variant: str, base: BaseModelSpec, **hyperparameters: Any) -> TrainingJob:
    """A job of one variant; `hyperparameters` replace a plain AdamW at 1e-2 over four epochs."""
    raw = {"task_type": "CAUSAL_LM", **CONFIGS[FROM_TOKENS.get(variant, variant)]}
    if raw["peft_type"] == "CPT":
        raw |= _CONTEXT
    method = METHODS[raw["peft_type"]]
    config = method.complete_config(parse_config(method.config_class, raw), base)
    config = config.model_copy(update={"inference_mode": True})
    init = None
    if variant in FROM_TOKENS:
        init = [20 + number for number in range(raw["num_virtual_tokens"])]
    options = {"learning_rate": 1e-2, "epochs": 4, "batch_size": 4, "warmup_ratio": 0.0}
    return TrainingJob(
        adapter="a",
        method=method.name,
        peft_type=method.peft_type,
        config=config.model_dump(mode="json"),
        template="{text}",
        target="label",
        labels=["x", "y", "z"],
        label_names=None,
        target_separator=" ",
        append_eos=True,
        tokenization="boundary",
        max_length=100,
        on_too_long="error",
        init_text=None,
        init_token_ids=init,
        context_examples=None,
        context_seed=None,
        train_on_context=None,
        if_exists="new_version",
        description=None,
        hyperparameters=Hyperparameters(**{**options, **hyperparameters}),
        base_digest=base.digest,
        base_name="tiny",
        num_rows=14,
        trainable_params=method.num_trainable(config, base),
    )


def tiny_examples(num_train: int = 10, num_held_out: int = 4, seed: int = 0) -> Examples:
    """Rows of unequal lengths; the label follows from the first token."""
    draw = random.Random(seed)

    def one(row: int) -> Example:
        prompt = tuple(draw.randrange(14, VOCAB) for _ in range(draw.randrange(2, 12)))
        label = prompt[0] % 3
        target = LABEL_IDS[label]
        types = (1, *(2 for _ in prompt[1:]), *(4 for _ in target))
        return Example(prompt, target, label, row, types)

    rows = [one(row) for row in range(1, num_train + num_held_out + 1)]
    return Examples(rows[:num_train], rows[num_train:], LABEL_IDS)
