"""The trainable modules beside PEFT's: same parameters from the same seed, same outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.cpt.model import CPTEmbedding as PeftCPTEmbedding
from peft.tuners.ia3.layer import Linear as PeftIA3Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapters
from adapters.errors import ConfigInvalid, NonFinite
from adapters.method import parse_config
from adapters.methods.cpt import CPT_METHOD, CPTConfig, CPTEmbedding, cpt_loss, with_context
from adapters.methods.ia3 import IA3_METHOD, IA3Config, IA3Linear, attach_ia3, detach_ia3
from adapters.methods.p_tuning import P_TUNING, PromptEncoder, PromptEncoderConfig
from adapters.methods.prefix_tuning import PREFIX_TUNING, PrefixEncoder, PrefixTuningConfig
from adapters.methods.prompt_tuning import PROMPT_TUNING, PromptEmbedding, PromptTuningConfig
from tests.adapters.methods import oracle

DIMENSIONS = {
    "num_virtual_tokens": 4,
    "token_dim": 8,
    "num_transformer_submodules": 1,
    "num_attention_heads": 2,
    "num_layers": 3,
}
INDICES = torch.arange(4).unsqueeze(0)


def seeded(build: Any) -> nn.Module:
    torch.manual_seed(3)
    return build()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Same names, same initial values from one seed, same output in eval mode."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name
    with torch.no_grad():
        assert torch.equal(ours.eval()(INDICES), theirs.eval()(INDICES))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"init_weights": "zero"},
        {"prefix_projection": True, "encoder_hidden_size": 5},
        {"prefix_projection": True, "encoder_hidden_size": 5, "init_weights": "zero"},
        {"prefix_projection": False, "inference_mode": True},
    ],
)
def test_prefix_encoder_is_pefts(fields: dict[str, Any]) -> None:
    ours = seeded(lambda: PrefixEncoder(PrefixTuningConfig(**DIMENSIONS, **fields)))
    theirs = seeded(lambda: peft.PrefixEncoder(peft.PrefixTuningConfig(**DIMENSIONS, **fields)))
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.parametrize("submodules", [1, 2])
def test_prompt_encoder_is_pefts(kind: str, submodules: int) -> None:
    fields = {
        **DIMENSIONS,
        "num_transformer_submodules": submodules,
        "encoder_reparameterization_type": kind,
        "encoder_hidden_size": 6,
    }
    ours = seeded(lambda: PromptEncoder(PromptEncoderConfig(**fields)))
    theirs = seeded(lambda: peft.PromptEncoder(peft.PromptEncoderConfig(**fields)))
    assert_same(ours, theirs)
    for name in ("token_dim", "input_size", "output_size", "hidden_size", "total_virtual_tokens"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.encoder_type == kind


def test_prompt_encoder_parameter_count() -> None:
    config = PromptEncoderConfig(
        num_virtual_tokens=20, token_dim=1024, encoder_hidden_size=128, task_type="CAUSAL_LM"
    )
    assert sum(parameter.numel() for parameter in PromptEncoder(config).parameters()) == 300_288


def test_pefts_documentation_snippets_run() -> None:
    from adapters import PrefixEncoder, PrefixTuningConfig, PromptEncoder, PromptEncoderConfig

    shared = {
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": 20,
        "token_dim": 768,
        "num_transformer_submodules": 1,
        "num_attention_heads": 12,
        "num_layers": 12,
        "encoder_hidden_size": 768,
    }
    prefix_encoder = PrefixEncoder(PrefixTuningConfig(peft_type="PREFIX_TUNING", **shared))
    assert prefix_encoder.embedding.weight.shape == (20, 12 * 2 * 768)
    assert prefix_encoder.prefix_projection is False
    prompt_encoder = PromptEncoder(
        PromptEncoderConfig(peft_type="P_TUNING", encoder_reparameterization_type="MLP", **shared)
    )
    assert prompt_encoder(torch.arange(20).unsqueeze(0)).shape == (1, 20, 768)
    assert prompt_encoder.mlp_head is not None


def test_the_types_of_the_encoder_may_be_enum_or_text() -> None:
    kind = adapters.PromptEncoderReparameterizationType.LSTM
    assert PromptEncoderConfig(encoder_reparameterization_type=kind) == PromptEncoderConfig(
        encoder_reparameterization_type="LSTM"  # type: ignore[arg-type]
    )


def test_public_names_load_on_first_use() -> None:
    for name in adapters.__all__:
        assert getattr(adapters, name) is not None


def test_an_mlp_says_that_it_ignores_the_number_of_layers() -> None:
    with pytest.warns(UserWarning, match="encoder_num_layers=3 changes nothing"):
        PromptEncoder(PromptEncoderConfig(**DIMENSIONS, encoder_num_layers=3))


def test_rows_are_computed_without_dropout() -> None:
    config = PromptEncoderConfig(
        **DIMENSIONS,
        encoder_reparameterization_type="LSTM",  # type: ignore[arg-type]
        encoder_dropout=0.5,
    )
    module = PromptEncoder(config).train()
    first, second = P_TUNING.export(module, config), P_TUNING.export(module, config)
    assert torch.equal(first["prompt_embeddings"], second["prompt_embeddings"])
    assert module.training


def test_a_dimension_that_is_unset_is_named() -> None:
    with pytest.raises(ConfigInvalid, match="token_dim is unset"):
        PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=4, num_layers=2))


def test_computed_rows_cannot_be_loaded_into_a_network() -> None:
    module = PrefixEncoder(PrefixTuningConfig(**DIMENSIONS, prefix_projection=True))
    with pytest.raises(ValueError, match="a network computes them"):
        module.load_prompt_embeddings(torch.zeros(4, 48))
    plain = PrefixEncoder(PrefixTuningConfig(**DIMENSIONS))
    with pytest.raises(ValueError, match=r"shape \(4, 47\), expected \(4, 48\)"):
        plain.load_prompt_embeddings(torch.zeros(4, 47))


def test_a_diverged_module_is_not_exported() -> None:
    config = PrefixTuningConfig(**DIMENSIONS)
    module = PrefixEncoder(config)
    with torch.no_grad():
        module.embedding.weight[0, 0] = float("nan")
    with pytest.raises(NonFinite, match="prompt_embeddings"):
        PREFIX_TUNING.export(module, config)
    with pytest.raises(TypeError, match="virtual tokens"):
        PREFIX_TUNING.export(nn.Linear(2, 2), config)


# --- prompt tuning ---------------------------------------------------------------------------


def test_prompt_embedding_from_the_vocabulary_is_pefts() -> None:
    words = nn.Embedding(32, 8)
    fields = {**DIMENSIONS, "prompt_tuning_init": "SAMPLE_VOCAB"}
    ours = seeded(lambda: PromptEmbedding(PromptTuningConfig(**fields), words))
    theirs = seeded(lambda: peft.PromptEmbedding(peft.PromptTuningConfig(**fields), words))
    assert_same(ours, theirs)


def test_prompt_embedding_from_text_repeats_and_cuts_the_tokens(tmp_path: Path) -> None:
    words = nn.Embedding(32, 8)
    config = PromptTuningConfig(
        **DIMENSIONS,
        prompt_tuning_init="TEXT",  # type: ignore[arg-type]
        prompt_tuning_init_text="a b c",
        tokenizer_name_or_path=str(tmp_path / "nowhere"),  # a name would be asked for on the hub
    )
    short = PromptEmbedding(config, words, init_token_ids=[1, 2, 3])
    assert torch.equal(short.embedding.weight, words.weight[torch.tensor([1, 2, 3, 1])])
    long = PromptEmbedding(config, words, init_token_ids=list(range(9)))
    assert torch.equal(long.embedding.weight, words.weight[:4])
    with pytest.raises(ValueError, match="init_token_ids"):
        PromptEmbedding(config, words)
    rows = PROMPT_TUNING.export(short, config)["prompt_embeddings"]
    assert rows.data_ptr() != short.embedding.weight.data_ptr()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_tuning_init": "TEXT"}, "needs tokenizer_name_or_path"),
        (
            {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"},
            "needs prompt_tuning_init_text",
        ),
        ({"tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs belongs to"),
    ],
)
def test_text_fields_belong_together(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        parse_config(PromptTuningConfig, fields)
    with pytest.raises(ValueError):  # noqa: PT011  (PEFT's own words)
        peft.PromptTuningConfig(**fields)


# --- CPT -------------------------------------------------------------------------------------

CPT_FIELDS = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": [3, 7, 11, 13, 2, 9, 4, 1],
    "cpt_mask": [1] * 8,
    "cpt_tokens_type_mask": [1, 2, 3, 4, 0, 5, 6, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.8,
    "opt_projection_epsilon": 0.2,
    "opt_projection_format_epsilon": 0.05,
}


def cpt_pair() -> tuple[CPTEmbedding, Any, CPTConfig, Any]:
    words = nn.Embedding(32, 8)
    config = CPTConfig(**CPT_FIELDS, token_dim=8)  # type: ignore[arg-type]
    other = peft.CPTConfig(**CPT_FIELDS)
    other.token_dim = 8
    return CPTEmbedding(config, words), PeftCPTEmbedding(other, words), config, other


def test_cpt_embedding_is_pefts() -> None:
    ours, theirs, _, _ = cpt_pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours.get_epsilon(), theirs.get_epsilon())
    indices = torch.arange(8).unsqueeze(0)
    assert torch.equal(ours(indices), theirs(indices))
    for scale in (1.0, 1e-3):
        delta = torch.randn(8, 8) * scale
        delta[1] = 0
        for module in (ours, theirs):
            module.delta_embedding.weight.data = delta.clone()
        torch.testing.assert_close(ours.get_projection(), theirs.get_projection())
        torch.testing.assert_close(ours(indices), theirs(indices))
        assert torch.equal(ours.rows(), ours(indices)[0].detach()) or scale == 1.0


def test_cpt_gradients_reach_types_1_to_3_only() -> None:
    ours, theirs, _, _ = cpt_pair()
    indices = torch.arange(8).unsqueeze(0)
    weights = torch.randn(1, 8, 8)
    gradients = []
    for module in (ours, theirs, copy.deepcopy(ours)):
        (module(indices) * weights).sum().backward()
        gradients.append(module.delta_embedding.weight.grad)
        assert module.embedding.weight.grad is None
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    trained = gradients[0].abs().sum(dim=1) > 0
    assert trained.tolist() == [True, True, True, False, False, True, True, False]


def test_cpt_rows_load_back_with_a_fresh_delta() -> None:
    ours, _, config, _ = cpt_pair()
    with torch.no_grad():
        ours.delta_embedding.weight.normal_()
    rows = CPT_METHOD.export(ours, config)["prompt_embeddings"]
    again, _, _, _ = cpt_pair()
    again.load_prompt_embeddings(rows)
    assert torch.equal(again.rows(), rows)


def test_a_bound_of_zero_gives_zero_not_nan() -> None:
    fields = {**CPT_FIELDS, "opt_projection_epsilon": 0.0, "opt_projection_format_epsilon": 0.0}
    module = CPTEmbedding(CPTConfig(**fields, token_dim=8), nn.Embedding(32, 8))  # type: ignore[arg-type]
    assert torch.equal(module.get_projection(), torch.zeros(8, 8))


@pytest.mark.parametrize("kind", ["decay", "none"])
def test_cpt_loss_is_pefts(kind: str) -> None:
    ours, theirs, config, other = cpt_pair()
    config.opt_weighted_loss_type = other.opt_weighted_loss_type = kind  # type: ignore[assignment]
    torch.manual_seed(5)
    labels = torch.randint(0, 32, (3, 6))
    types = torch.tensor([[1, 2, 2, 3, 4, 4], [1, 2, 3, 4, 4, 0], [2, 2, 3, 3, 4, 0]])
    joined, mask = with_context(config, labels, types)
    logits = torch.randn(3, 14, 32)
    expected = theirs.calculate_loss(SimpleNamespace(logits=logits), joined, mask, other).loss
    torch.testing.assert_close(cpt_loss(logits, joined, mask, config), expected)
    output = ours.calculate_loss(SimpleNamespace(logits=logits), joined, mask, config)
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("with_types", [True, False])
def test_with_context_trains_on_what_peft_trains_on(with_types: bool) -> None:
    fields = {**CPT_FIELDS, "cpt_token_ids": [3, 7, 11, 13], "cpt_mask": [1] * 4}
    fields["cpt_tokens_type_mask"] = [1, 2, 3, 4]
    model = oracle.peft_model(oracle.llama(), peft.CPTConfig(**fields))
    ids = torch.tensor([[5, 9, 33, 2]])
    types = torch.tensor([[1, 2, 3, 4]]) if with_types else None
    config = CPTConfig(**fields)  # type: ignore[arg-type]
    labels, mask = with_context(config, ids, types)
    extra = {} if types is None else {"input_type_mask": types.clone()}
    with torch.no_grad(), oracle.no_peft_warnings():
        out = model(input_ids=ids, labels=ids, **extra)
    torch.testing.assert_close(cpt_loss(out.logits, labels, mask, config), out.loss)
    if types is not None:
        assert types.tolist() == [[1, 2, 3, 4]]
        assert labels.tolist() == [[-100, -100, -100, 13, -100, -100, -100, 2]]
        assert mask.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cpt_mask": [1]}, "cpt_token_ids has 8 entries and cpt_mask has 1"),
        ({"cpt_tokens_type_mask": [1] * 9}, "cpt_tokens_type_mask has 9"),
        ({"cpt_token_ids": [-1]}, "cpt_token_ids.0"),
        ({"opt_projection_epsilon": -0.1}, "opt_projection_epsilon"),
        ({"opt_weighted_loss_type": "linear"}, "opt_weighted_loss_type"),
    ],
)
def test_cpt_config_refusals(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        parse_config(CPTConfig, {**CPT_FIELDS, **fields})


def test_cpt_defaults_are_pefts() -> None:
    ours = CPTConfig(task_type="CAUSAL_LM").model_dump(mode="json")
    theirs = peft.CPTConfig(task_type="CAUSAL_LM").to_dict()
    assert ours == {**theirs, "peft_version": None}


# --- IA3 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_feedforward", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "linear_no_bias", "conv1d"])
def test_ia3_linear_is_pefts(is_feedforward: bool, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    layer: nn.Module = {
        "linear": lambda: nn.Linear(6, 4),
        "linear_no_bias": lambda: nn.Linear(6, 4, bias=False),
        "conv1d": lambda: Conv1D(4, 6),
    }[kind]()
    layer = layer.to(dtype)
    ours = IA3Linear(layer, is_feedforward=is_feedforward)
    config = peft.IA3Config(fan_in_fan_out=kind == "conv1d")
    theirs = PeftIA3Linear(
        layer,
        "default",
        config=config,
        is_feedforward=is_feedforward,
        is_target_conv_1d_layer=kind == "conv1d",
    )
    assert (ours.in_features, ours.out_features) == (6, 4)
    assert ours.ia3_l.shape == theirs.ia3_l["default"].shape
    assert ours.ia3_l.dtype == torch.float32
    x = torch.randn(3, 6, dtype=dtype)
    # ones change nothing; PEFT moves its vector to the base's dtype when built alone
    assert torch.equal(ours(x), layer(x))
    with torch.no_grad():
        ours.ia3_l.normal_()
        theirs.ia3_l["default"].data = ours.ia3_l.data.clone()
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).dtype == dtype
    assert ours.weight is layer.weight
    assert ours.bias is layer.bias


def test_ia3_takes_linear_modules_only() -> None:
    with pytest.raises(TypeError, match="came Embedding"):
        IA3Linear(nn.Embedding(2, 2), is_feedforward=False)


def test_attach_and_detach_leave_the_base_as_it_was() -> None:
    model = oracle.gpt2()
    base = oracle.spec_of(model)
    before = {name: id(module) for name, module in model.named_modules()}
    plain = oracle.logits(model)
    layers = attach_ia3(model, IA3Config(), base)
    assert sorted(layers) == sorted(
        f"transformer.h.{layer}.{name}"
        for layer in (0, 1)
        for name in ("attn.c_attn", "mlp.c_proj")
    )
    assert torch.equal(oracle.logits(model), plain)
    with pytest.raises(ValueError, match="already"):
        attach_ia3(model, IA3Config(), base)
    detach_ia3(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    with pytest.raises(TypeError, match="IA3 attached"):
        IA3_METHOD.export(model, IA3Config())


def test_random_start() -> None:
    model = oracle.llama()
    layers = attach_ia3(model, IA3Config(init_ia3_weights=False), oracle.spec_of(model))
    assert all(
        not torch.equal(layer.ia3_l, torch.ones_like(layer.ia3_l)) for layer in layers.values()
    )
