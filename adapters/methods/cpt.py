"""CPT, context-aware prompt tuning: in-context examples as embedding rows with small trained deltas.

Paper: Blau et al. 2024, arXiv 2410.17222. Parity source: peft/tuners/cpt. A row is the embedding of a
context token plus a trained delta whose norm is bounded by the token's type. Independent of tokenizers,
templates, other methods, files and the engine.

Types: 0 separator, end of sequence or padding; else, modulo 4, 1 template around the input,
2 input, 3 template before the label, 0 label. Example k of the context adds 4 * k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from adapters.base_model import BaseModelSpec
from adapters.errors import ConfigInvalid
from adapters.method import PeftConfig, PromptLearningConfig
from adapters.methods.soft_prompt import (
    EmbeddingRowsMethod,
    VirtualTokens,
    complete,
    embedding_dimensions,
    in_training,
    required,
)
from adapters.methods.trainable_rows import TrainableRows, trainable_soft_prompt
from adapters.trainable import FrozenBase, VirtualTargets

TYPES = 4
LABEL_TYPE = 4
INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE = 1, 2, 3
IGNORED_LABEL = -100
FROZEN_EPSILON = 1e-10
REFERENCE_WIDTH = 2048

NaturalNumber = Annotated[int, Field(ge=0)]
Bound = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class CPTConfig(PromptLearningConfig):
    """PEFT's config of CPT. Source: peft/tuners/cpt/config.py.

    `num_virtual_tokens` is always the number of context tokens, `num_transformer_submodules` 1. A call
    needs `task_type="CAUSAL_LM"`, as in PEFT.

    Attributes:
        cpt_token_ids: tokens of the context; [0] if unset.
        cpt_mask: stored but without effect; ones if unset.
        cpt_tokens_type_mask: type of every context token; ones if unset.
        opt_weighted_loss_type: "decay" weighs older examples less.
        opt_loss_decay_factor: weight of an example relative to the one after it.
        opt_projection_epsilon: bound of a delta of type 2, at width 2048.
        opt_projection_format_epsilon: the same for types 1 and 3.
        tokenizer_name_or_path: recorded, never loaded here.
    """

    only_training: ClassVar[frozenset[str]] = PromptLearningConfig.only_training | {
        "num_virtual_tokens",
        "num_transformer_submodules",
        "num_layers",
        "num_attention_heads",
        "token_dim",
        "opt_weighted_loss_type",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
        "tokenizer_name_or_path",
    }

    peft_type: Literal["CPT"] = "CPT"
    cpt_token_ids: list[NaturalNumber] | None = None
    cpt_mask: list[NaturalNumber] | None = None
    cpt_tokens_type_mask: list[NaturalNumber] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: Bound = 1.0
    opt_projection_epsilon: Bound = 0.1
    opt_projection_format_epsilon: Bound = 0.1
    tokenizer_name_or_path: str | None = None

    @model_validator(mode="after")
    def _one_entry_a_token(self) -> Self:
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        count = len(self.cpt_token_ids)
        if self.cpt_mask is None:
            self.cpt_mask = [1] * count
        if self.cpt_tokens_type_mask is None:
            self.cpt_tokens_type_mask = [1] * count
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            length = len(getattr(self, name))
            if length != count:
                raise ValueError(
                    f"cpt_token_ids has {count} entries and {name} has {length}, "
                    "expected one for each context token"
                )
        # As PEFT does: the context decides, whatever was given.
        self.num_virtual_tokens = count
        self.num_transformer_submodules = 1
        return self

    def check_as_peft(self) -> None:
        """PEFT's class refuses every other task. Source: peft/tuners/cpt/config.py."""
        if self.task_type != "CAUSAL_LM":
            raise ValueError(
                f"CPTConfig only supports task_type='CAUSAL_LM', came {self.task_type!r}"
            )

    def token_ids(self) -> list[int]:
        """The context's tokens, (n,)."""
        return list(self.cpt_token_ids or [])

    def type_mask(self) -> list[int]:
        """The context's types, (n,)."""
        return list(self.cpt_tokens_type_mask or [])


class CPTEmbedding(VirtualTokens):
    """The trainable rows: indices (B, n) -> (B, n, token_dim).

    Every call first projects each delta to its bound. Gradients reach types 1 to 3 only.

    Args:
        config: with `token_dim` set.
        word_embeddings: the base's token embedding, from which the context's rows are copied (not
            in inference mode, where they come from a checkpoint).

    Attributes:
        embedding: (n, token_dim), float32, frozen.
        delta_embedding: (n, token_dim), float32, zero at first.

    Raises:
        ConfigInvalid: a dimension is unset.
    """

    epsilon: torch.Tensor
    is_trained: torch.Tensor

    def __init__(self, config: CPTConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.config = config.model_copy(deep=True)
        count = required(config, "num_virtual_tokens")
        width = required(config, "token_dim")
        self.embedding = nn.Embedding(count, width)
        if not config.inference_mode:
            ids = torch.tensor(config.token_ids(), device=word_embeddings.weight.device)
            rows = word_embeddings(ids).detach().to(torch.float32, copy=True)
            self.embedding.weight = nn.Parameter(rows)
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(count, width)
        nn.init.zeros_(self.delta_embedding.weight)
        types = torch.tensor(config.type_mask()) % TYPES
        # Buffers, not a gradient hook: they survive a deep copy and follow the module's device.
        self.register_buffer("is_trained", (types != 0).unsqueeze(1), persistent=False)
        self.register_buffer("epsilon", self.get_epsilon(), persistent=False)

    def get_epsilon(self) -> torch.Tensor:
        """Bound of every row's delta, (n,), float32: eps * sqrt(d / 2048), next to 0 if frozen."""
        scale = torch.tensor(required(self.config, "token_dim") / REFERENCE_WIDTH).sqrt()
        types = torch.tensor(self.config.type_mask()) % TYPES
        bounds = torch.full((len(types),), FROZEN_EPSILON)
        bounds[types == INPUT] = self.config.opt_projection_epsilon * scale
        is_template = (types == INPUT_TEMPLATE) | (types == OUTPUT_TEMPLATE)
        bounds[is_template] = self.config.opt_projection_format_epsilon * scale
        return bounds

    def get_projection(self) -> torch.Tensor:
        """The deltas, each projected to its bound, (n, token_dim); no gradients."""
        with torch.no_grad():
            delta = self.delta_embedding.weight
            length = torch.linalg.vector_norm(delta, dim=1)
            # A bound of 0 and a delta of 0 would divide 0 by 0; both leave the row at 0.
            longest = torch.maximum(length, self.epsilon).clamp(min=torch.finfo(delta.dtype).tiny)
            return delta * (self.epsilon / longest).unsqueeze(1)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices (B, n) -> context embeddings plus bounded deltas, (B, n, token_dim)."""
        with torch.no_grad():
            self.delta_embedding.weight.copy_(self.get_projection())
        weight = self.delta_embedding.weight
        delta = functional.embedding(indices, torch.where(self.is_trained, weight, weight.detach()))
        rows: torch.Tensor = self.embedding(indices) + delta
        return rows

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Load saved rows (n, d). They include the delta, which is reset to zero.

        Raises:
            ValueError: another shape.
        """
        super().load_prompt_embeddings(prompt_embeddings)
        nn.init.zeros_(self.delta_embedding.weight)

    @staticmethod
    def calculate_loss(
        base_model_output: Any, labels: torch.Tensor, cpt_type_mask: torch.Tensor, config: CPTConfig
    ) -> Any:
        """`cpt_loss` with PEFT's signature: reads `.logits` of the output, sets its `.loss`."""
        base_model_output.loss = cpt_loss(base_model_output.logits, labels, cpt_type_mask, config)
        return base_model_output


def cpt_loss(
    logits: torch.Tensor, labels: torch.Tensor, type_mask: torch.Tensor, config: CPTConfig
) -> torch.Tensor:
    """Cross entropy on label tokens, weighted by example, averaged over the label tokens.

    The last example of a row weighs 1, the one before it g, then g^2 and so on with "decay"
    (g = `opt_loss_decay_factor`), else all weigh 1. Source: peft/tuners/cpt/model.py.

    Args:
        logits: (B, T, V), not shifted.
        labels: (B, T), -100 where there is nothing to predict.
        type_mask: (B, T), context and input, as `with_context` makes it.
        config: the loss's options.

    Returns:
        A scalar.
    """
    targets = labels[:, 1:].to(logits.device)
    types = type_mask[:, 1:].to(logits.device)
    losses = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORED_LABEL
    )  # (B, T - 1)
    weights = torch.ones_like(losses)
    if config.opt_weighted_loss_type == "decay":
        for row_types, row_weights in zip(types, weights, strict=True):
            _decay(row_types, row_weights, config.opt_loss_decay_factor)
    is_label = targets != IGNORED_LABEL
    return (losses * weights)[is_label].mean()


def _decay(types: torch.Tensor, weights: torch.Tensor, factor: float) -> None:
    """Weight the label groups of one row, (T,), in place: the last 1, then `factor`, and so on."""
    groups = torch.unique(types[is_label_type(types)]).flip(0)  # sorted, newest first
    weight = 1.0
    for group in groups:
        weights[types == group] = weight
        weight *= factor


def is_label_type(types: torch.Tensor) -> torch.Tensor:
    """True where a type is that of a label token."""
    return (types > 0) & (types % TYPES == 0)


def with_context(
    config: CPTConfig, labels: torch.Tensor, input_type_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and types of context plus input, for `cpt_loss`.

    The input's types follow on from the context's, so that its label is the newest group; only
    label tokens keep their labels. Source: peft/peft_model.py, `_cpt_forward`.

    Args:
        config: holds the context, n tokens.
        labels: (B, T) of the input.
        input_type_mask: (B, T), 0 to 4; all label if None. It is not changed.

    Returns:
        labels (B, n + T), -100 where no label token stands, and types (B, n + T).
    """
    if input_type_mask is None:
        input_type_mask = torch.full_like(labels, LABEL_TYPE)
    batch = labels.shape[0]
    context = torch.tensor(config.type_mask(), device=labels.device)
    shifted = torch.where(input_type_mask > 0, input_type_mask + context.max(), input_type_mask)
    types = torch.cat((context.expand(batch, -1), shifted), dim=1)
    tokens = torch.tensor(config.token_ids(), device=labels.device)
    joined = torch.cat((tokens.expand(batch, -1), labels), dim=1)
    return joined.masked_fill(~is_label_type(types), IGNORED_LABEL), types


def context_targets(config: CPTConfig) -> VirtualTargets:
    """The context's labels as the rows of a step see them, for a loss that runs the context once.

    A row's own label is the newest group and has weight 1; the context's groups follow, newest first.
    The context counts once per row, which makes the loss equal to `cpt_loss`.
    """
    types = torch.tensor(config.type_mask())
    counts = is_label_type(types)
    counts[0] = False  # no token precedes it
    weights = torch.ones(len(types))
    if config.opt_weighted_loss_type == "decay":
        _decay(types, weights, config.opt_loss_decay_factor)
        weights *= config.opt_loss_decay_factor  # the row's own label is newer than all of these
    return VirtualTargets(torch.tensor(config.token_ids()), weights * counts, counts)


class CPT(EmbeddingRowsMethod):
    """`AdapterMethod` of CPT."""

    name: ClassVar[str] = "cpt"
    peft_type: ClassVar[str] = "CPT"
    read: ClassVar[frozenset[str]] = frozenset()
    config_class: ClassVar[type[PeftConfig]] = CPTConfig

    def complete_config(self, config: CPTConfig, base: BaseModelSpec) -> CPTConfig:
        """The config as PEFT would save it for this base.

        Raises:
            ConfigInvalid: a context token outside the vocabulary, and as `soft_prompt.complete`.
            TensorMismatch: as `soft_prompt.complete`.
        """
        largest = max(config.token_ids(), default=0)
        if largest >= base.vocab_size:
            raise ConfigInvalid(
                f"cpt_token_ids holds {largest}, but the base's vocabulary has {base.vocab_size} "
                "tokens",
                field="cpt_token_ids",
                expected=f"0 to {base.vocab_size - 1}",
                came=str(largest),
            )
        return complete(config, base, embedding_dimensions(base), self.read)

    def num_trainable(self, config: CPTConfig, base: BaseModelSpec) -> int:
        """n * d, the frozen rows' deltas included, as they are stored with the others."""
        return required(config, "num_virtual_tokens") * base.hidden_size

    def trainable(
        self,
        config: CPTConfig,
        frozen: FrozenBase,
        init_token_ids: Sequence[int] | None = None,
    ) -> TrainableRows:
        """Zero deltas on the embeddings of the config's context."""
        if init_token_ids is not None:
            raise ValueError("CPT starts from its context, which the config holds")
        embedding = frozen.model.get_input_embeddings()  # type: ignore[operator]
        module = CPTEmbedding(in_training(config), embedding)
        return trainable_soft_prompt(module, frozen, targets=context_targets(config))


CPT_METHOD = CPT()
