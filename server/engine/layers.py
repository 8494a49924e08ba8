"""A decoder layer of Llama and its relatives as the products and norms that it is made of.

Knows where transformers keeps them, and how layers that read one input are multiplied and scaled; nothing
of what happens between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from server.engine.packed_linear import PackedLinear
from server.engine.scales import ScaleTables


class Products:
    """Linear layers that read the same input.

    Args:
        names: their dotted paths.
        modules: as they are, or packed as one.

    Attributes:
        sizes: each layer's out_features.
        inputs: in_features of all.
        tiles: their fast path for few rows, or None.
    """

    def __init__(self, names: Sequence[str], modules: Sequence[nn.Module]) -> None:
        self.names = tuple(names)
        self._modules = tuple(modules)
        first: Any = modules[0]
        self.inputs = int(first.in_features)
        self.sizes = tuple(int(module.out_features) for module in modules)  # type: ignore[arg-type]
        pack = first.pack if isinstance(first, PackedLinear) else None
        # A pack of some of them only is left alone.
        self._pack = pack if pack is not None and tuple(pack.sizes) == self.sizes else None
        self.tiles = None if self._pack is None else self._pack.tiles

    def __call__(self, x: torch.Tensor, scales: ScaleTables) -> Sequence[torch.Tensor]:
        """x (T, in_features) -> each layer's (T, out_features), rows not always side by side.

        The input of a single layer is scaled in place: nothing else reads it.
        """
        if not scales.in_use:
            return self._plain(x)
        alone = len(self.names) == 1
        inputs = [scales.scaled_input(name, x, in_place=alone) for name in self.names]
        parts = list(self._plain(x)) if any(given is x for given in inputs) else []
        for index, given in enumerate(inputs):
            if given is not x:
                parts[index : index + 1] = [self._plain(given)[index]]
        for name, part in zip(self.names, parts, strict=True):
            scales.scale_output(name, part)
        return parts

    def _plain(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        if self._pack is not None:
            return self._pack.parts(x)
        return [functional.linear(x, m.weight, m.bias) for m in self._modules]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its norms (weight, eps), products, and what its attention needs."""

    index: int
    before: tuple[torch.Tensor, float]
    after: tuple[torch.Tensor, float]
    qkv: Products
    output: Products
    gate_up: Products
    down: Products
    head_dim: int
    scale: float
    window: int | None
    query_norm: tuple[torch.Tensor, float] | None
    key_norm: tuple[torch.Tensor, float] | None

    @property
    def products(self) -> tuple[Products, ...]:
        """All of its products."""
        return self.qkv, self.output, self.gate_up, self.down


def layer_of(module: Any, names: dict[int, str]) -> Layer:
    """A decoder layer of Llama or a relative; `names` has the dotted path of each module by its id."""
    attention, mlp = module.self_attn, module.mlp

    def products(*modules: nn.Module) -> Products:
        return Products([names[id(part)] for part in modules], modules)

    # Mistral's has the window in its config, the others as an attribute; Llama's has none.
    window = getattr(attention, "sliding_window", None)
    if type(attention).__name__ == "MistralAttention":
        window = getattr(attention.config, "sliding_window", None)
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        index=attention.layer_idx,
        before=norm_of(module.input_layernorm),
        after=norm_of(module.post_attention_layernorm),
        qkv=products(attention.q_proj, attention.k_proj, attention.v_proj),
        output=products(attention.o_proj),
        gate_up=products(mlp.gate_proj, mlp.up_proj),
        down=products(mlp.down_proj),
        head_dim=attention.head_dim,
        scale=attention.scaling,
        window=window,
        query_norm=None if query_norm is None else norm_of(query_norm),
        key_norm=None if key_norm is None else norm_of(key_norm),
    )


def norm_of(module: Any) -> tuple[torch.Tensor, float]:
    """Weight (d,) and eps of an RMSNorm."""
    return module.weight, module.variance_epsilon
