"""The defaults of every method, found by measuring; `GET /methods` shows them.

Measured on the default base (SmolLM2-135M-Instruct, bfloat16), on TweetEval's emotion task with 128
rows and RAFT's twitter complaints with 40. What was tried stands beside each entry.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from adapters.training.job import Hyperparameters


class Recipe(BaseModel):
    """How a method is trained unless somebody says otherwise.

    Attributes:
        config: fields of the method's PEFT config.
        hyperparameters: the optimisation.
        min_steps: where nobody says how long to train, a few rows are seen more often than
            `hyperparameters.epochs` times, until there are so many steps.
        init_from_rows: without `init_text`, start from the rendered text of training rows (a prefix
            without projection and prompt tuning).
        context_examples: CPT: examples in the context.
        train_on_context: CPT: whether the rows of the context are trained on as well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: dict[str, Any]
    hyperparameters: Hyperparameters
    min_steps: int = 100
    init_from_rows: bool = False
    context_examples: int | None = None
    train_on_context: bool | None = None


RECIPES: dict[str, Recipe] = {
    "PREFIX_TUNING": Recipe(
        config={"num_virtual_tokens": 20},
        hyperparameters=Hyperparameters(learning_rate=3e-3, epochs=8),
        init_from_rows=True,
    ),
    "P_TUNING": Recipe(
        config={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
        hyperparameters=Hyperparameters(learning_rate=1e-3, epochs=8),
    ),
    "IA3": Recipe(
        config={},
        hyperparameters=Hyperparameters(learning_rate=1e-2, epochs=8),
    ),
    "CPT": Recipe(
        config={"opt_projection_epsilon": 1.0, "opt_projection_format_epsilon": 1.0},
        hyperparameters=Hyperparameters(learning_rate=3e-3, epochs=8),
        context_examples=8,
        train_on_context=True,
    ),
    "PROMPT_TUNING": Recipe(
        config={"num_virtual_tokens": 20},
        hyperparameters=Hyperparameters(learning_rate=3e-2, epochs=8),
        init_from_rows=True,
    ),
}
