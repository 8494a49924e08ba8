"""Training requests and jobs as plain data.

`TrainingRequest` is the user's request without its rows. Most fields have defaults; the fields in
`TrainingOptions` all do. `TrainingJob` is the request with every default resolved; it is stored with the
job and, as the recipe, with the resulting adapter. Both serialise to JSON. Independent of rows, tokens
and tensors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters.template import Tokenization

# Accepted method name -> method. P-Tuning v2 is prefix tuning on every layer.
METHOD_NAMES: dict[str, str] = {
    "prefix_tuning": "PREFIX_TUNING",
    "p_tuning_v2": "PREFIX_TUNING",
    "p_tuning": "P_TUNING",
    "ia3": "IA3",
    "cpt": "CPT",
    "prompt_tuning": "PROMPT_TUNING",
}

MethodName = Literal["prefix_tuning", "p_tuning_v2", "p_tuning", "ia3", "cpt", "prompt_tuning"]
OnTooLong = Literal["error", "truncate"]
IfExists = Literal["new_version", "error"]
Prompts = Literal["template", "chat"]
Schedule = Literal["linear", "cosine", "constant"]
Optimizer = Literal["adamw", "sgd"]

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# Far above any useful rate; a rate that overflows float32 would raise an error inside torch.
LearningRate = Annotated[float, Field(gt=0.0, le=1e30, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class HyperparameterRequest(BaseModel):
    """What may be said about the optimisation; what is left out comes from the method's recipe.

    The names are those of transformers' `TrainingArguments`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    learning_rate: LearningRate | None = Field(None, description="The schedule's highest rate.")
    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="Passes over the rows; not together with max_steps."
    )
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="Optimiser steps; not together with epochs."
    )
    batch_size: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Rows a forward pass."
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Forward passes an optimiser step."
    )
    warmup_ratio: Share | None = Field(
        None, description="Share of the steps in which the rate rises from 0."
    )
    lr_scheduler_type: Schedule | None = Field(
        None,
        description="What the rate does afterwards: falls to 0 as a line or a half cosine, or stays.",
    )
    optimizer: Optimizer | None = Field(None, description="AdamW, or plain SGD.")
    adam_epsilon: Positive | None = Field(None, description="AdamW's.")
    weight_decay: NotNegative | None = Field(None, description="AdamW's, decoupled.")
    max_grad_norm: NotNegative | None = Field(
        None, description="Gradients are clipped to this norm; 0 does not clip."
    )
    seed: Seed | None = Field(
        None, description="Of the initial weights, the order of rows and dropout."
    )
    validation_split: Share | None = Field(
        None, description="Share of the rows held out, drawn by label where there are labels."
    )
    early_stopping_patience: Count | None = Field(
        None,
        description="Stop after so many evaluations, one an epoch, without a better one, and keep "
        "the best.",
    )


class Hyperparameters(BaseModel):
    """The optimisation, resolved.

    Attributes:
        learning_rate: the schedule's highest.
        epochs: passes over the rows; None if `max_steps` sets the duration.
        max_steps: optimiser steps; None if `epochs` sets the duration.
        batch_size: rows per forward pass.
        gradient_accumulation_steps: forward passes per optimiser step; the loss is averaged over
            the target tokens of all of them.
        warmup_ratio: share of the steps in which the rate rises from 0.
        lr_scheduler_type: schedule after warm-up: linear or half-cosine decay to 0, or constant.
        optimizer: "adamw", or plain "sgd".
        adam_epsilon: AdamW's.
        weight_decay: AdamW's, decoupled.
        max_grad_norm: gradients are clipped to this norm; 0 disables clipping.
        seed: seed of the initial weights, the row order and dropout.
        validation_split: share of the rows held out, stratified by label if there are labels.
        early_stopping_patience: stop after this many evaluations (one per epoch) without improvement,
            and keep the best parameters; None disables early stopping.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: Positive
    epochs: Count | None
    max_steps: Count | None = None
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    warmup_ratio: Share = 0.05
    lr_scheduler_type: Schedule = "linear"
    optimizer: Optimizer = "adamw"
    adam_epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    seed: Seed = 0
    validation_split: Share = 0.0
    early_stopping_patience: Count | None = None


class TrainingOptions(BaseModel):
    """What may be said about a job, its optimisation apart; all of it has a default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    config: dict[str, Any] = Field(
        default_factory=dict,
        description="PEFT's fields of the method; what is left out comes from the recipe.",
    )
    labels: Annotated[list[str], Field(min_length=2, max_length=1000)] | None = Field(
        None,
        description="All that may be answered, where the task is to choose; evaluation then ranks them.",
    )
    label_names: dict[str, str] | None = Field(
        None, description="The target's value as text, and the label in words."
    )
    target_separator: Annotated[str, Field(max_length=100)] | None = Field(
        None,
        description="Stands between prompt and target. Left out: the white space at the template's "
        "end, or one space where there is none (as_written: nothing).",
    )
    append_eos: bool = Field(True, description="End every target with the end-of-sequence token.")
    tokenization: Tokenization = Field(
        "boundary",
        description="boundary moves white space at the template's end to the target; as_written "
        "leaves it, for recipes that were written so.",
    )
    max_length: Count | None = Field(
        None,
        description="Tokens of prompt, target and end of sequence. Left out: what the base holds, "
        "at most 2,048.",
    )
    on_too_long: OnTooLong = Field(
        "error", description="Refuse a longer row, or drop the beginning of its prompt."
    )
    init_text: Annotated[str, Field(min_length=1, max_length=100_000)] | None = Field(
        None, description="Start a prefix or a prompt from this text."
    )
    context_examples: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="CPT: examples in the context."
    )
    context_seed: Seed | None = Field(None, description="CPT: which ones.")
    train_on_context: bool | None = Field(
        None, description="CPT: whether the rows of the context are trained on as well."
    )
    if_exists: IfExists = Field(
        "new_version", description="What to do when the name has an adapter."
    )
    description: Annotated[str, Field(max_length=10_000)] | None = Field(
        None, description="Free text about the adapter."
    )


class TrainingRequest(TrainingOptions):
    """What somebody asks for, rows apart."""

    adapter: str = Field(description="The name under which it will be served.")
    method: MethodName = Field(description="p_tuning_v2 is prefix_tuning on every layer.")
    template: Annotated[str, Field(min_length=1)] = Field(
        description="{column} substitution that makes a prompt of a row."
    )
    target: Annotated[str, Field(min_length=1)] = Field(
        description="The column that holds what to answer."
    )
    hyperparameters: HyperparameterRequest = Field(
        default_factory=HyperparameterRequest,
        description="The optimisation; what is left out comes from the method's recipe.",
    )


class TrainingJob(BaseModel):
    """What will be done: every default resolved, every id fixed.

    Attributes (those that `TrainingRequest` has mean the same):
        method: the method's own name, such as "prefix_tuning".
        peft_type: PEFT's name of the method.
        config: the complete `adapter_config.json`; for CPT with the context's token ids and types.
        max_length: tokens of prompt, target and end of sequence.
        init_token_ids: initial tokens of a prefix or a prompt, one per virtual token; None starts from
            random numbers.
        base_digest: digest of the base.
        base_name: name of the base.
        num_rows: rows, held-out ones included.
        num_validation_rows: number of held-out rows at the end; overrides `validation_split`.
        prompts: "template": the template makes prompts of data, in which the names of special tokens
            are plain text. "chat": the one column that the template names holds what the base's chat
            template made, its special tokens included; the adapter has no template of its own.
        trainable_params: number of trained parameters, an encoder's included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: str
    method: str
    peft_type: str
    config: dict[str, Any]
    template: str
    target: str
    labels: list[str] | None
    label_names: dict[str, str] | None
    target_separator: str
    append_eos: bool
    tokenization: Tokenization
    max_length: int
    on_too_long: OnTooLong
    init_text: str | None
    init_token_ids: list[int] | None
    context_examples: int | None
    context_seed: int | None
    train_on_context: bool | None
    if_exists: IfExists
    description: str | None
    hyperparameters: Hyperparameters
    base_digest: str
    base_name: str
    num_rows: int
    num_validation_rows: Annotated[int, Field(ge=0)] = 0
    prompts: Prompts = "template"
    trainable_params: int
