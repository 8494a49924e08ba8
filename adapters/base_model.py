"""Description of the base model for methods, as plain numbers and names.

`BaseModelSpec`, and `describe`, which derives one from a loaded causal language model. Independent of
adapters, checkpoints and serving; all values can cross a process boundary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from adapters.errors import BaseUnsupported

if TYPE_CHECKING:
    from torch import nn

ModuleKind = Literal["linear", "conv1d"]
KVWidth = Literal["config", "ratio", "given"]


@dataclass(frozen=True)
class LinearSpec:
    """A linear module of the base.

    `kind` is "conv1d" for GPT-2's transposed `Conv1D` (weight stored (in, out)).
    """

    kind: ModuleKind
    in_features: int
    out_features: int


@dataclass(frozen=True)
class BaseModelSpec:
    """Dimensions and linear modules of one frozen base model.

    Attributes:
        model_type: `config.model_type` of transformers, such as "llama".
        digest: sha256 over the weights and the config (hex); identifies the base, its name does not.
        dtype: the dtype it is served in, such as "bfloat16".
        num_layers: L, decoder layers.
        hidden_size: d, width of a token embedding (PEFT's `token_dim`).
        num_attention_heads: H, query heads.
        num_kv_heads: H_kv, key/value heads.
        head_dim: D.
        vocab_size: rows of the embedding table.
        max_positions: positions that the base supports, virtual tokens included.
        linear_modules: dotted module path -> LinearSpec, in module order, output head left out.
        kv_width: where PEFT takes the width of a prefix's keys from: the base's "config" alone; the
            "ratio" of the adapter's `token_dim` and `num_attention_heads`, which is the width of a head;
            or the two numbers as "given". Source: peft/utils/other.py, `_prepare_prompt_learning_config`.
    """

    model_type: str
    digest: str
    dtype: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    linear_modules: dict[str, LinearSpec]
    kv_width: KVWidth = "given"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BaseModelSpec:
        """Rebuild from `to_dict`'s form."""
        modules = {name: LinearSpec(**spec) for name, spec in data["linear_modules"].items()}
        return cls(**{**data, "linear_modules": modules})


def describe(model: nn.Module, *, digest: str, dtype: str) -> BaseModelSpec:
    """Derive the spec from a transformers causal language model.

    Args:
        model: a `PreTrainedModel` with a language modelling head (a meta-device model will do).
        digest: see `BaseModelSpec.digest`.
        dtype: see `BaseModelSpec.dtype`.

    Raises:
        BaseUnsupported: the config lacks a number that serving needs.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    hidden_size = _number(config, "hidden_size", "n_embd", "d_model")
    heads = _number(config, "num_attention_heads", "n_head")
    head_dim = getattr(config, "head_dim", None) or hidden_size // heads
    return BaseModelSpec(
        model_type=str(config.model_type),
        digest=digest,
        dtype=dtype,
        num_layers=_number(config, "num_hidden_layers", "n_layer"),
        hidden_size=_embedding_width(model),
        num_attention_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab_size=_number(config, "vocab_size"),
        max_positions=_max_positions(config),
        linear_modules=_linear_modules(model),
        kv_width=_kv_width(config),
    )


def _number(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise BaseUnsupported(
        f"the base's config ({config.model_type}) has none of {', '.join(names)}; "
        "a decoder-only transformer is expected",
        field=names[0],
    )


def _kv_width(config: Any) -> KVWidth:
    """What PEFT finds in the config as a plain object, where attributes computed on the way are missing."""
    written: dict[str, Any] = config.to_dict()
    if written.get("num_key_value_heads") is None:
        return "given"
    return "ratio" if written.get("head_dim") is None else "config"


def _max_positions(config: Any) -> int:
    """Positions the base can take; 2**31 - 1 where it has no limit of its own (ALiBi)."""
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2**31 - 1


def _embedding_width(model: nn.Module) -> int:
    # OPT-350m embeds in a narrower space than its hidden size: virtual tokens live in that one.
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return int(weight.shape[1])


def _linear_modules(model: nn.Module) -> dict[str, LinearSpec]:
    from torch import nn as torch_nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    found: dict[str, LinearSpec] = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch_nn.Linear):
            found[name] = LinearSpec("linear", module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            found[name] = LinearSpec("conv1d", int(rows), int(columns))
    return found
