"""The self-check at start: what the engine can serve passes, what it would serve wrongly is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    MptConfig,
)

from adapters.errors import BaseUnsupported
from server.engine.attention import AttentionPath
from tests.engine_tools import TINY, tiny_engine
from tests.tiny_models import ARCHITECTURES, VOCAB, tiny_model

OWN_ATTENTION = {
    "gptj": GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "codegen": CodeGenConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "mpt": MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "falcon": FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    ),
    "falcon with alibi": FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=64,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fast_kernels", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_bases_pass(architecture, fast_kernels, dtype):
    config = dataclasses.replace(TINY, fast_kernels=fast_kernels)
    tiny_engine(tiny_model(architecture, dtype=dtype), config=config).close()


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_bases_with_attention_of_their_own_are_refused(name):
    torch.manual_seed(0)
    config = OWN_ATTENTION[name]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(BaseUnsupported) as caught:
        tiny_engine(model.requires_grad_(False))
    assert config.model_type in str(caught.value)


@pytest.mark.parametrize("argument", ["softcap", "window", "scale"])
@pytest.mark.parametrize("fast_kernels", [True, False])
def test_an_option_that_is_lost_is_found(monkeypatch, argument, fast_kernels):
    """The check has teeth: Gemma 2's tiny model uses all three."""
    attend = AttentionPath.attend

    def forgetful(self, *tensors, **options):
        options[argument] = 1.0 if argument == "scale" else None
        return attend(self, *tensors, **options)

    monkeypatch.setattr(AttentionPath, "attend", forgetful)
    config = dataclasses.replace(TINY, fast_kernels=fast_kernels)
    with pytest.raises(BaseUnsupported, match="off by"):
        tiny_engine(tiny_model("gemma2"), config=config)


def test_positions_that_are_lost_are_found():
    model = tiny_model("phi")  # whose layers are called as transformers wrote them
    forward = model.model.forward

    def without_positions(*args, **kwargs):
        kwargs.pop("position_ids")
        return forward(*args, **kwargs)

    model.model.forward = without_positions
    with pytest.raises(BaseUnsupported):
        tiny_engine(model)


def test_a_base_with_few_positions_is_served():
    """Fewer positions than the probe has tokens."""
    torch.manual_seed(0)
    config = tiny_model("gpt2").config
    config.n_positions = 16
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tiny_engine(model.requires_grad_(False)).close()
