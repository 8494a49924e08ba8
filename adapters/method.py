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
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


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

    def complete_config(self, config: ConfigT_contra, base: BaseModelSpec) -> PeftConfig:
        """The config as PEFT would save it for this base, with every field set.

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
    """Validate `adapter_config.json` of one method, naming the field that is wrong.

    Raises:
        ConfigInvalid: with the field, the expected and the actual value.
    """
    try:
        return config_class.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        came = repr(first.get("input"))[:80]
        raise ConfigInvalid(
            f"adapter_config.json: {field}: {first['msg']} (came: {came})",
            field=field,
            expected=str(first["msg"]),
            came=came,
        ) from error
