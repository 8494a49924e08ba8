"""Training requests and jobs as plain data.

`TrainingRequest` is the user's request without its rows. Most fields have defaults; the fields in
`TrainingOptions` all do. `TrainingJob` is the request with every default resolved; it is stored with the
job and, as the recipe, with the resulting adapter. Both serialise to JSON. Independent of rows, tokens
and tensors.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from adapters.field_errors import listed
from adapters.peft_names import why_not_trained
from adapters.template import Tokenization
from adapters.training.shapes import Format

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
# Spellings without case, spaces and signs -> accepted name.
_SPELLINGS: dict[str, str] = {
    **{name.replace("_", ""): name for name in METHOD_NAMES},
    "prefix": "prefix_tuning",
    "ptuning2": "p_tuning_v2",
    "ptv2": "p_tuning_v2",
    "prompt": "prompt_tuning",
    "softprompt": "prompt_tuning",
    "contextawareprompttuning": "cpt",
}


def method_name(text: Any) -> Any:
    """The accepted name of a method in any usual spelling; anything else as it came.

    Such as "IA3", "(IA)³", "prefix-tuning", "P-Tuning v2" and "PeftType.PREFIX_TUNING".
    """
    if not isinstance(text, str) or len(text) > 100:
        return text
    plain = unicodedata.normalize("NFKC", text).lower().removeprefix("pefttype.")
    return _SPELLINGS.get("".join(one for one in plain if one.isalnum()), text)


def why_no_method(text: str) -> str:
    """ " (the reason)" for a method of PEFT that is not trained here; empty for any other text."""
    reason = why_not_trained(text)
    return f" ({reason})" if reason else ""


def _trained_method(text: Any) -> Any:
    name = method_name(text)
    if isinstance(name, str) and name not in METHOD_NAMES and (reason := why_no_method(name)):
        raise ValueError(f"{listed([repr(one) for one in METHOD_NAMES], 'or')}{reason}")
    return name


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
    """Settings of the optimisation. Fields that are left out come from the method's recipe.

    The names are those of transformers' `TrainingArguments`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    learning_rate: LearningRate | None = Field(
        None, description="Highest learning rate of the schedule."
    )
    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="Passes over the rows. Excludes max_steps."
    )
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="Optimiser steps. Excludes epochs."
    )
    batch_size: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Rows per forward pass."
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Forward passes per optimiser step."
    )
    warmup_ratio: Share | None = Field(
        None, description="Share of the steps in which the learning rate rises from 0."
    )
    lr_scheduler_type: Schedule | None = Field(
        None,
        description="Learning rate after the warm-up: linear or half-cosine decay to 0, or constant.",
    )
    optimizer: Optimizer | None = Field(None, description="AdamW, or plain SGD.")
    adam_epsilon: Positive | None = Field(None, description="AdamW's epsilon.")
    weight_decay: NotNegative | None = Field(None, description="AdamW's decoupled weight decay.")
    max_grad_norm: NotNegative | None = Field(
        None, description="Maximum norm of the gradients; 0 disables clipping."
    )
    seed: Seed | None = Field(
        None, description="Seed of the initial weights, the order of rows and dropout."
    )
    validation_split: Share | None = Field(
        None,
        description="Share of the rows held out for validation, stratified by label if there are labels.",
    )
    early_stopping_patience: Count | None = Field(
        None,
        description="Stop after this many evaluations (one per epoch) without improvement, and keep "
        "the best parameters.",
    )


class Hyperparameters(BaseModel):
    """The optimisation, resolved; the fields are those of `HyperparameterRequest`.

    One of `epochs` and `max_steps` is None, and the other sets the duration. The loss of an optimiser
    step is averaged over the target tokens of all its forward passes.
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
    """Options of a training job except its optimisation. Every field has a default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Format | None = Field(
        None,
        description="Shape of the rows. Left out: columns where template and target are given, else the "
        "known shape that the columns have.",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the method's PEFT config. Fields that are left out come from the recipe.",
    )
    labels: Annotated[list[str], Field(min_length=2, max_length=1000)] | None = Field(
        None,
        description="All possible outputs of a classifier. Evaluation ranks them.",
    )
    infer_labels: bool = Field(
        True,
        description="Take the values of the target column as labels where no labels are given and the "
        "values are few.",
    )
    label_names: dict[str, str] | None = Field(
        None, description="Maps a value of the target column, as text, to its label."
    )
    target_separator: Annotated[str, Field(max_length=100)] | None = Field(
        None,
        description="Text between prompt and target. Default: the white space at the end of the "
        "template, or one space if there is none; nothing with as_written.",
    )
    append_eos: bool = Field(True, description="End every target with the end-of-sequence token.")
    tokenization: Tokenization = Field(
        "boundary",
        description="boundary moves white space at the end of the template to the target; as_written "
        "leaves it in the prompt, as some published recipes do.",
    )
    max_length: Count | None = Field(
        None,
        description="Maximum tokens of prompt, target and end of sequence. Default: the positions of "
        "the base, at most 2,048.",
    )
    on_too_long: OnTooLong = Field(
        "error", description="Refuse a longer row, or cut the beginning of its prompt."
    )
    init_text: Annotated[str, Field(min_length=1, max_length=100_000)] | None = Field(
        None, description="Text from which a prefix or a prompt is initialised."
    )
    context_examples: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="CPT: number of examples in the context."
    )
    context_seed: Seed | None = Field(
        None, description="CPT: seed that selects the examples of the context."
    )
    train_on_context: bool | None = Field(
        None, description="CPT: whether to train on the rows of the context as well."
    )
    if_exists: IfExists = Field("new_version", description="What to do if the name is in use.")
    description: Annotated[str, Field(max_length=10_000)] | None = Field(
        None, description="Free text, stored with the adapter."
    )


class JobRequest(TrainingOptions):
    """A training job, without its rows, which may decide `template` and `target`."""

    adapter: str = Field(description="Name of the adapter that is trained.")
    method: Annotated[MethodName, BeforeValidator(_trained_method)] = Field(
        description="Training method, in any usual spelling; p_tuning_v2 is another name of "
        "prefix_tuning."
    )
    template: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Template that turns a row into a prompt: {column} is replaced by its value; a line "
        "of {?column} alone is left out where the value is empty. Not needed for rows of a known shape.",
    )
    target: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Column that holds the expected output; given where template is."
    )
    hyperparameters: HyperparameterRequest = Field(
        default_factory=HyperparameterRequest,
        description="Settings of the optimisation. Fields that are left out come from the recipe.",
    )


class TrainingRequest(JobRequest):
    """A training job without its rows, whose template and target are known."""

    template: Annotated[str, Field(min_length=1)]
    target: Annotated[str, Field(min_length=1)]


class TrainingJob(BaseModel):
    """A training job with every default resolved and every token id fixed.

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
        format: the shape of the rows.
        num_validation_rows: rows that are held out.
        labels_inferred: whether `labels` are the values that the target column has.
        warnings: what was found in the data that may not be intended, a sentence each.
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
    format: Format = "columns"
    labels_inferred: bool = False
    warnings: list[str] = Field(default_factory=list)
    prompts: Prompts = "template"
    trainable_params: int
