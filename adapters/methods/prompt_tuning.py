"""Prompt tuning: embedding rows before the input, trained directly.

Paper: Lester et al. 2021, arXiv 2104.08691. Parity source: peft/tuners/prompt_tuning. Independent of
other methods, checkpoints and the engine; a tokenizer is loaded only for PEFT's own call.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from adapters.base_model import BaseModelSpec
from adapters.errors import reason_of
from adapters.method import PeftConfig, PromptLearningConfig
from adapters.methods.soft_prompt import (
    EmbeddingRowsMethod,
    VirtualTokens,
    complete,
    embedding_dimensions,
    num_rows,
    required,
)
from adapters.methods.trainable_rows import TrainableRows, trainable_soft_prompt
from adapters.trainable import FrozenBase


class PromptTuningInit(enum.StrEnum):
    """Where the rows start: the tokens of a text, random tokens, or random numbers."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptTuningConfig(PromptLearningConfig):
    """PEFT's config of prompt tuning. Source: peft/tuners/prompt_tuning/config.py.

    Attributes:
        prompt_tuning_init: where the rows start.
        prompt_tuning_init_text: the text, with TEXT.
        tokenizer_name_or_path: the text's tokenizer, with TEXT; loaded by `PromptEmbedding` alone.
        tokenizer_kwargs: for loading it; only with TEXT.
    """

    only_training: ClassVar[frozenset[str]] = PromptLearningConfig.only_training | {
        "num_layers",
        "num_attention_heads",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
    }

    peft_type: Literal["PROMPT_TUNING"] = "PROMPT_TUNING"
    prompt_tuning_init: Annotated[PromptTuningInit, Field(strict=False)] = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _text_fields(self) -> Self:
        from_text = self.prompt_tuning_init is PromptTuningInit.TEXT
        if from_text and not self.tokenizer_name_or_path:
            raise ValueError("prompt_tuning_init TEXT needs tokenizer_name_or_path")
        if from_text and self.prompt_tuning_init_text is None:
            raise ValueError("prompt_tuning_init TEXT needs prompt_tuning_init_text")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs belongs to prompt_tuning_init TEXT only")
        return self


class PromptEmbedding(VirtualTokens):
    """The trainable rows: indices (B, n) -> (B, n, token_dim).

    Args:
        config: with its dimensions set.
        word_embeddings: the base's token embedding; rows are copied from it with TEXT and
            SAMPLE_VOCAB.
        init_token_ids: the tokens of `prompt_tuning_init_text`, cut or repeated to n. Without them
            TEXT loads the config's tokenizer, as PEFT does, so the config must be one you trust; the
            server never makes a module from an upload's config this way.

    Attributes:
        embedding: (n, token_dim), float32.

    Raises:
        ConfigInvalid: a dimension is unset.
        ValueError: TEXT has no tokens, or its tokenizer does not load.
    """

    def __init__(
        self,
        config: PromptTuningConfig,
        word_embeddings: nn.Embedding,
        init_token_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        count = num_rows(config)
        self.embedding = nn.Embedding(count, required(config, "token_dim"))
        if config.inference_mode or config.prompt_tuning_init is PromptTuningInit.RANDOM:
            return
        device = word_embeddings.weight.device
        if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, word_embeddings.num_embeddings, (count,)).to(device)
        else:
            text = list(_text_ids(config) if init_token_ids is None else init_token_ids)
            if not text:
                raise ValueError(
                    "prompt_tuning_init TEXT: the text has no tokens, expected one at least"
                )
            ids = torch.tensor((text * -(-count // len(text)))[:count], device=device)
        rows = word_embeddings(ids).detach().to(torch.float32, copy=True)
        self.embedding.weight = nn.Parameter(rows)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices (B, n) -> rows (B, n, token_dim)."""
        rows: torch.Tensor = self.embedding(indices)
        return rows


def _text_ids(config: PromptTuningConfig) -> list[int]:
    """The tokens of the config's text by its tokenizer; code that comes with one is never run."""
    from transformers import AutoTokenizer

    options = {**(config.tokenizer_kwargs or {}), "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    except Exception as error:  # transformers and the hub client raise a dozen unrelated types
        raise ValueError(
            f"prompt_tuning_init TEXT: no tokenizer loads from {config.tokenizer_name_or_path!r} "
            f"({reason_of(error)}); pass the text's tokens as init_token_ids"
        ) from error
    ids: list[int] = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    return ids


class PromptTuning(EmbeddingRowsMethod):
    """`AdapterMethod` of prompt tuning."""

    name: ClassVar[str] = "prompt_tuning"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    config_class: ClassVar[type[PeftConfig]] = PromptTuningConfig

    def complete_config(
        self, config: PromptTuningConfig, base: BaseModelSpec
    ) -> PromptTuningConfig:
        """The config as PEFT would save it for this base. Raises as `soft_prompt.complete`."""
        return complete(config, base, embedding_dimensions(base), self.read)

    def num_trainable(self, config: PromptTuningConfig, base: BaseModelSpec) -> int:
        """n * d."""
        return num_rows(config) * base.hidden_size

    def trainable(
        self,
        config: PromptTuningConfig,
        frozen: FrozenBase,
        init_token_ids: Sequence[int] | None = None,
    ) -> TrainableRows:
        """Rows from random numbers, or from the embeddings of n tokens."""
        start = {"inference_mode": False, "prompt_tuning_init": PromptTuningInit.RANDOM}
        embedding = frozen.model.get_input_embeddings()  # type: ignore[operator]
        module = PromptEmbedding(config.model_copy(update=start), embedding)
        return trainable_soft_prompt(module, frozen, init_token_ids)


PROMPT_TUNING = PromptTuning()
