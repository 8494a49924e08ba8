"""Layers of the base whose arithmetic `layer_kernels` takes over.

A module is taken for what its class is: RMSNorm, the gated SiLU block and the attention of Llama and its
relatives. Only `forward` is replaced: modules, names, weights and hooks stay, so that scales apply as they
do elsewhere. Every other module computes as transformers wrote it. Knows no cache, row or adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adapters.attention_hook import Attention
from server.engine.layer_kernels import rms_norm, rotate, silu_times
from server.engine.vector_ops import LANES

# By class name, as transformers has them; the forward passes of each group were read and are the same.
_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
_GATED = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})
_ATTENTIONS = frozenset({"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"})
_LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)

Forward = Callable[..., Any]


def fuse_layers(model: nn.Module, path: Attention) -> int:
    """Replace what can be replaced in a model that is connected to `path`; returns how many."""
    count = 0
    for module in model.modules():
        forward = _forward_of(module, path)
        if forward is not None:
            module.forward = forward
            count += 1
    return count


def _forward_of(module: Any, path: Attention) -> Forward | None:
    kind = type(module).__name__
    if kind in _NORMS:
        return _norm(module)
    if kind in _GATED and _is_silu(module.act_fn) and module.intermediate_size % LANES == 0:
        return _gated(module)
    if kind in _ATTENTIONS:
        return _attention(module, path)
    if kind in _LAYERS:
        return _layer(module)
    return None


def _is_silu(function: Any) -> bool:
    return isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation"


def _norm(module: Any) -> Forward:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)

    return forward


def _gated(module: Any) -> Forward:
    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module.down_proj(silu_times(module.gate_proj(x), module.up_proj(x)))
        return out

    return forward


def _layer(module: Any) -> Forward:
    before, after = module.input_layernorm, module.post_attention_layernorm

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = module.self_attn(hidden_states=before(hidden_states), **kwargs)
        # Attention's share is added to the hidden states in the pass that normalises them.
        normal = rms_norm(hidden_states, after.weight, after.variance_epsilon, added=attended)
        return hidden_states.add_(module.mlp(normal))

    return forward


def _attention(module: Any, path: Attention) -> Forward:
    # Mistral's has the window in its config, the others as an attribute; Llama's has none.
    window = getattr(module, "sliding_window", None)
    if type(module).__name__ == "MistralAttention":
        window = getattr(module.config, "sliding_window", None)
    query_norm, key_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        num_tokens = hidden_states.shape[1]
        split = (num_tokens, -1, module.head_dim)
        query = module.q_proj(hidden_states)[0].view(split)
        keys = module.k_proj(hidden_states)[0].view(split)
        values = module.v_proj(hidden_states)[0].view(split)
        if query_norm is not None and key_norm is not None:
            query, keys = query_norm(query), key_norm(keys)
        cos, sin = position_embeddings[0][0], position_embeddings[1][0]
        both = _side_by_side(query, keys)
        if both is not None:
            rotate(both, cos, sin)
        else:
            rotate(query, cos, sin)
            rotate(keys, cos, sin)
        out = path.attend(
            module.layer_idx, query, keys, values, scale=module.scaling, window=window
        )
        return module.o_proj(out.view(1, num_tokens, -1)), None

    return forward


def _side_by_side(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """(T, H + H_kv, D) where the keys follow the query heads in memory, as in a packed product."""
    width = query.shape[1] * query.stride(1) * query.element_size()
    if keys.data_ptr() - query.data_ptr() != width or keys.stride() != query.stride():
        return None
    if query.stride(0) < (query.shape[1] + keys.shape[1]) * query.stride(1):
        return None
    shape = (query.shape[0], query.shape[1] + keys.shape[1], query.shape[2])
    return query.as_strided(shape, query.stride())
