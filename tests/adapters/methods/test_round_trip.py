"""Conformance C2, every method: PEFT saves, we load and save, PEFT loads and gives its logits."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch

from adapters.methods import method_of
from adapters.methods.cpt import CPTEmbedding
from adapters.methods.ia3 import attach_ia3, ia3_layers, load_ia3
from adapters.methods.p_tuning import PromptEncoder
from adapters.methods.prefix_tuning import PrefixEncoder
from adapters.methods.prompt_tuning import PromptEmbedding
from adapters.parts import ActivationScales, KVPrefix, SoftPrompt
from tests.adapters.methods import oracle

CAUSAL = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Any] = {
    "prefix": lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=5),
    "prefix_projection": lambda: peft.PrefixTuningConfig(
        **CAUSAL, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12
    ),
    "p_tuning_mlp": lambda: peft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=5),
    "p_tuning_lstm": lambda: peft.PromptEncoderConfig(
        **CAUSAL,
        num_virtual_tokens=5,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=12,
    ),
    "cpt": lambda: peft.CPTConfig(
        **CAUSAL,
        cpt_token_ids=[3, 7, 11, 13, 2],
        cpt_mask=[1, 1, 1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3, 4, 0],
    ),
    "prompt_tuning": lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=5),
    "ia3": lambda: peft.IA3Config(**CAUSAL),
    "ia3_all_linear": lambda: peft.IA3Config(
        **CAUSAL, target_modules="all-linear", feedforward_modules=[]
    ),
}


def restored(config: Any, tensors: dict[str, torch.Tensor], base: Any) -> torch.nn.Module:
    """A trainable module of ours that holds the checkpoint."""
    words = base.get_input_embeddings()
    if config.peft_type == "IA3":
        attach_ia3(base, config, oracle.spec_of(base))
        load_ia3(base, tensors)
        return base
    module = {
        "PREFIX_TUNING": lambda: PrefixEncoder(config),
        "P_TUNING": lambda: PromptEncoder(config),
        "CPT": lambda: CPTEmbedding(config, words),
        "PROMPT_TUNING": lambda: PromptEmbedding(config, words),
    }[config.peft_type]()
    module.load_prompt_embeddings(tensors["prompt_embeddings"])
    return module


@pytest.mark.parametrize("base_name", oracle.BASES)
@pytest.mark.parametrize("config_name", CONFIGS)
def test_peft_to_us_to_peft(tmp_path: Any, base_name: str, config_name: str) -> None:
    build = oracle.BASES[base_name]
    theirs = oracle.peft_save(build(), CONFIGS[config_name](), tmp_path / "theirs")
    raw, infos, tensors = oracle.read(tmp_path / "theirs")
    method, config = method_of(raw), oracle.parse(raw)
    base = oracle.spec_of(build())

    facts = method.check(config, infos, base)
    form = method.serving_form(config, tensors, base)
    form.check(base)
    assert facts.warnings == ()
    assert facts.uses_scales == isinstance(form, ActivationScales)
    assert facts.num_virtual_tokens == form.num_virtual_tokens

    ours = method.export(restored(config, tensors, build()), config)
    assert ours.keys() == tensors.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert torch.equal(tensor, tensors[name]), name
    assert config.model_dump(mode="json") == raw

    oracle.write(tmp_path / "ours", config, ours)
    again = oracle.peft_load(build(), tmp_path / "ours")
    assert torch.equal(
        oracle.logits(again), oracle.logits(oracle.peft_load(build(), tmp_path / "theirs"))
    )
    assert torch.allclose(oracle.logits(again), oracle.logits(theirs), atol=1e-5)
    saved = peft.get_peft_model_state_dict(again)
    assert saved.keys() == tensors.keys()


@pytest.mark.parametrize("base_name", oracle.BASES)
@pytest.mark.parametrize("config_name", ["prefix", "prefix_projection"])
def test_prefix_serving_form_is_pefts_cache(
    tmp_path: Any, base_name: str, config_name: str
) -> None:
    build = oracle.BASES[base_name]
    model = oracle.peft_save(build(), CONFIGS[config_name](), tmp_path)
    raw, _, tensors = oracle.read(tmp_path)
    form = method_of(raw).serving_form(oracle.parse(raw), tensors, oracle.spec_of(build()))
    assert isinstance(form, KVPrefix)
    with oracle.no_peft_warnings(), torch.no_grad():
        cache = model.get_prompt(batch_size=1)
    for layer, (keys, values) in enumerate(zip(form.keys, form.values, strict=True)):
        # the projection runs as one product there and here, over the same rows
        assert torch.allclose(cache.layers[layer].keys[0], keys, atol=1e-6)
        assert torch.allclose(cache.layers[layer].values[0], values, atol=1e-6)


@pytest.mark.parametrize("config_name", ["p_tuning_mlp", "p_tuning_lstm", "cpt", "prompt_tuning"])
def test_soft_prompt_serving_form_is_pefts_prompt(tmp_path: Any, config_name: str) -> None:
    model = oracle.peft_save(oracle.llama(), CONFIGS[config_name](), tmp_path)
    raw, _, tensors = oracle.read(tmp_path)
    form = method_of(raw).serving_form(oracle.parse(raw), tensors, oracle.spec_of(oracle.llama()))
    assert isinstance(form, SoftPrompt)
    with torch.no_grad():
        prompt = model.get_prompt(batch_size=1)[0]
    # a batched LSTM rounds differently, and PEFT shortens CPT's delta again at every call
    torch.testing.assert_close(prompt, form.embeddings, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base_name", oracle.BASES)
@pytest.mark.parametrize("config_name", ["ia3", "ia3_all_linear"])
def test_ia3_attached_gives_pefts_logits(tmp_path: Any, base_name: str, config_name: str) -> None:
    build = oracle.BASES[base_name]
    theirs = oracle.peft_save(build(), CONFIGS[config_name](), tmp_path)
    raw, _, tensors = oracle.read(tmp_path)
    ours = restored(oracle.parse(raw), tensors, build())
    assert ia3_layers(ours)
    assert torch.equal(oracle.logits(ours), oracle.logits(theirs))


@pytest.mark.parametrize("base_name", oracle.BASES)
@pytest.mark.parametrize("config_name", CONFIGS)
def test_a_completed_config_is_what_peft_saves(
    tmp_path: Any, base_name: str, config_name: str
) -> None:
    build = oracle.BASES[base_name]
    config = CONFIGS[config_name]()
    before = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    if config.peft_type == "CPT":
        before["num_virtual_tokens"] = None
    unfilled = oracle.parse({key: _plain(value) for key, value in before.items()})
    oracle.peft_save(build(), config, tmp_path)
    raw, _, _ = oracle.read(tmp_path)
    method = method_of(raw)
    full = method.complete_config(unfilled, oracle.spec_of(build()))  # type: ignore[attr-defined]
    ours = full.model_copy(update={"inference_mode": True}).model_dump(mode="json")
    assert _unordered(ours) == _unordered({**raw, "auto_mapping": None})


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value


def _unordered(raw: dict[str, Any]) -> dict[str, Any]:
    names = ("target_modules", "feedforward_modules")
    return {key: sorted(value) if key in names else value for key, value in raw.items()}


def test_half_precision_checkpoints_are_read(tmp_path: Any) -> None:
    oracle.peft_save(oracle.llama(), CONFIGS["prefix"](), tmp_path)
    raw, _, tensors = oracle.read(tmp_path)
    base = oracle.spec_of(oracle.llama())
    rows = tensors["prompt_embeddings"]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = {"prompt_embeddings": rows.to(dtype)}
        form = method_of(raw).serving_form(oracle.parse(raw), cast, base)
        assert form.keys.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method_of(raw).check(
            oracle.parse(raw),
            {"prompt_embeddings": oracle.TensorInfo("BF16", tuple(rows.shape))},
            base,
        )
