"""The layers of Llama and its relatives, one after the other on the packed row of a step.

transformers calls six modules a layer, each with its look-ups, hooks and views: for single tokens that
took a quarter of a step on two cores. Here a layer is four products and the kernels of `layer_kernels`
between them. Modules, names and weights stay where they are, and scales apply as they do elsewhere.

A model is taken for what its class is; every other computes as transformers wrote it. Knows no cache,
row or adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from server.engine.attention import AttentionPath
from server.engine.decode_kernel import KernelPlan
from server.engine.decode_program import DecodeProgram
from server.engine.layer_kernels import rms_norm, rotate, silu_times
from server.engine.packed_linear import PackedLinear
from server.engine.scales import ScaleTables
from server.engine.vector_ops import LANES

# As transformers has them; their forward passes were read, and differ in what `Layer` names only.
_MODELS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)


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
        self._pack = first.pack if isinstance(first, PackedLinear) else None
        self.inputs = int(first.in_features)
        self.sizes = tuple(int(module.out_features) for module in modules)  # type: ignore[arg-type]
        is_one = self._pack is not None and tuple(self._pack.sizes) == self.sizes
        self.tiles = self._pack.tiles if self._pack is not None and is_one else None

    def __call__(self, x: torch.Tensor, scales: ScaleTables) -> Sequence[torch.Tensor]:
        """x (T, in_features) -> each layer's (T, out_features), rows not always side by side."""
        if not scales.in_use:
            return self._plain(x)
        inputs = [scales.scaled_input(name, x) for name in self.names]
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


class LayerStack:
    """All layers of one model; `of` makes it.

    Args:
        model: a causal language model of transformers.
        path: how attention is computed.
        scales: what its linear layers are scaled by.
    """

    def __init__(self, model: Any, path: AttentionPath, scales: ScaleTables) -> None:
        self._path = path
        self._scales = scales
        self._rotary = model.model.rotary_emb
        self._norm = _norm(model.model.norm)
        self._head = model.lm_head
        names = {id(module): name for name, module in model.named_modules()}
        self._layers = [_layer(layer, names) for layer in model.model.layers]
        self._program = DecodeProgram.of(self._layers, scales)

    @staticmethod
    def of(model: Any, path: AttentionPath, scales: ScaleTables) -> LayerStack | None:
        """The stack of a model that is connected to `path`, or None where its layers are others."""
        if type(model).__name__ not in _MODELS:
            return None
        if not all(_is_gated_silu(layer.mlp) for layer in model.model.layers):
            return None
        return LayerStack(model, path, scales)

    def logits(
        self, hidden: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """Embeddings to logits.

        Args:
            hidden: (T, d) embeddings of the packed row; they are written over.
            positions: (T,) absolute positions.
            keep: (n,) indices of the tokens whose logits are wanted.

        Returns:
            (n, V).
        """
        cos, sin = (part[0] for part in self._rotary(hidden[None], positions[None]))
        plan = self._path.fast
        if self._program is None or plan is None or not self._is_for_program(len(hidden), plan):
            hidden, added = self._through_layers(hidden, cos, sin)
        else:
            hidden, added = self._program.run(hidden, cos.contiguous(), sin.contiguous(), plan)
        if len(keep) < len(hidden):
            hidden, added = hidden[keep], added[keep]
        out: torch.Tensor = self._head(rms_norm(hidden, *self._norm, added)[None])[0]
        return out

    def _is_for_program(self, num_rows: int, plan: KernelPlan) -> bool:
        is_all = plan.is_one_pass and not self._path.rows
        return is_all and self._program is not None and self._program.fits(num_rows)

    def _through_layers(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (T, d) past all layers, and what the last one adds to them."""
        added: torch.Tensor | None = None
        for layer in self._layers:
            # What a layer adds to the hidden states is added in the pass that normalises them next.
            attended = self._attend(layer, rms_norm(hidden, *layer.before, added), cos, sin)
            normal = rms_norm(hidden, *layer.after, attended)
            (added,) = layer.down(silu_times(*layer.gate_up(normal, self._scales)), self._scales)
        if added is None:
            raise ValueError("the model has no layers")
        return hidden, added

    def _attend(
        self, layer: Layer, normal: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        parts = layer.qkv(normal, self._scales)
        split = (len(normal), -1, layer.head_dim)
        query, keys, values = (part.view(split) for part in parts)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, keys = rms_norm(query, *layer.query_norm), rms_norm(keys, *layer.key_norm)
        both = _side_by_side(query, keys)
        for heads in (query, keys) if both is None else (both,):
            rotate(heads, cos, sin)
        out = self._path.attend(
            layer.index, query, keys, values, scale=layer.scale, window=layer.window
        )
        (output,) = layer.output(out.view(len(normal), -1), self._scales)
        return output


def _is_gated_silu(mlp: Any) -> bool:
    is_silu = isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation"
    return is_silu and mlp.intermediate_size % LANES == 0


def _layer(module: Any, names: dict[int, str]) -> Layer:
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
        before=_norm(module.input_layernorm),
        after=_norm(module.post_attention_layernorm),
        qkv=products(attention.q_proj, attention.k_proj, attention.v_proj),
        output=products(attention.o_proj),
        gate_up=products(mlp.gate_proj, mlp.up_proj),
        down=products(mlp.down_proj),
        head_dim=attention.head_dim,
        scale=attention.scaling,
        window=window,
        query_norm=None if query_norm is None else _norm(query_norm),
        key_norm=None if key_norm is None else _norm(key_norm),
    )


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    return module.weight, module.variance_epsilon


def _side_by_side(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """(T, H + H_kv, D) where the keys follow the query heads in memory, as in a packed product."""
    width = query.shape[1] * query.stride(1) * query.element_size()
    if keys.data_ptr() - query.data_ptr() != width or keys.stride() != query.stride():
        return None
    if query.stride(0) < (query.shape[1] + keys.shape[1]) * query.stride(1):
        return None
    shape = (query.shape[0], query.shape[1] + keys.shape[1], query.shape[2])
    return query.as_strided(shape, query.stride())
