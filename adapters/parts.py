"""Serving forms: an adapter as the engine consumes it.

Three frozen, shape-checked values, all on the CPU. Independent of files, configs and the engine.

    KVPrefix          keys and values of every layer, past their position encoding
    SoftPrompt        embedding rows prepended to the input; the engine folds them into a KVPrefix
    ActivationScales  IA3: vectors that scale the input or the output of named linear modules
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from adapters.base_model import BaseModelSpec
from adapters.errors import TensorMismatch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KVPrefix:
    """Keys and values prepended to a sequence's own.

    Attributes:
        keys: (L, H_kv, n, D), already rotated.
        values: (L, H_kv, n, D).
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_virtual_tokens(self) -> int:
        """n, the positions the prefix takes."""
        return int(self.keys.shape[2])

    def check(self, base: BaseModelSpec) -> None:
        """Raise TensorMismatch unless the shapes are those of `base`."""
        want = (base.num_layers, base.num_kv_heads, self.num_virtual_tokens, base.head_dim)
        for name, tensor in (("keys", self.keys), ("values", self.values)):
            if tuple(tensor.shape) != want:
                raise TensorMismatch(
                    f"prefix {name} have shape {tuple(tensor.shape)}, the base needs {want}",
                    field=name,
                    expected=str(want),
                    came=str(tuple(tensor.shape)),
                )


@dataclass(frozen=True)
class SoftPrompt:
    """Embedding rows (n, d) prepended to the input's embeddings, at positions 0..n-1."""

    embeddings: torch.Tensor

    @property
    def num_virtual_tokens(self) -> int:
        """n, the positions the rows take."""
        return int(self.embeddings.shape[0])

    def check(self, base: BaseModelSpec) -> None:
        """Raise TensorMismatch unless the rows are as wide as the base's embeddings."""
        if self.embeddings.ndim != 2 or self.embeddings.shape[1] != base.hidden_size:
            raise TensorMismatch(
                f"soft prompt has shape {tuple(self.embeddings.shape)}, "
                f"the base's embeddings are {base.hidden_size} wide",
                field="prompt_embeddings",
                expected=f"(n, {base.hidden_size})",
                came=str(tuple(self.embeddings.shape)),
            )


@dataclass(frozen=True)
class ActivationScales:
    """IA3's vectors, float32, keyed by dotted module path.

    Attributes:
        inputs: module -> (in_features,), multiplied into the module's input.
        outputs: module -> (out_features,), multiplied into the module's output, bias included.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    @property
    def num_virtual_tokens(self) -> int:
        """Scales take no positions."""
        return 0

    def check(self, base: BaseModelSpec) -> None:
        """Raise TensorMismatch unless every vector fits a linear module of `base`."""
        for side, vectors in (("in", self.inputs), ("out", self.outputs)):
            for path, vector in vectors.items():
                spec = base.linear_modules.get(path)
                if spec is None:
                    raise TensorMismatch(f"the base has no linear module {path!r}", field=path)
                width = spec.in_features if side == "in" else spec.out_features
                if tuple(vector.shape) != (width,):
                    raise TensorMismatch(
                        f"{path}: scales of shape {tuple(vector.shape)}, expected ({width},)",
                        field=path,
                        expected=f"({width},)",
                        came=str(tuple(vector.shape)),
                    )


ServingForm: TypeAlias = KVPrefix | SoftPrompt | ActivationScales
