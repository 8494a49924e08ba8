"""The interface that every method implements, and the config fields that all methods share.

A method is one file in `adapters/methods/`, read top to bottom: its config, its trainable module,
its checkpoint mapping in both directions, its serving form. This file is independent of all methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from pydantic import ConfigDict, ValidationError

from adapters.base_model import BaseModelSpec
from adapters.errors import ConfigInvalid
from adapters.field_errors import explain
from adapters.parts import ServingForm
from adapters.python_config import PythonConfig
from adapters.trainable import FrozenBase, Trainable

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header: no bytes were read yet.

    `dtype` is the header's own name, such as "F32" or "BF16".
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFacts:
    """Facts that serving needs about a checked adapter before its bytes are read.

    Attributes:
        num_virtual_tokens: positions taken before the prompt.
        uses_scales: True where the serving form is `ActivationScales`.
        warnings: sentences for the uploader.
    """

    num_virtual_tokens: int
    uses_scales: bool
    warnings: tuple[str, ...] = ()


class PeftConfig(PythonConfig):
    """Fields that every method's `adapter_config.json` has, with PEFT's names and defaults.

    Source: peft/config.py, `PeftConfigMixin` and `PeftConfig`.

    Attributes:
        only_training: fields that PEFT never reads when it loads an adapter, so that a checkpoint may
            say anything in them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    only_training: ClassVar[frozenset[str]] = frozenset(
        {"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    )

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def check_peft_loads(self) -> None:
        """Check a config that is uploaded for what PEFT would fail on, or not apply.

        Raises:
            CheckpointError: the field, and what to write instead.
        """


class PromptLearningConfig(PeftConfig):
    """Fields of the virtual-token methods. Source: peft/config.py, `PromptLearningConfig`."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        """True."""
        return True

    def check_peft_loads(self) -> None:
        """PEFT applies virtual tokens by task: without one it answers with the base alone.

        Raises:
            ConfigInvalid: no task.
        """
        if self.task_type is None:
            raise ConfigInvalid(
                f"task_type is unset: PEFT then leaves the virtual tokens of {self.peft_type} out and "
                'answers with the base alone; expected "CAUSAL_LM", if that is what it was trained for',
                field="task_type",
                expected='"CAUSAL_LM"',
                came="unset",
            )


ConfigT = TypeVar("ConfigT", bound=PeftConfig)
ConfigT_contra = TypeVar("ConfigT_contra", bound=PeftConfig, contravariant=True)


class AdapterMethod(Protocol[ConfigT_contra]):
    """One kind of PEFT, stateless.

    Attributes:
        name: the name of this method in URLs and recipes, such as "prefix_tuning".
        peft_type: PEFT's name for it, such as "PREFIX_TUNING".
        config_class: its strict config.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str]
    config_class: ClassVar[type[PeftConfig]]

    def check(
        self, config: ConfigT_contra, tensors: Mapping[str, TensorInfo], base: BaseModelSpec
    ) -> AdapterFacts:
        """Check names, dtypes and shapes against the config and the base; allocates nothing.

        Raises:
            TensorMismatch: a tensor is missing, left over, or of another shape.
            TargetNotFound: an IA3 target that matches no module.
            MethodUnsupported: an option that is not served (such as `modules_to_save`).
        """
        ...

    def serving_form(
        self, config: ConfigT_contra, tensors: Mapping[str, torch.Tensor], base: BaseModelSpec
    ) -> ServingForm:
        """Turn a checked checkpoint's tensors into the serving form, float32 on the CPU."""
        ...

    def export(self, module: nn.Module, config: ConfigT_contra) -> dict[str, torch.Tensor]:
        """The checkpoint tensors (PEFT's names, float32, contiguous) of a trained module."""
        ...

    def stale(self, config: ConfigT_contra, base: BaseModelSpec) -> tuple[str, ...]:
        """A sentence for each dimension in the config that is not the base's and has no effect in PEFT."""
        ...

    def complete_config(self, config: ConfigT_contra, base: BaseModelSpec) -> PeftConfig:
        """The config as PEFT would save it for this base, with every field set; `stale` ones are replaced.

        Raises:
            ConfigInvalid, TensorMismatch, TargetNotFound: a field does not fit the base.
        """
        ...

    def num_trainable(self, config: ConfigT_contra, base: BaseModelSpec) -> int:
        """Number of trained parameters, an encoder's included; for a complete config."""
        ...

    def trainable(
        self,
        config: ConfigT_contra,
        frozen: FrozenBase,
        init_token_ids: Sequence[int] | None = None,
    ) -> Trainable:
        """The initialised adapter, attached to the base for training.

        Draws from torch's global generator.

        Args:
            config: complete.
            frozen: the base.
            init_token_ids: one per virtual token: initialise from the base's embeddings or keys and
                values of these tokens instead of at random.

        Raises:
            ValueError: the method cannot start from tokens.
        """
        ...


def parse_config(config_class: type[ConfigT], raw: Mapping[str, Any]) -> ConfigT:
    """Validate the fields of one method's config, naming the one that is wrong. A null is the default.

    Raises:
        ConfigInvalid: with the field, the expected and the actual value.
    """
    try:
        return config_class.model_validate(without_nulls(raw))
    except ValidationError as error:
        raise config_refused(config_class, error) from error


def without_nulls(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: PEFT writes a null for each that is unset."""
    return {name: value for name, value in raw.items() if value is not None}


def config_refused(config_class: type[PeftConfig], error: ValidationError) -> ConfigInvalid:
    """The refusal of the fields that are wrong, in plain words."""
    faults = error.errors(include_url=False)
    if not faults[0]["loc"]:  # two fields that disagree: the message is a sentence of the config's
        return ConfigInvalid(f"adapter_config.json: {faults[0]['ctx']['error']}")
    found = explain(faults, config_class)
    return ConfigInvalid(
        f"adapter_config.json: {found.message}",
        field=found.field,
        expected=found.expected,
        came=found.came,
    )
