"""Llama in plain torch: the modules, names and operations of transformers' class, and nothing else.

transformers' own classes import torch's compiler, its distributed tensors and sympy: 100 MB and two of the
five seconds that a server took to start. A config is accepted only if it has all required keys and no
unknown ones; `read_numbers` returns None for any other, and transformers loads it. The operations and their
order are those of transformers, so the logits are bit-identical: a test checks this, since the engine's
check at start compares with these. Independent of files, caches and adapters.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from adapters.attention_hook import Attention

# Config keys that do not affect what a frozen model computes.
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
        "initializer_range", "pad_token_id", "torch_dtype", "transformers_version", "unk_token_id",
        "use_cache",
    }
)  # fmt: skip
_FIXED = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "model_type": "llama"}
_COUNTS = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "vocab_size",
)  # fmt: skip
# Optional keys and their defaults; `pretraining_tp` must have this value.
_DEFAULTS = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "head_dim": None}
# The RoPE base in the current and in the older config format.
_ROPE, _OLD_ROPE = "rope_parameters", frozenset({"rope_theta", "rope_scaling"})
_NEEDED = frozenset({*_FIXED, *_COUNTS, "rms_norm_eps", "tie_word_embeddings"})
_KNOWN = _NEEDED | _WITHOUT_EFFECT | _DEFAULTS.keys() | _OLD_ROPE | {_ROPE}


@dataclass(frozen=True)
class LlamaNumbers:
    """The config values that the computation uses; names as in `config.json`."""

    head_dim: int
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int
    vocab_size: int
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    model_type: str = "llama"

    def get_text_config(self) -> LlamaNumbers:
        """Itself: the model is text-only."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The values by name, as a config of transformers gives them."""
        return asdict(self)


def read_numbers(config: dict[str, Any]) -> LlamaNumbers | None:
    """The numbers of a `config.json`; None unless it is that of a plain Llama."""
    if not _NEEDED <= config.keys() <= _KNOWN:
        return None
    given = {**_DEFAULTS, **config}
    if given["pretraining_tp"] != 1 or any(given[key] != value for key, value in _FIXED.items()):
        return None
    theta = _theta(config)
    if theta is None or type(given["rms_norm_eps"]) is not float:
        return None
    heads, groups = given["num_attention_heads"], given["num_key_value_heads"]
    if not all(_is_count(given[key]) for key in _COUNTS) or heads % groups:
        return None
    if given["head_dim"] is None and given["hidden_size"] % heads == 0:
        given["head_dim"] = given["hidden_size"] // heads
    switches = ("attention_bias", "mlp_bias", "tie_word_embeddings")
    if not _is_count(given["head_dim"]) or any(type(given[key]) is not bool for key in switches):
        return None
    if given["head_dim"] % 2:
        return None
    names = (*_COUNTS, *switches, "head_dim", "rms_norm_eps")
    return LlamaNumbers(**{name: given[name] for name in names}, rope_theta=float(theta))


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _theta(config: dict[str, Any]) -> float | None:
    """The base of plain RoPE; None for another RoPE type, or none."""
    old = {key: config[key] for key in _OLD_ROPE & config.keys()}
    rope = config.get(_ROPE)
    if rope is None:
        rope = {"rope_theta": old.get("rope_theta"), "rope_type": "default"}
        if old.get("rope_scaling") is not None:
            return None
    elif old or not isinstance(rope, dict) or rope.keys() != {"rope_theta", "rope_type"}:
        return None
    theta = rope["rope_theta"]
    return theta if rope["rope_type"] == "default" and type(theta) in (int, float) else None


@dataclass(frozen=True)
class Logits:
    """Result of a forward pass: `logits` (B, T, V)."""

    logits: torch.Tensor


class RMSNorm(nn.Module):
    """Over the last dimension, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d)."""
        exact = x.to(torch.float32)
        variance = exact.pow(2).mean(-1, keepdim=True)
        exact = exact * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * exact.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotations by position; a token's pairs are (i, i + D / 2)."""

    def __init__(self, numbers: LlamaNumbers) -> None:
        super().__init__()
        # On the CPU wherever the rest of the model is created: no file contains it.
        steps = torch.arange(0, numbers.head_dim, 2, dtype=torch.float, device="cpu")
        inv_freq = 1.0 / (numbers.rope_theta ** (steps / numbers.head_dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (B, T, D) of positions (B, T), in the dtype of x."""
        inv_freq: Any = self.inv_freq
        freqs = position_ids[..., None].float() * inv_freq.to(device=x.device)
        both = torch.cat((freqs, freqs), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention: causal within the row, or by the connected `Attention`."""

    def __init__(self, numbers: LlamaNumbers, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = numbers.head_dim
        self.scaling = numbers.head_dim**-0.5
        self.path: Attention | None = None
        width, bias = numbers.hidden_size, numbers.attention_bias
        query = numbers.num_attention_heads * self.head_dim
        keys = numbers.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, query, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(query, width, bias=bias)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(B, T, d) with rotations (B, T, D) -> (B, T, d)."""
        split = (*x.shape[:-1], -1, self.head_dim)
        query, keys, values = (
            project(x).view(split).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, keys = _rotated(query, cos, sin), _rotated(keys, cos, sin)
        if self.path is None:
            group = query.shape[1] // keys.shape[1]
            out = functional.scaled_dot_product_attention(
                query,
                keys.repeat_interleave(group, dim=1),
                values.repeat_interleave(group, dim=1),
                scale=self.scaling,
                is_causal=x.shape[1] > 1,
            ).transpose(1, 2)
        else:
            packed = (part[0].transpose(0, 1) for part in (query, keys, values))
            out = self.path.attend(self.layer_idx, *packed, scale=self.scaling)[None]
        attended: torch.Tensor = self.o_proj(out.reshape(*x.shape[:-1], -1).contiguous())
        return attended


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D), rotated by (B, T, D)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos.unsqueeze(1)) + (turned * sin.unsqueeze(1))


class MLP(nn.Module):
    """Gated SiLU."""

    def __init__(self, numbers: LlamaNumbers) -> None:
        super().__init__()
        width, bias = numbers.hidden_size, numbers.mlp_bias
        self.intermediate_size = numbers.intermediate_size
        self.gate_proj = nn.Linear(width, self.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(width, self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, width, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each after its norm."""

    def __init__(self, numbers: LlamaNumbers, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(numbers, layer_idx)
        self.mlp = MLP(numbers)
        self.input_layernorm = RMSNorm(numbers.hidden_size, numbers.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(numbers.hidden_size, numbers.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LlamaModel(nn.Module):
    """Embeddings and layers."""

    def __init__(self, numbers: LlamaNumbers) -> None:
        super().__init__()
        # From an existing table: torch's random initialisation on the meta device imports its compiler.
        table = torch.empty(numbers.vocab_size, numbers.hidden_size)
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            table, freeze=False
        )
        self.layers = nn.ModuleList(
            DecoderLayer(numbers, index) for index in range(numbers.num_hidden_layers)
        )
        self.norm = RMSNorm(numbers.hidden_size, numbers.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(numbers)

    def forward(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(B, T, d) at positions (B, T) -> (B, T, d)."""
        cos, sin = self.rotary_emb(embeddings, position_ids)
        for layer in self.layers:
            embeddings = layer(embeddings, cos, sin)
        out: torch.Tensor = self.norm(embeddings)
        return out


class LlamaForCausalLM(nn.Module):
    """The whole model. Created on the meta device; its weights come from a file.

    Has transformers' class name, since the engine identifies models by class name.
    """

    def __init__(self, numbers: LlamaNumbers) -> None:
        super().__init__()
        self.config = numbers
        self.model = LlamaModel(numbers)
        self.lm_head = nn.Linear(numbers.hidden_size, numbers.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token embeddings."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The output head."""
        return self.lm_head

    def connect_attention(self, path: Attention) -> None:
        """Set the attention implementation, see `adapters.attention_hook.connect`."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.path = path

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: torch.Tensor | slice = slice(None),
        past_key_values: object = None,
        use_cache: bool = False,
    ) -> Logits:
        """Ids (B, T) or embeddings (B, T, d) to logits.

        Args:
            input_ids: tokens, or
            inputs_embeds: their embeddings.
            position_ids: (B, T); 0, 1, ... if omitted.
            logits_to_keep: indices (n,) of the tokens at which to compute logits; all if omitted.
            past_key_values: ignored; a connected model has its cache elsewhere.
            use_cache: ignored.
        """
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        hidden = self.model(x, position_ids)
        return Logits(self.lm_head(hidden[:, logits_to_keep]))
