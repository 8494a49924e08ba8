"""Shared code of the virtual-token methods: bounds, dimensions, and the one tensor they save.

Prefix tuning, P-tuning, CPT and prompt tuning all save one matrix `prompt_embeddings`, a row for
each virtual token. This file checks it, turns embedding rows into a `SoftPrompt`, and computes the
rows of a trained module. It uses only the shared config.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, TypeVar

import torch
from torch import nn

from adapters.base_model import BaseModelSpec
from adapters.checks import (
    check_dtypes,
    check_modules_to_save,
    check_names,
    check_shape,
    check_task_type,
    to_float32,
)
from adapters.errors import ConfigInvalid, MethodUnsupported, TensorMismatch
from adapters.method import AdapterFacts, PromptLearningConfig, TensorInfo
from adapters.parts import SoftPrompt

ROWS = "prompt_embeddings"

_OTHER_BASE = "the adapter was trained on another base model"
_SET_IT = (
    "the tensors fit, but PEFT builds their place from this number and fails to load them; "
    "set it in adapter_config.json, or to null"
)
_LEAVE_IT_OUT = "give that number, or leave the field out"

PromptConfigT = TypeVar("PromptConfigT", bound=PromptLearningConfig)


class VirtualTokens(nn.Module):
    """Base of the trainable modules of virtual tokens.

    Called with token indices (B, n) of 0..n-1, a subclass returns (B, n, width).

    Attributes:
        embedding: one row per virtual token; the subclass defines the meaning of the rows.
    """

    embedding: nn.Embedding

    def rows(self) -> torch.Tensor:
        """The rows to save, (n, width), computed in eval mode without gradients."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                indices = torch.arange(
                    self.embedding.num_embeddings, device=self.embedding.weight.device
                )
                rows: torch.Tensor = self(indices.unsqueeze(0))[0]
        finally:
            self.train(was_training)
        return rows

    def is_reparameterised(self) -> bool:
        """True where a network computes the rows, so that saved rows cannot be loaded back."""
        return False

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Load saved rows (n, width).

        Raises:
            ValueError: the rows are computed by a network, or have another shape.
        """
        if self.is_reparameterised():
            raise ValueError(
                "saved rows cannot be loaded here: a network computes them, and it is not saved"
            )
        want = tuple(self.embedding.weight.shape)
        if tuple(prompt_embeddings.shape) != want:
            raise ValueError(
                f"prompt_embeddings have shape {tuple(prompt_embeddings.shape)}, expected {want}"
            )
        with torch.no_grad():
            self.embedding.weight.copy_(prompt_embeddings)


def required(config: PromptLearningConfig, name: str) -> int:
    """The value of a whole-number field that a module cannot be built without.

    Raises:
        ConfigInvalid: unset or below 1.
    """
    value = getattr(config, name)
    if value is None or value < 1:
        came = "unset" if value is None else str(value)
        raise ConfigInvalid(
            f"{name} is {came}, expected a whole number of at least 1",
            field=name,
            expected="a whole number of at least 1",
            came=came,
        )
    return int(value)


def num_rows(config: PromptLearningConfig) -> int:
    """Rows of the matrix: `num_virtual_tokens`, twice that for an encoder-decoder."""
    return required(config, "num_virtual_tokens") * (config.num_transformer_submodules or 1)


def check_num_virtual_tokens(config: PromptLearningConfig, base: BaseModelSpec) -> int:
    """The number of virtual tokens, at least 1 and below the base's positions.

    Raises:
        ConfigInvalid: outside those bounds.
    """
    count = required(config, "num_virtual_tokens")
    if count >= base.max_positions:
        limit = base.max_positions - 1
        raise ConfigInvalid(
            f"num_virtual_tokens is {count}, but the base has {base.max_positions} positions and "
            f"the prompt needs one: expected at most {limit}",
            field="num_virtual_tokens",
            expected=f"1 to {limit}",
            came=str(count),
        )
    return count


def check_dimensions(
    config: PromptLearningConfig, wanted: Mapping[str, int], *, otherwise: str
) -> None:
    """Check the dimensions from which PEFT builds the rows; unset ones are the base's.

    Args:
        config: the config.
        wanted: field -> its value on this base.
        otherwise: what follows from another value, for the message.

    Raises:
        TensorMismatch: one differs.
    """
    for name, want in wanted.items():
        came = getattr(config, name)
        if came is not None and came != want:
            raise TensorMismatch(
                f"{name} is {came}, but this base needs {want}: {otherwise}",
                field=name,
                expected=str(want),
                came=str(came),
            )


def stale_dimensions(
    config: PromptLearningConfig, dimensions: Mapping[str, int], why: str
) -> tuple[str, ...]:
    """A warning for each dimension that is not the base's, where PEFT does not use it.

    Args:
        config: the config.
        dimensions: field -> its value on this base.
        why: the reason for which the value has no effect.
    """
    stated = {name: getattr(config, name) for name in dimensions}
    return tuple(
        f"{name} is {came}, this base has {dimensions[name]}: ignored, because {why}"
        for name, came in stated.items()
        if came is not None and came != dimensions[name]
    )


def only(dimensions: Mapping[str, int], names: Collection[str]) -> dict[str, int]:
    """The dimensions of these names."""
    return {name: value for name, value in dimensions.items() if name in names}


def check_rows(
    config: PromptLearningConfig,
    tensors: Mapping[str, TensorInfo],
    base: BaseModelSpec,
    *,
    dimensions: Mapping[str, int],
    width: int,
    why: str,
    warnings: tuple[str, ...] = (),
) -> AdapterFacts:
    """The complete check of a virtual-token method.

    Args:
        config: parsed config.
        tensors: the safetensors header.
        base: the base to serve it on.
        dimensions: config field -> its value on this base, of those from which PEFT builds the rows.
        width: columns of `prompt_embeddings`.
        why: where the width comes from, for the message.
        warnings: for the uploader.

    Raises:
        MethodUnsupported: the task type, `modules_to_save` or an encoder-decoder's rows.
        ConfigInvalid: `num_virtual_tokens` out of bounds.
        TensorMismatch: dimensions, names, dtype or shape.
    """
    check_task_type(config)
    check_modules_to_save(config.modules_to_save)
    if config.num_transformer_submodules not in (None, 1):
        raise MethodUnsupported(
            f"num_transformer_submodules is {config.num_transformer_submodules}: "
            "it belongs to encoder-decoders, and only decoder-only bases are served (expected 1)",
            field="num_transformer_submodules",
            expected="1",
            came=str(config.num_transformer_submodules),
        )
    count = check_num_virtual_tokens(config, base)
    fits = ROWS in tensors and tensors[ROWS].shape == (count, width)
    check_dimensions(config, dimensions, otherwise=_SET_IT if fits else _OTHER_BASE)
    check_names(tensors, [ROWS])
    check_dtypes(tensors)
    check_shape(ROWS, tensors[ROWS], (count, width), f"num_virtual_tokens, {why}")
    return AdapterFacts(num_virtual_tokens=count, uses_scales=False, warnings=warnings)


def embedding_dimensions(base: BaseModelSpec) -> dict[str, int]:
    """The dimensions that a method of embedding rows records for this base."""
    return {
        "num_layers": base.num_layers,
        "token_dim": base.hidden_size,
        "num_attention_heads": base.num_attention_heads,
    }


def export_rows(module: nn.Module) -> dict[str, torch.Tensor]:
    """The checkpoint of a `VirtualTokens` module: its rows as it would use them at inference.

    Raises:
        TypeError: another kind of module.
        NonFinite: training has diverged.
    """
    if not isinstance(module, VirtualTokens):
        raise TypeError(f"expected a module of virtual tokens, came {type(module).__name__}")
    return {ROWS: to_float32(ROWS, module.rows())}


def complete(
    config: PromptConfigT, base: BaseModelSpec, dimensions: Mapping[str, int], read: Collection[str]
) -> PromptConfigT:
    """A copy of the config with every dimension set from the base, as PEFT sets them.

    Source: peft/utils/other.py, `_prepare_prompt_learning_config`.

    Args:
        config: the config.
        base: the base.
        dimensions: config field -> its value on this base.
        read: those of them that PEFT uses as they are given; others are replaced.

    Raises:
        ConfigInvalid: `num_virtual_tokens` is unset or out of bounds.
        TensorMismatch: a dimension that PEFT uses is set already and is not the base's.
    """
    check_num_virtual_tokens(config, base)
    used = {**only(dimensions, read), "num_transformer_submodules": 1}
    check_dimensions(config, used, otherwise=_LEAVE_IT_OUT)
    return config.model_copy(update={**dimensions, "num_transformer_submodules": 1})


def in_training(config: PromptConfigT) -> PromptConfigT:
    """The config of a module that is to be trained: `inference_mode` builds what a checkpoint holds."""
    return config.model_copy(update={"inference_mode": False})


class EmbeddingRowsMethod:
    """What the methods whose rows are embeddings share of `AdapterMethod`.

    Attributes:
        read: the dimensions in a config that PEFT uses; it never looks at the others.
    """

    read: ClassVar[frozenset[str]] = frozenset({"token_dim"})

    def stale(self, config: PromptLearningConfig, base: BaseModelSpec) -> tuple[str, ...]:
        """See `AdapterMethod.stale`: PEFT reads the layers and heads for prefixes only."""
        every = embedding_dimensions(base)
        return stale_dimensions(
            config, only(every, every.keys() - self.read), "PEFT does not read it for this method"
        )

    def check(
        self, config: PromptLearningConfig, tensors: Mapping[str, TensorInfo], base: BaseModelSpec
    ) -> AdapterFacts:
        """`check_rows` for rows of embeddings, (n, d)."""
        return check_rows(
            config,
            tensors,
            base,
            dimensions=only(embedding_dimensions(base), self.read),
            width=base.hidden_size,
            why="the width of the base's embeddings",
            warnings=self.stale(config, base),
        )

    def serving_form(
        self, config: PromptLearningConfig, tensors: Mapping[str, torch.Tensor], base: BaseModelSpec
    ) -> SoftPrompt:
        """The saved rows (n, d), float32; they include what a network or a delta contributed.

        Raises:
            TensorMismatch: another width than the base's embeddings.
            NonFinite: NaN or infinity among the rows.
        """
        form = SoftPrompt(to_float32(ROWS, tensors[ROWS]))
        form.check(base)
        return form

    def export(self, module: nn.Module, config: PromptLearningConfig) -> dict[str, torch.Tensor]:
        """The checkpoint of the module, see `export_rows`."""
        return export_rows(module)
