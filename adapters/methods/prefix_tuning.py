"""Prefix tuning: trained keys and values of every layer, prepended to the sequence's own.

P-Tuning v2 is the same on disk and at inference. Papers: Li and Liang 2021, arXiv 2101.00190;
Liu et al. 2021, arXiv 2110.07602. Parity source: peft/tuners/prefix_tuning. Independent of other methods,
files and the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from adapters.base_model import BaseModelSpec
from adapters.checks import to_float32
from adapters.errors import TensorMismatch
from adapters.method import AdapterFacts, PeftConfig, PromptLearningConfig, TensorInfo
from adapters.methods.soft_prompt import (
    ROWS,
    VirtualTokens,
    check_rows,
    complete,
    export_rows,
    in_training,
    only,
    required,
    stale_dimensions,
)
from adapters.methods.trainable_rows import TrainableRows, count_parameters
from adapters.parts import KVPrefix
from adapters.trainable import FrozenBase


class PrefixTuningConfig(PromptLearningConfig):
    """PEFT's config of prefix tuning. Source: peft/tuners/prefix_tuning/config.py.

    On a base with grouped-query attention PEFT stores the width of the keys, H_kv * D, as
    `token_dim` and H_kv as `num_attention_heads`.

    Attributes:
        init_weights: None for random rows, "zero" for keys and values of zero.
        encoder_hidden_size: width of the projection's hidden layer; `token_dim` if unset.
        prefix_projection: train the rows through a two-layer network.
    """

    only_training: ClassVar[frozenset[str]] = PromptLearningConfig.only_training | {
        "init_weights",
        "encoder_hidden_size",
        "prefix_projection",
    }

    peft_type: Literal["PREFIX_TUNING"] = "PREFIX_TUNING"
    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


class PrefixEncoder(VirtualTokens):
    """The trainable prefix: indices (B, n) -> (B, n, L * 2 * d_kv), d_kv being `token_dim`.

    With projection the rows are Embedding(n, d_kv) -> Linear -> Tanh -> Linear; a config in
    inference mode holds the network's output instead, as a checkpoint does.

    Attributes:
        embedding: (n, L * 2 * d_kv), with projection (n, d_kv).
        transform: the projection; absent without it.
        prefix_projection: the config's field.

    Raises:
        ConfigInvalid: a dimension is unset.
    """

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        self.prefix_projection = config.prefix_projection
        count = required(config, "num_virtual_tokens")
        token_dim = required(config, "token_dim")
        width = required(config, "num_layers") * 2 * token_dim
        self.transform: nn.Sequential | None = None
        if config.prefix_projection and not config.inference_mode:
            hidden = config.encoder_hidden_size or token_dim
            self.embedding = nn.Embedding(count, token_dim)
            first, last = nn.Linear(token_dim, hidden), nn.Linear(hidden, width)
            self.transform = nn.Sequential(first, nn.Tanh(), last)
            zeroed = [last.weight, last.bias]
        else:
            self.embedding = nn.Embedding(count, width)
            zeroed = [self.embedding.weight]
        if config.init_weights == "zero":
            for parameter in zeroed:
                nn.init.zeros_(parameter)

    def is_reparameterised(self) -> bool:
        """True with a projection that is being trained."""
        return self.transform is not None

    def forward(self, prefix: torch.Tensor) -> torch.Tensor:
        """Indices (B, n) -> keys and values in a row, (B, n, L * 2 * d_kv)."""
        rows: torch.Tensor = self.embedding(prefix)
        return rows if self.transform is None else self.transform(rows)


def split_rows(rows: torch.Tensor, base: BaseModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, L * 2 * H_kv * D) as keys and values, each (L, H_kv, n, D).

    A row holds, layer by layer, the layer's key and then its value. Differentiable, so that
    training uses it as well. Source: peft/peft_model.py, `PeftModel.get_prompt`.
    """
    stacked = rows.view(rows.shape[0], base.num_layers, 2, base.num_kv_heads, base.head_dim)
    by_kind = stacked.permute(2, 1, 3, 0, 4)  # (2, L, H_kv, n, D)
    return by_kind[0].contiguous(), by_kind[1].contiguous()


def join_rows(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Keys and values, each (L, H_kv, n, D), as rows (n, L * 2 * H_kv * D); inverts `split_rows`."""
    by_kind = torch.stack((keys, values))  # (2, L, H_kv, n, D)
    return by_kind.permute(3, 1, 0, 2, 4).flatten(1)


def prompt_embeddings_from_past_key_values(
    past_key_values: Any, *, num_virtual_tokens: int
) -> torch.Tensor:
    """The first n keys and values of a cache as the rows that a prefix saves, (n, L * 2 * H_kv * D).

    Source: peft/tuners/cartridge/utils.py.

    Args:
        past_key_values: transformers' cache, or keys and values by layer, each (1, H_kv, T, D).
        num_virtual_tokens: n, at most T.

    Raises:
        ValueError: no layer, more than one sequence, fewer than n positions, or layers that differ.
        TypeError: another kind of object.
    """
    layers = _layers_of(past_key_values)
    if not layers:
        raise ValueError("past_key_values hold no layer, expected those of a model's pass")
    shapes = {tuple(part.shape) for layer in layers for part in layer}
    if len(shapes) > 1:
        raise ValueError(
            f"keys and values differ in shape: {sorted(shapes)}; expected one for all layers"
        )
    (shape,) = shapes
    if len(shape) != 4 or shape[0] != 1:
        raise ValueError(f"keys have shape {shape}, expected (1, heads, positions, head size)")
    if shape[2] < num_virtual_tokens:
        raise ValueError(
            f"expected at least {num_virtual_tokens} cached positions, came {shape[2]}"
        )
    keys, values = (
        torch.stack([layer[part][0, :, :num_virtual_tokens] for layer in layers]) for part in (0, 1)
    )
    return join_rows(keys, values)


def _layers_of(past_key_values: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Key and value of every layer; transformers' cache yields them, with more behind."""
    try:
        return [(layer[0], layer[1]) for layer in past_key_values]
    except (TypeError, IndexError) as error:
        raise TypeError(
            f"past_key_values are {type(past_key_values).__name__}, expected a cache of transformers, or "
            "a key and a value for each layer"
        ) from error


def _dimensions(base: BaseModelSpec) -> dict[str, int]:
    return {
        "num_layers": base.num_layers,
        "token_dim": base.num_kv_heads * base.head_dim,
        "num_attention_heads": base.num_kv_heads,
    }


def _read(config: PrefixTuningConfig, base: BaseModelSpec) -> frozenset[str]:
    """The dimensions in a config that PEFT uses as they are given.

    With grouped queries PEFT computes `token_dim` and `num_attention_heads` again, from the base alone
    or, where the base's config has no `head_dim`, from their ratio.

    Raises:
        TensorMismatch: the ratio is not the width of the base's heads.
    """
    if base.kv_width == "given":
        return frozenset(_dimensions(base))
    if base.kv_width == "ratio":
        _check_ratio(config, base)
    return frozenset({"num_layers"})


def _check_ratio(config: PrefixTuningConfig, base: BaseModelSpec) -> None:
    heads = config.num_attention_heads
    heads = base.num_attention_heads if heads is None else heads
    token_dim = config.token_dim
    token_dim = base.num_attention_heads * base.head_dim if token_dim is None else token_dim
    if heads > 0 and token_dim // heads == base.head_dim:
        return
    reduced, full = base.num_kv_heads, base.num_attention_heads
    expected = (
        f"{reduced * base.head_dim} and {reduced}, {full * base.head_dim} and {full}, or both null"
    )
    raise TensorMismatch(
        f"token_dim is {_shown(config.token_dim, token_dim)} and num_attention_heads "
        f"{_shown(config.num_attention_heads, heads)}: PEFT takes the one divided by the other for the "
        f"width of a head, which is {base.head_dim} in this base; expected {expected}",
        field="token_dim",
        expected=expected,
        came=f"{token_dim} and {heads}",
    )


def _shown(given: int | None, used: int) -> str:
    return str(used) if given is not None else f"{used} (the base's, as it is unset)"


class PrefixTuning:
    """`AdapterMethod` of prefix tuning."""

    name: ClassVar[str] = "prefix_tuning"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    config_class: ClassVar[type[PeftConfig]] = PrefixTuningConfig

    def stale(self, config: PrefixTuningConfig, base: BaseModelSpec) -> tuple[str, ...]:
        """See `AdapterMethod.stale`: with grouped queries PEFT computes heads and width again."""
        every = _dimensions(base)
        return stale_dimensions(
            config,
            only(every, every.keys() - _read(config, base)),
            "PEFT computes it again from the base's key/value heads",
        )

    def check(
        self, config: PrefixTuningConfig, tensors: Mapping[str, TensorInfo], base: BaseModelSpec
    ) -> AdapterFacts:
        """Check the checkpoint's (n, L * 2 * H_kv * D) matrix with `soft_prompt.check_rows`."""
        return check_rows(
            config,
            tensors,
            base,
            dimensions=only(_dimensions(base), _read(config, base)),
            width=base.num_layers * 2 * base.num_kv_heads * base.head_dim,
            why="layers * 2 * key/value heads * head dim of the base",
            warnings=self.stale(config, base),
        )

    def serving_form(
        self, config: PrefixTuningConfig, tensors: Mapping[str, torch.Tensor], base: BaseModelSpec
    ) -> KVPrefix:
        """Keys and values (L, H_kv, n, D), float32; they are past RoPE and never rotated.

        Raises:
            NonFinite: NaN or infinity among the values.
        """
        keys, values = split_rows(to_float32(ROWS, tensors[ROWS]), base)
        form = KVPrefix(keys, values)
        form.check(base)
        return form

    def export(self, module: nn.Module, config: PrefixTuningConfig) -> dict[str, torch.Tensor]:
        """The checkpoint, by `soft_prompt.export_rows`: the projection's output, not the projection."""
        return export_rows(module)

    def complete_config(
        self, config: PrefixTuningConfig, base: BaseModelSpec
    ) -> PrefixTuningConfig:
        """The config as PEFT would save it for this base. Raises as `soft_prompt.complete`."""
        full = complete(config, base, _dimensions(base), _read(config, base))
        hidden = full.encoder_hidden_size or full.token_dim
        return full.model_copy(update={"encoder_hidden_size": hidden})

    def num_trainable(self, config: PrefixTuningConfig, base: BaseModelSpec) -> int:
        """Parameters of the rows, or with projection those of its network."""
        return count_parameters(lambda: PrefixEncoder(in_training(config)))

    def trainable(
        self,
        config: PrefixTuningConfig,
        frozen: FrozenBase,
        init_token_ids: Sequence[int] | None = None,
    ) -> TrainableRows:
        """Random keys and values, or, without projection, the base's own keys and values of n tokens.

        The keys of a text are computed at positions 0 to n - 1: a short text is repeated before the base
        processes it; its keys are never tiled.
        """
        module = PrefixEncoder(in_training(config))
        if init_token_ids is not None:
            form = frozen.keys_values(init_token_ids)
            module.load_prompt_embeddings(join_rows(form.keys, form.values))
        module.to(frozen.model.get_input_embeddings().weight.device)  # type: ignore[operator]
        return TrainableRows(module, lambda rows: KVPrefix(*split_rows(rows, frozen.spec)))


PREFIX_TUNING = PrefixTuning()
