"""P-tuning: trained embedding rows before the input, computed by a small network while training.

Paper: Liu et al. 2021, arXiv 2103.10385. Parity source: peft/tuners/p_tuning. The network is not
saved; a checkpoint holds the rows that it computes. Independent of other methods, files and the engine.
"""

from __future__ import annotations

import enum
import itertools
import warnings
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from adapters.base_model import BaseModelSpec
from adapters.method import PeftConfig, PromptLearningConfig
from adapters.methods.soft_prompt import (
    EmbeddingRowsMethod,
    VirtualTokens,
    complete,
    embedding_dimensions,
    in_training,
    num_rows,
    required,
)
from adapters.methods.trainable_rows import TrainableRows, count_parameters, trainable_soft_prompt
from adapters.trainable import FrozenBase

MLP_NUM_LAYERS = 2


class PromptEncoderReparameterizationType(enum.StrEnum):
    """The network that computes the rows."""

    MLP = "MLP"
    LSTM = "LSTM"


class PromptEncoderConfig(PromptLearningConfig):
    """PEFT's config of P-tuning. Source: peft/tuners/p_tuning/config.py.

    Attributes:
        encoder_reparameterization_type: the network, MLP or LSTM.
        encoder_hidden_size: its hidden width; `token_dim` if unset.
        encoder_num_layers: layers of the LSTM; the MLP's are fixed.
        encoder_dropout: dropout between the LSTM's layers; the MLP has none.
    """

    only_training: ClassVar[frozenset[str]] = PromptLearningConfig.only_training | {
        "num_layers",
        "num_attention_heads",
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    }

    peft_type: Literal["P_TUNING"] = "P_TUNING"
    encoder_reparameterization_type: Annotated[
        PromptEncoderReparameterizationType, Field(strict=False)
    ] = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = Field(default=0.0, ge=0.0, le=1.0)


class PromptEncoder(VirtualTokens):
    """The trainable rows: indices (B, n) -> (B, n, token_dim).

    A config in inference mode builds no network: the embedding then holds the computed rows.

    Attributes:
        embedding: (n, token_dim), the network's input.
        mlp_head: three linear layers with ReLU, or two after the LSTM; absent in inference mode.
        lstm_head: bidirectional, `encoder_hidden_size` wide; only with LSTM.
        token_dim: width of the base's embeddings.
        input_size: equal to `token_dim`.
        output_size: equal to `token_dim`.
        hidden_size: `encoder_hidden_size`.
        total_virtual_tokens: rows.
        encoder_type: the network.

    Raises:
        ConfigInvalid: a dimension is unset.
    """

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        self.token_dim = required(config, "token_dim")
        self.input_size = self.token_dim
        self.output_size = self.token_dim
        self.hidden_size = config.encoder_hidden_size or self.token_dim
        self.total_virtual_tokens = num_rows(config)
        self.encoder_type = config.encoder_reparameterization_type
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None = None
        if config.inference_mode:
            return
        if self.encoder_type is PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                input_size=self.input_size,
                hidden_size=self.hidden_size,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = _mlp(2 * self.hidden_size, 2 * self.hidden_size, self.output_size)
        else:
            if config.encoder_num_layers != MLP_NUM_LAYERS:
                warnings.warn(
                    f"encoder_num_layers={config.encoder_num_layers} changes nothing for MLP; "
                    "it sets the layers of an LSTM",
                    stacklevel=2,
                )
            hidden = self.hidden_size
            self.mlp_head = _mlp(self.input_size, hidden, hidden, self.output_size)

    def is_reparameterised(self) -> bool:
        """True while the network exists."""
        return self.mlp_head is not None

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices (B, n) -> rows (B, n, token_dim)."""
        rows: torch.Tensor = self.embedding(indices)
        if self.lstm_head is not None:
            rows = self.lstm_head(rows)[0]  # (B, n, 2 * hidden)
        return rows if self.mlp_head is None else self.mlp_head(rows)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class PTuning(EmbeddingRowsMethod):
    """`AdapterMethod` of P-tuning."""

    name: ClassVar[str] = "p_tuning"
    peft_type: ClassVar[str] = "P_TUNING"
    config_class: ClassVar[type[PeftConfig]] = PromptEncoderConfig

    def complete_config(
        self, config: PromptEncoderConfig, base: BaseModelSpec
    ) -> PromptEncoderConfig:
        """The config as PEFT would save it for this base. Raises as `soft_prompt.complete`."""
        full = complete(config, base, embedding_dimensions(base), self.read)
        hidden = full.encoder_hidden_size or full.token_dim
        return full.model_copy(update={"encoder_hidden_size": hidden})

    def num_trainable(self, config: PromptEncoderConfig, base: BaseModelSpec) -> int:
        """The embedding and the network, which is not saved."""
        return count_parameters(lambda: PromptEncoder(in_training(config)))

    def trainable(
        self,
        config: PromptEncoderConfig,
        frozen: FrozenBase,
        init_token_ids: Sequence[int] | None = None,
    ) -> TrainableRows:
        """Rows that the network computes; it cannot start from tokens."""
        return trainable_soft_prompt(PromptEncoder(in_training(config)), frozen, init_token_ids)


P_TUNING = PTuning()
