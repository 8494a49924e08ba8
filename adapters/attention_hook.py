"""Replaces the attention of a transformers model with an `Attention` of ours.

The model runs on one packed row of tokens, (1, T); only the attention separates the sequences. Serving
and training each connect their own `Attention` here. Independent of caches, adapters and masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from adapters.errors import BaseUnsupported

# Keyword arguments that models pass and that have no effect here. Any other raises.
_IGNORED_KWARGS = frozenset(
    {
        "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
        "cache_position", "is_causal", "logits_to_keep", "position_embeddings",
    }
)  # fmt: skip


# Every connected model has its own name in transformers' registry of attention functions.
_NAME = "graftwork_"
_NUMBERS = itertools.count()


class Attention(Protocol):
    """The attention interface that a connected model calls."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from every token of the packed row over what it sees.

        Args:
            layer: its index.
            query: (T, H, D), past the position encoding.
            new_keys: (T, H_kv, D), of the row's own tokens.
            new_values: (T, H_kv, D).
            scale: factor on the scores.
            window: keys further back than this are hidden; None sees all.
            softcap: scores become softcap * tanh(score / softcap).
            alibi_slopes: (H,) float32, times (key position - query position) on the scores.

        Returns:
            (T, H, D), in the dtype of `query`.
        """
        ...


def connect(model: nn.Module, path: Attention) -> None:
    """Make `model` compute its attention by `path.attend`; connecting again replaces it.

    For a model with `connect_attention`, which is not one of transformers', that method is called. Models
    that use transformers' attention interface get a function registered under a name that the mask
    registry does not have, so that no mask is built. BLOOM has its own attention: only its `forward` is
    replaced.

    Raises:
        BaseUnsupported: the architecture does neither.
    """
    if hasattr(model, "connect_attention"):
        model.connect_attention(path)  # type: ignore[operator]
        return
    # Imported late: it imports everything that transformers' models need.
    from transformers import AttentionInterface

    # A model keeps its name: transformers never forgets one, nor what is registered under it.
    name = str(model.config._attn_implementation)  # type: ignore[union-attr]
    if not name.startswith(_NAME):
        name = f"{_NAME}{next(_NUMBERS)}"

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        unknown = {k for k, v in kwargs.items() if v is not None} - _IGNORED_KWARGS
        if attention_mask is not None or dropout or unknown:
            raise BaseUnsupported(
                f"the base's attention passes {sorted(unknown) or 'a mask or dropout'}, "
                "which this engine does not know"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = module.layer_idx
        if not isinstance(layer, int):
            raise BaseUnsupported("an attention module of the base does not know its layer")
        packed, new_keys, new_values = (x[0].transpose(0, 1) for x in (query, key, value))
        out = path.attend(
            layer,
            packed,  # (T, H, D)
            new_keys,  # (T, H_kv, D)
            new_values,
            scale=scale,
            window=sliding_window,
            softcap=softcap,
        )
        return out[None], None

    if model.config.model_type == "bloom":  # type: ignore[union-attr]
        _connect_bloom(model, path)
        return
    AttentionInterface.register(name, attention)
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]
    except (ValueError, ImportError) as error:
        raise BaseUnsupported(
            f"{model.config.model_type} has its own attention, "  # type: ignore[union-attr]
            "which cannot be replaced: a model with transformers' attention interface is expected"
        ) from error


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slopes (H,) of Press et al., "Train Short, Test Long" (2022), section 3.

    A geometric sequence 2^(-8/n), 2^(-16/n), ... for n heads, n a power of two. Other head counts take the
    sequence of the next lower power, then every other slope of the next higher one.
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 1 << (num_heads.bit_length() - 1)
    slopes = geometric(lower)
    if lower != num_heads:
        slopes += geometric(2 * lower)[0::2][: num_heads - lower]
    return torch.tensor(slopes)


def _connect_bloom(model: nn.Module, path: Attention) -> None:
    for block in model.transformer.h:  # type: ignore[union-attr]
        attention = block.self_attention
        attention.forward = _bloom_forward(attention, path)


def _bloom_forward(attention: Any, path: Attention) -> Callable[..., tuple[torch.Tensor, None]]:
    slopes = alibi_slopes(attention.num_heads)

    def forward(
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        num_tokens = hidden_states.shape[1]
        # (1, T, 3 * hidden) -> (T, H, 3, D): BLOOM interleaves query, key and value head by head.
        fused = attention.query_key_value(hidden_states)
        fused = fused.view(num_tokens, attention.num_heads, 3, attention.head_dim)
        query, key, value = fused.unbind(dim=2)
        out = path.attend(
            attention.layer_idx,
            query,
            key,
            value,
            scale=attention.inv_norm_factor,
            alibi_slopes=slopes.to(query.device),
        )
        projected = attention.dense(out.reshape(1, num_tokens, -1))
        return residual + projected, None

    return forward
