"""The layers of Llama and its relatives, one after the other on the packed row of a step.

transformers calls six modules a layer, each with its look-ups, hooks and views: for single tokens that
took a quarter of a step on two cores. Here a layer is four products and the kernels of `layer_kernels`
between them. Modules, names and weights stay where they are, and scales apply as they do elsewhere.

A model is taken for what its class is; every other computes as transformers wrote it. Knows no cache,
row or adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from server.engine.attention import AttentionPath
from server.engine.decode_kernel import DecodeKernel
from server.engine.layer_kernels import rms_norm, rotate, silu_times
from server.engine.layers import Layer, layer_of, norm_of
from server.engine.scales import ScaleTables
from server.engine.step_program import StepProgram
from server.engine.vector_ops import LANES

# As transformers has them; their forward passes were read, and differ in what `Layer` names only.
_MODELS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)


class LayerStack:
    """All layers of one model; `of` makes it.

    Args:
        model: a causal language model of transformers.
        path: how attention is computed.
        scales: what its linear layers are scaled by.
        kernel: what attends from single tokens, or None.
    """

    def __init__(
        self, model: Any, path: AttentionPath, scales: ScaleTables, kernel: DecodeKernel | None
    ) -> None:
        self._path = path
        self._scales = scales
        self._rotary = model.model.rotary_emb
        self._norm = norm_of(model.model.norm)
        self._head = model.lm_head
        names = {id(module): name for name, module in model.named_modules()}
        self._layers = [layer_of(layer, names) for layer in model.model.layers]
        self._program = None if kernel is None else StepProgram.of(self._layers, scales, kernel)

    @staticmethod
    def of(
        model: Any, path: AttentionPath, scales: ScaleTables, kernel: DecodeKernel | None
    ) -> LayerStack | None:
        """The stack of a model that is connected to `path`, or None where its layers are others."""
        if type(model).__name__ not in _MODELS:
            return None
        if not all(_is_gated_silu(layer.mlp) for layer in model.model.layers):
            return None
        return LayerStack(model, path, scales, kernel)

    @property
    def has_windows(self) -> bool:
        """Whether a layer sees the last positions only."""
        return any(layer.window for layer in self._layers)

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
        program = self._program
        if program is not None and program.fits(len(hidden), self._path):
            hidden, added = program.run(hidden, cos.contiguous(), sin.contiguous(), self._path)
        else:
            hidden, added = self._through_layers(hidden, cos, sin)
        if len(keep) < len(hidden):
            hidden, added = hidden[keep], added[keep]
        out: torch.Tensor = self._head(rms_norm(hidden, *self._norm, added)[None])[0]
        return out

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


def _side_by_side(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """(T, H + H_kv, D) where the keys follow the query heads in memory, as in a packed product."""
    width = query.shape[1] * query.stride(1) * query.element_size()
    if keys.data_ptr() - query.data_ptr() != width or keys.stride() != query.stride():
        return None
    if query.stride(0) < (query.shape[1] + keys.shape[1]) * query.stride(1):
        return None
    shape = (query.shape[0], query.shape[1] + keys.shape[1], query.shape[2])
    return query.as_strided(shape, query.stride())
