"""Tiny random base models of every architecture that must work, built from configs.

Large initial weights (`initializer_range` of 0.2 and more) so that an error of one position, layer or
scale moves tokens, not only the last digits of a logit.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from adapters.base_model import BaseModelSpec, describe

VOCAB = 97

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_NO_GQA = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_COMMON),
    "mistral": MistralConfig(**_COMMON, sliding_window=12),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=16),
    "gemma2": Gemma2Config(
        **_COMMON,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3": Gemma3TextConfig(
        **{**_COMMON, "num_hidden_layers": 6},
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt_neox": GPTNeoXConfig(**_NO_GQA),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=32,
        init_std=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "phi": PhiConfig(**_COMMON),
    "bloom": BloomConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_model(
    architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A frozen tiny model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = type(CONFIGS[architecture]).from_dict(CONFIGS[architecture].to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        # Biases and norms start at 0 and 1: give them something to get wrong.
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        assert torch.isfinite(parameter).all(), name
    return model.to(dtype).eval().requires_grad_(False)


def tiny_spec(model: PreTrainedModel) -> BaseModelSpec:
    """The spec of a tiny model, with a made-up digest."""
    dtype = str(model.dtype).removeprefix("torch.")
    return describe(model, digest=f"tiny-{model.config.model_type}", dtype=dtype)
