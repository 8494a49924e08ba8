"""What every method refuses of a checkpoint, and in which words."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.checkpoint.config import read_peft_config
from adapters.errors import (
    CheckpointError,
    ConfigInvalid,
    MethodUnsupported,
    NonFinite,
    TargetNotFound,
    TensorMismatch,
)
from adapters.method import TensorInfo, parse_config
from adapters.methods import METHODS, OTHER_PEFT_TYPES, method_of
from adapters.methods.ia3 import DEFAULT_TARGETS, IA3_METHOD, IA3Config, ia3_targets, load_ia3
from adapters.methods.ia3 import attach_ia3 as attach
from adapters.peft_types import TaskType
from server.base.load import load_base
from tests.adapters.methods import oracle
from tests.server.http_server import byte_level_tokenizer

LLAMA = oracle.spec_of(oracle.llama())
GPT2 = oracle.spec_of(oracle.gpt2())
BLOOM = oracle.spec_of(oracle.bloom())
QWEN2 = dataclasses.replace(LLAMA, kv_width="ratio")
PREFIX_WIDTH = 2 * 2 * 16

RAW: dict[str, dict[str, Any]] = {
    "PREFIX_TUNING": {"token_dim": 16, "num_attention_heads": 2},
    "P_TUNING": {"token_dim": 32, "num_attention_heads": 4, "encoder_hidden_size": 32},
    "CPT": {"token_dim": 32, "num_attention_heads": 4, "cpt_token_ids": [1, 2, 3, 4, 5]},
    "PROMPT_TUNING": {"token_dim": 32, "num_attention_heads": 4},
}
WIDTHS = {"PREFIX_TUNING": PREFIX_WIDTH, "P_TUNING": 32, "CPT": 32, "PROMPT_TUNING": 32}


def raw_of(peft_type: str, **fields: Any) -> dict[str, Any]:
    shared = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "num_layers": 2}
    return {**shared, "num_virtual_tokens": 5, **RAW[peft_type], **fields}


def check(raw: dict[str, Any], infos: dict[str, TensorInfo], base: Any = LLAMA) -> Any:
    return method_of(raw).check(oracle.parse(raw), infos, base)


def rows(width: int, count: int = 5, dtype: str = "F32") -> dict[str, TensorInfo]:
    return {"prompt_embeddings": TensorInfo(dtype, (count, width))}


# --- which method ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"peft_type": "LORA", "r": 8}, "LoRA adapters are not served"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "not served yet"),
        ({"peft_type": "OFT"}, "OFT is a method of PEFT that is not served"),
        ({"peft_type": "XYZ"}, "no method of PEFT that is known here"),
        ({"peft_type": 3}, "peft_type is 3, expected a text"),
        ({}, "has no peft_type"),
        ({"peft_type": None}, "has no peft_type"),
        ({"prefix_projection": False}, "has no peft_type.*its fields are those of PREFIX_TUNING"),
        ({"feedforward_modules": [], "target_modules": []}, "its fields are those of IA3"),
    ],
)
def test_method_of_refuses(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodUnsupported, match=words) as caught:
        method_of(raw)
    assert "served are PREFIX_TUNING, P_TUNING, IA3, CPT, PROMPT_TUNING" in str(caught.value)
    assert caught.value.field == "peft_type"


@pytest.mark.filterwarnings("ignore")
def test_the_lines_of_the_refusal_make_a_base_of_a_lora_adapter(tmp_path: Path) -> None:
    model = oracle.llama()
    model.save_pretrained(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, lora).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MethodUnsupported) as caught:
        method_of({"peft_type": "LORA"})
    code = str(caught.value).partition("as a base: ")[2].partition("; then")[0]
    for name in ("ADAPTER", "BASE", "MERGED"):
        code = code.replace(f'"{name}"', repr(str(tmp_path / name.lower())))
    exec(code, {})
    ids = torch.tensor([[1, 2, 3]])
    merged = load_base(str(tmp_path / "merged"), dtype="float32").model
    want = adapted(input_ids=ids).logits
    assert torch.allclose(merged(input_ids=ids).logits, want, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


@pytest.mark.parametrize("peft_type", ["MULTITASK_PROMPT_TUNING", "XLORA", "LILY"])
def test_what_peft_cannot_merge_is_not_said_to_be_merged(peft_type: str) -> None:
    with pytest.raises(MethodUnsupported, match="cannot merge it") as caught:
        method_of({"peft_type": peft_type})
    assert "merge_and_unload" not in str(caught.value)


@pytest.mark.parametrize(
    ("came", "meant"),
    [
        ("PeftType.PREFIX_TUNING", "PREFIX_TUNING"),
        ("prefix_tuning", "PREFIX_TUNING"),
        ("Prefix-Tuning", "PREFIX_TUNING"),
        ("P_TUNING_V2", "PREFIX_TUNING"),
        ("p-tuning", "P_TUNING"),
        ("PROMPTTUNING", "PROMPT_TUNING"),
        ("(IA)^3", "IA3"),
        ("cpt", "CPT"),
        ("lora", "LORA"),
    ],
)
def test_the_method_that_was_meant_is_named(came: str, meant: str) -> None:
    with pytest.raises(MethodUnsupported, match=rf"did you mean {meant}\?"):
        method_of({"peft_type": came})


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"model_type": "chatglm", "pre_seq_len": 8},
            "ChatGLM's P-Tuning v2 .* no PEFT checkpoint",
        ),
        ({"model_type": "llama", "vocab_size": 9}, "this is a model's config.json"),
        ({"architectures": ["GPT2LMHeadModel"]}, "this is a model's config.json"),
        ({"config": {"architecture": "prefix_tuning"}, "version": "adapters.1.0.0"}, "AdapterHub"),
        ({"name": "x", "version": "adapters.1.2.0"}, "AdapterHub"),
        ({"fine_tune_type": "lora", "num_layers": 16}, "MLX"),
        ({"stage": "sft", "finetuning_type": "lora"}, "LLaMA-Factory"),
        ({"output_dir": "out", "learning_rate": 1e-4}, "transformers or trl"),
        ({"base_model": "x", "micro_batch_size": 2}, "axolotl"),
        ({"zero_optimization": {"stage": 3}}, "DeepSpeed"),
        ({"swift_type": "PROMPT"}, "SWIFT"),
        ({"num_prefix_tokens": 8}, "PaddleNLP"),
        ({"delta_type": "prefix"}, "OpenDelta"),
        ({"tokenizer_class": "LlamaTokenizer"}, "a tokenizer's config"),
        ({"default": {"peft_type": "IA3"}}, "write that inner object"),
    ],
)
def test_a_config_of_another_program_is_named(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodUnsupported, match=words) as caught:
        method_of(raw)
    assert "no peft_type: th" in str(caught.value)
    assert "save_pretrained(...)" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("CausalLM", "no task of PEFT, which does not load it either; did you mean CAUSAL_LM?"),
        ("causal_lm", "did you mean CAUSAL_LM?"),
        ("TaskType.CAUSAL_LM", "did you mean CAUSAL_LM?"),
        ("text-generation", "did you mean CAUSAL_LM?"),
        ("TaskType.SEQ_CLS", "did you mean SEQ_CLS?"),
        ("dancing", "expected 'CAUSAL_LM'"),
        ("SEQ_CLS", "needs an output head of its own"),
    ],
)
def test_the_task_that_was_meant_is_named(task: str, words: str) -> None:
    with pytest.raises(MethodUnsupported, match=re.escape(words)):
        check(raw_of("PROMPT_TUNING", task_type=task), rows(32))


def test_the_table_is_keyed_by_peft_type() -> None:
    for peft_type, method in METHODS.items():
        assert method.peft_type == peft_type
        assert method.config_class.model_fields["peft_type"].default == peft_type
        assert method_of({"peft_type": peft_type}) is method
    assert len({method.name for method in METHODS.values()}) == len(METHODS)


def test_every_task_of_pefts_is_known() -> None:
    assert {str(task.value) for task in peft.TaskType} == set(TaskType)


def test_every_peft_type_of_pefts_is_known() -> None:
    known = OTHER_PEFT_TYPES | set(METHODS)
    assert {str(kind.value) for kind in peft.PeftType} <= known


# --- configs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_type", METHODS)
def test_fields_and_defaults_are_pefts(peft_type: str) -> None:
    theirs = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](task_type="CAUSAL_LM").to_dict()
    ours = METHODS[peft_type].config_class(task_type="CAUSAL_LM").model_dump(mode="json")
    plain = {key: getattr(value, "value", value) for key, value in theirs.items()}
    assert ours == {**plain, "peft_version": None}


@pytest.mark.parametrize("peft_type", METHODS)
def test_unknown_and_mistyped_keys_are_refused(peft_type: str) -> None:
    config_class = METHODS[peft_type].config_class
    with pytest.raises(ConfigInvalid, match="lora_alpha") as caught:
        parse_config(config_class, {"peft_type": peft_type, "lora_alpha": 8})
    assert caught.value.field == "lora_alpha"
    with pytest.raises(ConfigInvalid, match="inference_mode"):
        parse_config(config_class, {"peft_type": peft_type, "inference_mode": "yes"})
    with pytest.raises(ConfigInvalid, match="peft_type"):
        parse_config(config_class, {"peft_type": "LORA"})


OLD_CONFIGS: list[dict[str, Any]] = [
    # the keys that PEFT 0.5 wrote, before modules_to_save, exclude_modules and peft_version
    {
        "auto_mapping": None,
        "base_model_name_or_path": "/home/somebody/llama",
        "encoder_hidden_size": 16,
        "inference_mode": True,
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 5,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": 16,
    },
    {
        "auto_mapping": None,
        "base_model_name_or_path": "somebody/llama",
        "encoder_dropout": 0.0,
        "encoder_hidden_size": 128,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "LSTM",
        "inference_mode": True,
        "num_attention_heads": 4,
        "num_layers": 2,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 5,
        "peft_type": "P_TUNING",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": 32,
    },
    {
        "auto_mapping": None,
        "base_model_name_or_path": "somebody/llama",
        "inference_mode": True,
        "num_attention_heads": 4,
        "num_layers": 2,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 5,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Classify the text:",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": 32,
        "tokenizer_name_or_path": "somebody/llama",
    },
]


@pytest.mark.parametrize("raw", OLD_CONFIGS, ids=lambda raw: raw["peft_type"])
def test_configs_of_early_releases_pass(raw: dict[str, Any]) -> None:
    width = PREFIX_WIDTH if raw["peft_type"] == "PREFIX_TUNING" else 32
    assert check(raw, rows(width)).num_virtual_tokens == 5


def test_ia3_config_of_an_early_release_passes() -> None:
    raw = {
        "auto_mapping": None,
        "base_model_name_or_path": "somebody/llama",
        "fan_in_fan_out": False,
        "feedforward_modules": ["down_proj"],
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "peft_type": "IA3",
        "revision": None,
        "target_modules": ["k_proj", "down_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    assert check(raw, ia3_infos()).uses_scales


# --- virtual tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("peft_type", RAW)
@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"task_type": "SEQ_2_SEQ_LM"}, MethodUnsupported, "trained on an encoder-decoder"),
        ({"task_type": "SEQ_CLS"}, MethodUnsupported, "output head of its own"),
        ({"modules_to_save": ["lm_head"]}, MethodUnsupported, r"modules_to_save \('lm_head'\)"),
    ],
)
def test_virtual_token_refusals(
    peft_type: str, fields: dict[str, Any], error: type[CheckpointError], words: str
) -> None:
    infos = rows(WIDTHS[peft_type])
    assert check(raw_of(peft_type), infos).num_virtual_tokens == 5
    assert check(raw_of(peft_type, task_type=None, modules_to_save=[]), infos)
    with pytest.raises(error, match=words) as caught:
        check(raw_of(peft_type, **fields), infos)
    assert caught.value.field == next(iter(fields))
    assert caught.value.expected
    assert caught.value.came


# What PEFT reads of a config's dimensions, by method and base. The tensors are those of the base.
@pytest.mark.parametrize(
    ("peft_type", "base", "fields", "words"),
    [
        ("PREFIX_TUNING", LLAMA, {"num_layers": 3}, "num_layers is 3, but this base needs 2"),
        ("PREFIX_TUNING", GPT2, {"token_dim": 31}, "token_dim is 31, but this base needs 32"),
        ("PREFIX_TUNING", GPT2, {"num_attention_heads": 8}, "this base needs 4"),
        ("PREFIX_TUNING", QWEN2, {"num_attention_heads": 4}, "takes the one divided by the other"),
        (
            "PREFIX_TUNING",
            QWEN2,
            {"token_dim": None},
            r"token_dim is 32 \(the base's, as it is unset",
        ),
        ("PREFIX_TUNING", QWEN2, {"num_attention_heads": 0}, "16 and 2, 32 and 4, or both null"),
        ("P_TUNING", LLAMA, {"token_dim": 31}, "token_dim is 31, but this base needs 32"),
        ("PROMPT_TUNING", LLAMA, {"token_dim": 31}, "the tensors fit, but PEFT"),
    ],
)
def test_dimensions_that_peft_uses_are_the_bases(
    peft_type: str, base: Any, fields: dict[str, Any], words: str
) -> None:
    heads = {"num_attention_heads": base.num_kv_heads, "token_dim": base.num_kv_heads * 8}
    given = heads if peft_type == "PREFIX_TUNING" else {}
    width = 4 * base.num_kv_heads * 8 if peft_type == "PREFIX_TUNING" else 32
    assert check(raw_of(peft_type, **given), rows(width), base).warnings == ()
    raw = raw_of(peft_type, **{**given, **fields})
    with pytest.raises(TensorMismatch, match=words):
        check(raw, rows(width), base)
    with pytest.raises(TensorMismatch, match=words.replace("the tensors fit, but PEFT", "leave")):
        METHODS[peft_type].complete_config(oracle.parse(raw), base)


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING"])
def test_rows_for_an_encoder_and_a_decoder_are_refused(peft_type: str) -> None:
    raw = raw_of(peft_type, num_transformer_submodules=2)
    with pytest.raises(MethodUnsupported, match="belongs to encoder-decoders"):
        check(raw, rows(WIDTHS[peft_type]))


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING"])
@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "num_virtual_tokens is 0"),
        (-1, "num_virtual_tokens is -1"),
        (None, "num_virtual_tokens is unset"),
        (64, "at most 63"),
        (20_000_000, "the base has 64 positions"),
    ],
)
def test_virtual_tokens_are_bounded(peft_type: str, count: int | None, words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        check(raw_of(peft_type, num_virtual_tokens=count), rows(WIDTHS[peft_type]))


def test_cpt_without_context_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="num_virtual_tokens is 0"):
        check(raw_of("CPT", cpt_token_ids=[], num_virtual_tokens=0), rows(32))


@pytest.mark.parametrize("peft_type", RAW)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda good: {}, "lacks 'prompt_embeddings'"),
        (lambda good: {"embedding.weight": good}, "came: 'embedding.weight'"),
        (
            lambda good: {"prompt_embeddings": good, "lm_head.weight": good},
            "'lm_head.weight', which binds to nothing",
        ),
        (
            lambda good: {"prompt_embeddings": dataclasses.replace(good, dtype="I64")},
            "dtype I64, expected one of F32, F16, BF16, F64",
        ),
        (
            lambda good: {"prompt_embeddings": TensorInfo("F32", (4, good.shape[1]))},
            r"shape \(4, \d+\), expected \(5, ",
        ),
        (
            lambda good: {"prompt_embeddings": TensorInfo("F32", (5, good.shape[1] + 1))},
            r"expected \(5, \d+\) \(num_virtual_tokens, ",
        ),
        (lambda good: {"prompt_embeddings": TensorInfo("F32", (5,))}, r"shape \(5,\)"),
    ],
)
def test_tensors_must_bind(peft_type: str, change: Any, words: str) -> None:
    good = TensorInfo("F32", (5, WIDTHS[peft_type]))
    with pytest.raises(TensorMismatch, match=words):
        check(raw_of(peft_type), change(good))


def test_a_prefix_for_all_query_heads_does_not_fit_grouped_queries() -> None:
    raw = raw_of("PREFIX_TUNING", token_dim=32, num_attention_heads=4)
    with pytest.raises(TensorMismatch, match=r"shape \(5, 128\), expected \(5, 64\)"):
        check(raw, rows(128))


def test_values_that_are_not_finite_are_refused() -> None:
    raw = raw_of("P_TUNING")
    for bad in (float("nan"), 1e300):
        tensors = {"prompt_embeddings": torch.full((5, 32), bad, dtype=torch.float64)}
        with pytest.raises(NonFinite, match="NaN or infinity"):
            method_of(raw).serving_form(oracle.parse(raw), tensors, LLAMA)


def test_a_context_outside_the_vocabulary_is_refused_before_training() -> None:
    raw = raw_of("CPT", cpt_token_ids=[1, 2, 3, 4, 64])
    with pytest.raises(ConfigInvalid, match="cpt_token_ids holds 64"):
        METHODS["CPT"].complete_config(oracle.parse(raw), LLAMA)  # type: ignore[attr-defined]


# --- IA3 -------------------------------------------------------------------------------------


def ia3_infos(base: Any = LLAMA, config: IA3Config | None = None) -> dict[str, TensorInfo]:
    infos = {}
    for path, is_feedforward in ia3_targets(config or IA3Config(), base).items():
        spec = base.linear_modules[path]
        shape = (1, spec.in_features) if is_feedforward else (spec.out_features, 1)
        infos[f"base_model.model.{path}.ia3_l"] = TensorInfo("F32", shape)
    return infos


def ia3_raw(**fields: Any) -> dict[str, Any]:
    lists = {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    }
    return {"peft_type": "IA3", "task_type": "CAUSAL_LM", **lists, **fields}


K0 = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
DOWN0 = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"task_type": "SEQ_2_SEQ_LM"}, MethodUnsupported, "encoder-decoder"),
        ({"modules_to_save": ["score"]}, MethodUnsupported, "modules_to_save"),
        ({"target_modules": ["k_prj"]}, TargetNotFound, "near ones: 'k_proj'"),
        ({"target_modules": []}, TargetNotFound, "matches no linear module"),
        ({"target_modules": ["k_proj", "down_proj"]}, TensorMismatch, "does not name"),
        (
            {"target_modules": ["k_proj", "v_proj", "down_proj", "q_proj"]},
            TensorMismatch,
            "q_proj.*for which the checkpoint has no tensor",
        ),
        ({"feedforward_modules": []}, TensorMismatch, "does not name it"),
        (
            {"feedforward_modules": ["down_proj", "k_proj"]},
            TensorMismatch,
            r"scales the output of .* names it",
        ),
    ],
)
def test_ia3_refusals(fields: dict[str, Any], error: type[CheckpointError], words: str) -> None:
    assert check(ia3_raw(), ia3_infos()).warnings == ()
    with pytest.raises(error, match=words):
        check(ia3_raw(**fields), ia3_infos())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda good: good.clear(), TensorMismatch, "holds no tensor"),
        (lambda good: good.pop(K0), TensorMismatch, "has no tensor"),
        (
            lambda good: good.update({K0: TensorInfo("F32", (1, 16))}),
            TensorMismatch,
            r"expected \(16, 1\) .* or \(1, 32\)",
        ),
        (
            lambda good: good.update({DOWN0: TensorInfo("F32", (32, 1))}),
            TensorMismatch,
            "scales the output of",
        ),
        (lambda good: good.update({K0: TensorInfo("I8", (16, 1))}), TensorMismatch, "dtype I8"),
        (
            lambda good: good.update({"prompt_embeddings": TensorInfo("F32", (5, 32))}),
            TensorMismatch,
            "binds to nothing",
        ),
        (
            lambda good: good.update({K0.replace("ia3_l", "lora_A.weight"): good[K0]}),
            TensorMismatch,
            "lora_A.weight' binds to nothing",
        ),
        (
            lambda good: good.update({K0.replace("layers.0", "layers.7"): good[K0]}),
            TargetNotFound,
            r"near ones: 'model\.layers",
        ),
        (
            lambda good: good.update({"base_model.model.lm_head.ia3_l": good[K0]}),
            TargetNotFound,
            "output head",
        ),
    ],
)
def test_ia3_tensors_must_bind(change: Any, error: type[CheckpointError], words: str) -> None:
    infos = ia3_infos()
    change(infos)
    with pytest.raises(error, match=words):
        check(ia3_raw(), infos)


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (LLAMA, {"k_proj": False, "v_proj": False, "down_proj": True}),
        (GPT2, {"c_attn": False, "c_proj": True}),
        (BLOOM, {"query_key_value": False, "dense_4h_to_h": True}),
    ],
    ids=["llama", "gpt2", "bloom"],
)
def test_default_targets(base: Any, names: dict[str, bool]) -> None:
    found = ia3_targets(IA3Config(), base)
    assert {path.rpartition(".")[2]: kind for path, kind in found.items()} == names
    assert not any("attn.c_proj" in path for path in found)
    assert check(ia3_raw(target_modules=None, feedforward_modules=None), ia3_infos(base), base)


def test_a_regex_that_peft_saved_is_kept_and_never_run() -> None:
    bomb = "(a+)+$"
    config = oracle.parse(ia3_raw(target_modules=bomb, feedforward_modules=bomb))
    assert config.target_modules == bomb
    assert IA3_METHOD.check(config, ia3_infos(), LLAMA).uses_scales
    with pytest.raises(ConfigInvalid, match="regular expression"):
        ia3_targets(config, LLAMA)
    with pytest.raises(ConfigInvalid, match="exclude_modules"):
        ia3_targets(IA3Config(exclude_modules=bomb), LLAMA)


def test_a_target_that_matches_nothing_beside_others_is_a_warning() -> None:
    raw = ia3_raw(target_modules=["k_proj", "v_proj", "down_proj", "w0"])
    assert check(raw, ia3_infos()).warnings == (
        "target_modules: 'w0' matches no module of the base",
    )


def test_excluded_modules_need_no_tensor() -> None:
    infos = ia3_infos()
    del infos[K0]
    assert check(ia3_raw(exclude_modules=["layers.0.self_attn.k_proj"]), infos)
    targets = ia3_targets(IA3Config(exclude_modules=["k_proj", "v_proj"]), LLAMA)
    assert {path.rpartition(".")[2] for path in targets} == {"down_proj"}
    with pytest.raises(TargetNotFound, match="leaves no target"):
        ia3_targets(IA3Config(target_modules=["k_proj"], exclude_modules=["k_proj"]), LLAMA)


def test_targets_of_our_own_training_are_refused_by_name() -> None:
    with pytest.raises(TargetNotFound, match="near ones: 'q_proj'"):
        ia3_targets(IA3Config(target_modules=["qproj", "v_proj"]), LLAMA)
    unknown = dataclasses.replace(LLAMA, model_type="unheard_of")
    with pytest.raises(ConfigInvalid, match="no default for 'unheard_of'"):
        ia3_targets(IA3Config(), unknown)


def test_ia3_completed_config_is_one_that_peft_takes() -> None:
    only_output = IA3_METHOD.complete_config(IA3Config(target_modules=["q_proj"]), LLAMA)
    assert only_output.feedforward_modules == []
    every = IA3_METHOD.complete_config(IA3Config(target_modules="all-linear"), LLAMA)
    assert every.target_modules == list(LLAMA.linear_modules)
    assert every.feedforward_modules == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert IA3_METHOD.complete_config(IA3Config(), GPT2).fan_in_fan_out is True
    for config in (only_output, every):
        theirs = peft.IA3Config(**config.model_dump(mode="json"))
        model = oracle.peft_model(oracle.llama(), theirs)
        saved = peft.get_peft_model_state_dict(model)
        assert {name: tuple(value.shape) for name, value in saved.items()} == {
            name: info.shape for name, info in ia3_infos(LLAMA, config).items()
        }
    stray = {"target_modules": ["q_proj"], "feedforward_modules": ["down_proj"]}
    with pytest.raises(ConfigInvalid, match="not among the targets"):
        IA3_METHOD.complete_config(parse_config(IA3Config, stray), LLAMA)


def test_sets_are_taken_and_stored_in_order() -> None:
    config = IA3Config(target_modules={"v_proj", "k_proj"})  # type: ignore[arg-type]
    assert config.target_modules == ["k_proj", "v_proj"]


def test_square_modules_are_told_apart_by_shape() -> None:
    path = "model.layers.0.self_attn.q_proj"
    name = f"base_model.model.{path}.ia3_l"
    for shape, side in (((32, 1), "outputs"), ((1, 32), "inputs")):
        config = IA3Config(target_modules="a regex", feedforward_modules="a regex")
        form = IA3_METHOD.serving_form(config, {name: torch.ones(shape)}, LLAMA)
        assert list(getattr(form, side)) == [path]


def test_vectors_load_only_where_they_fit() -> None:
    model = oracle.llama()
    attach(model, IA3Config(), LLAMA)
    good = {name: torch.ones(info.shape) for name, info in ia3_infos().items()}
    load_ia3(model, good)
    with pytest.raises(TensorMismatch, match="differ in"):
        load_ia3(model, {name: value for name, value in good.items() if name != K0})
    with pytest.raises(TensorMismatch, match=r"expected \(16, 1\)"):
        load_ia3(model, {**good, K0: torch.ones(1, 16)})


def test_default_tables_are_pefts() -> None:
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    for model_type, (targets, feedforward) in DEFAULT_TARGETS.items():
        assert targets == TARGETS[model_type], model_type
        assert feedforward == FEEDFORWARD[model_type], model_type


def test_long_lists_of_a_stranger_take_no_time_and_no_room() -> None:
    many = [f"n{index}" for index in range(100_000)]
    raw = ia3_raw(target_modules=["k_proj", "v_proj", "down_proj", *many], exclude_modules=many)
    raw["feedforward_modules"] = ["down_proj", *many]
    start = time.process_time()
    (warning,) = check(raw, ia3_infos()).warnings
    with pytest.raises(TargetNotFound) as caught:
        check(ia3_raw(target_modules=["x" * 1_000_000]), ia3_infos())
    assert time.process_time() - start < 5
    assert len(warning) < 1000
    assert len(str(caught.value)) < 1000


# --- names that PEFT loads without effect ----------------------------------------------------


def wrapped(names: Iterable[str], wrapper: str) -> list[str]:
    """The names as a model inside a wrapper has them."""
    return [name.replace("base_model.model.", f"base_model.model.{wrapper}") for name in names]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda names: wrapped(names, "_orig_mod."), "left by torch.compile"),
        (lambda names: wrapped(names, "_fsdp_wrapped_module."), "left by FSDP"),
        (lambda names: [f"module.{name}" for name in names], "left by DataParallel"),
        (lambda names: [f"_orig_mod.module.{name}" for name in names], "torch.compile and Data"),
        (lambda names: [name.removeprefix("base_model.model.") for name in names], "lack what"),
        (lambda names: [f"{name}.mine" for name in names], "hold the adapter's name"),
        (lambda names: wrapped([f"{name}.default" for name in names], "module."), "left by Data"),
    ],
)
def test_names_without_effect_are_refused_with_the_renaming(
    change: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = ia3_infos()
    names = change(list(good))
    file = tmp_path / "adapter_model.safetensors"
    save_file(
        {name: torch.ones(info.shape) for name, info in zip(names, good.values(), strict=True)},
        file,
    )
    raw = {"peft_type": "IA3", "task_type": "CAUSAL_LM"}
    with pytest.raises(TensorMismatch, match=words) as caught:
        check(raw, dict(zip(names, good.values(), strict=True)))
    monkeypatch.chdir(tmp_path)
    run_the_command(caught.value.message)
    mended = {name: TensorInfo("F32", tuple(t.shape)) for name, t in load_file(file).items()}
    assert check(raw, mended).uses_scales


@pytest.mark.parametrize(
    "name", ["prompt_embeddings.default", "module.prompt_embeddings", "prefix.weight"]
)
def test_rows_of_another_name_are_refused_with_the_renaming(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({name: torch.ones(5, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TensorMismatch, match="lacks 'prompt_embeddings'") as caught:
        check(raw_of("PROMPT_TUNING"), {name: TensorInfo("F32", (5, 32))})
    monkeypatch.chdir(tmp_path)
    run_the_command(caught.value.message)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["prompt_embeddings"]


def run_the_command(message: str) -> None:
    code = message.partition('python -c "')[2].rpartition('"')[0]
    exec(code, {})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "of LoRA"),
        ("transformer.prefix_encoder.embedding.weight", "P-Tuning v2, which is no PEFT"),
        ("base_model.model.lm_head.weight", "save_embedding_layers=False"),
        ("prompt_encoder.default.mlp_head.0.weight", "save_pretrained stores its output"),
    ],
)
def test_tensors_of_something_else_are_named(name: str, words: str) -> None:
    infos = {**rows(32), name: TensorInfo("F32", (4, 4))}
    with pytest.raises(TensorMismatch, match=words):
        check(raw_of("P_TUNING"), infos)
    with pytest.raises(TensorMismatch, match=words):
        check({"peft_type": "IA3"}, {**ia3_infos(), name: TensorInfo("F32", (4, 4))})


def test_a_shard_of_zero3_is_named() -> None:
    with pytest.raises(TensorMismatch, match=r"shape \(0,\).*ZeRO-3"):
        check(raw_of("PROMPT_TUNING"), {"prompt_embeddings": TensorInfo("F32", (0,))})
    infos = dict.fromkeys(ia3_infos(), TensorInfo("F32", (0,)))
    with pytest.raises(TensorMismatch, match=r"shape \(0,\).*ZeRO-3"):
        check({"peft_type": "IA3"}, infos)


def test_ia3_names_with_the_adapters_name_bind_as_in_peft() -> None:
    infos = {f"{name}.default": info for name, info in ia3_infos().items()}
    assert check({"peft_type": "IA3"}, infos).uses_scales
    with pytest.raises(TensorMismatch, match="twice, with and without"):
        check({"peft_type": "IA3"}, {**infos, **ia3_infos()})


@pytest.mark.parametrize(
    "fields", [{"cpt_token_ids": ["a"] * 100_000}, {f"field {n}": n for n in range(50_000)}]
)
def test_a_config_of_many_faults_is_refused_or_read_at_once(fields: dict[str, Any]) -> None:
    """Explaining every one of them would take minutes."""
    start = time.process_time()
    with contextlib.suppress(ConfigInvalid):
        read_peft_config(METHODS["CPT"], raw_of("CPT", **fields))
    assert time.process_time() - start < 10
