"""`from adapters import ...` beside `from peft import ...`: the same calls, or what to use instead."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import inspect
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

import adapters
import graftwork
from adapters.errors import MethodUnsupported
from adapters.peft_names import absent_names
from tests.adapters.methods import oracle
from tests.documentation import ROOT
from tests.server.http_server import byte_level_tokenizer

CONFIGS = (
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "PromptEncoderConfig",
    "IA3Config",
    "CPTConfig",
)
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "w5 w6"}
# CPT's dimensions are set by PEFT whatever is given, and a set has no order.
UNSPECIFIED = {"peft_version"}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


def fields_of(config: Any) -> dict[str, Any]:
    """What a config says, sets as sorted lists."""
    return {
        name: sorted(value) if isinstance(value, set | list) else value
        for name, value in config.to_dict().items()
        if name not in UNSPECIFIED
    }


# --- names -----------------------------------------------------------------------------------


def test_every_name_of_peft_is_here_or_says_what_to_use():
    for name in peft.__all__:
        if name in adapters.__all__:
            assert getattr(adapters, name) is not None
            continue
        for package in ("adapters", "graftwork"):
            with pytest.raises(ImportError, match=f"there is no {name} here: ") as refused:
                exec(f"from {package} import {name}")
            assert refused.value.name == name


def test_the_table_of_absent_names_holds_no_name_that_is_here():
    assert not absent_names().keys() & {*adapters.__all__, *graftwork.__all__}
    with pytest.raises(ImportError, match="AdapterHub's library"):
        from adapters import AutoAdapterModel  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adapters.nothing
    assert {*adapters.__all__} <= {*dir(adapters)}
    assert adapters.__version__ == graftwork.__version__
    with pytest.raises(ImportError, match="import the name from adapters itself"):
        _ = adapters.tuners


def test_the_enumerations_have_pefts_members():
    for name in ("PeftType", "TaskType"):
        ours, theirs = getattr(adapters, name), getattr(peft, name)
        assert {one.name: one.value for one in ours} == {one.name: one.value for one in theirs}
        assert all(one == one.value for one in ours)


def test_the_manuals_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "extend" / "peft-names.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {})
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    missing = {name for name in adapters.__all__ if f"`{name}`" not in text}
    assert missing == {"IA3Linear", "METHODS", "method_of"}  # not PEFT's


# --- calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_arguments_have_pefts_names_order_and_defaults(name):
    theirs = [field for field in dataclasses.fields(getattr(peft, name)) if field.init]
    ours = getattr(adapters, name).model_fields
    assert list(ours) == [field.name for field in theirs]
    assert list(ours) == list(inspect.signature(getattr(peft, name)).parameters)
    for field in theirs:
        if field.name != "peft_type":  # PEFT sets it when it is called
            assert ours[field.name].default == field.default, field.name


GOOD: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("PrefixTuningConfig", ("CAUSAL_LM",), {}),
    ("PrefixTuningConfig", ("CAUSAL_LM", "PREFIX_TUNING", None, None, "base"), {}),
    ("PrefixTuningConfig", (), {"task_type": peft.TaskType.CAUSAL_LM, "num_virtual_tokens": 20}),
    ("PrefixTuningConfig", (), {"task_type": adapters.TaskType.SEQ_CLS}),
    ("PrefixTuningConfig", (), {"peft_type": peft.PeftType.PREFIX_TUNING}),
    ("PrefixTuningConfig", (), {"init_weights": "zero", "prefix_projection": True}),
    ("PromptTuningConfig", (), {**TEXT, "tokenizer_name_or_path": "t5-base"}),
    ("PromptTuningConfig", (), {"prompt_tuning_init": peft.PromptTuningInit.SAMPLE_VOCAB}),
    ("PromptTuningConfig", (), {"prompt_tuning_init": adapters.PromptTuningInit.RANDOM}),
    (
        "PromptEncoderConfig",
        (),
        {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1},
    ),
    ("IA3Config", (), {"target_modules": ["k", "v"], "feedforward_modules": ["v"]}),
    ("IA3Config", (), {"target_modules": {"k"}, "feedforward_modules": []}),
    ("IA3Config", (), {"target_modules": "all-linear", "feedforward_modules": ["down"]}),
    ("IA3Config", (), {"target_modules": ["k"], "feedforward_modules": ".*down"}),
    ("IA3Config", (), {"feedforward_modules": ["down"]}),
    ("IA3Config", (), {"feedforward_modules": None, "fan_in_fan_out": True}),
    ("CPTConfig", ("CAUSAL_LM",), {}),
    ("CPTConfig", ("CAUSAL_LM",), {"opt_projection_epsilon": 1, "tokenizer_name_or_path": "a"}),
    ("CPTConfig", (), {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1, 1]}),
]
BAD: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("PrefixTuningConfig", ("CAUSAL",), {}, "invalid task type 'CAUSAL'; expected one of"),
    ("PrefixTuningConfig", ("causal-lm",), {}, "did you mean 'CAUSAL_LM'"),
    ("PrefixTuningConfig", ("CausalLM",), {}, "did you mean 'CAUSAL_LM'"),
    ("PrefixTuningConfig", (), {"num_virtual_token": 20}, "did you mean 'num_virtual_tokens'"),
    ("PrefixTuningConfig", ("CAUSAL_LM",), {"task_type": "CAUSAL_LM"}, "multiple values"),
    ("PrefixTuningConfig", (None,) * 30, {}, "takes at most 16 arguments, 30 were given"),
    ("PrefixTuningConfig", (), {"pre_seq_len": 20}, "did you mean 'num_virtual_tokens'"),
    ("PromptTuningConfig", (), TEXT, "TEXT needs tokenizer_name_or_path"),
    (
        "PromptTuningConfig",
        (),
        {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"},
        "TEXT needs prompt_tuning_init_text",
    ),
    ("PromptTuningConfig", (), {"tokenizer_kwargs": {"a": 1}}, "TEXT only"),
    ("IA3Config", (["k"],), {}, "invalid task type"),
    (
        "IA3Config",
        (),
        {"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]},
        "feedforward_modules holds 'down_proj', which target_modules .'k_proj'. does not",
    ),
    (
        "IA3Config",
        (),
        {"target_modules": ["down_proj"], "feedforward_modules": ["mlp.down_proj"]},
        "holds .mlp.down_proj.",
    ),
    ("CPTConfig", (), {"cpt_token_ids": [1]}, "only supports task_type='CAUSAL_LM', came None"),
    ("CPTConfig", ("SEQ_CLS",), {}, "only supports"),
    (
        "CPTConfig",
        ("CAUSAL_LM",),
        {"cpt_token_ids": [1, 2], "cpt_mask": [1]},
        "cpt_token_ids has 2 entries",
    ),
    (
        "CPTConfig",
        ("CAUSAL_LM",),
        {"cpt_token_ids": [1], "cpt_tokens_type_mask": [1, 2]},
        "cpt_token_ids has 1 entries",
    ),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), GOOD)
def test_calls_that_peft_takes(name, args, kwargs):
    ours, theirs = getattr(adapters, name)(*args, **kwargs), getattr(peft, name)(*args, **kwargs)
    assert fields_of(ours) == fields_of(theirs)
    assert ours == getattr(adapters, name)(*args, **kwargs)
    assert ours.is_prompt_learning == theirs.is_prompt_learning
    assert ours.is_adaption_prompt == theirs.is_adaption_prompt
    assert str(ours).startswith(f"{name}(task_type=")


@pytest.mark.parametrize(("name", "args", "kwargs", "words"), BAD)
def test_calls_that_peft_refuses(name, args, kwargs, words):
    raised = []
    for library in (peft, adapters):
        with pytest.raises((TypeError, ValueError)) as refused:
            getattr(library, name)(*args, **kwargs)
        raised.append(refused)
    theirs, ours = raised
    assert isinstance(ours.value, TypeError) == isinstance(theirs.value, TypeError)
    ours.match(words)
    assert "validation error" not in str(ours.value)


def test_values_as_notebooks_have_them():
    ids = [3, 4]
    for given in (tuple(ids), np.array(ids), torch.tensor(ids)):
        assert adapters.CPTConfig("CAUSAL_LM", cpt_token_ids=given).cpt_token_ids == ids
    assert adapters.IA3Config(target_modules=("k", "v")).target_modules == ["k", "v"]
    assert adapters.PrefixTuningConfig(num_virtual_tokens=np.int64(3)).num_virtual_tokens == 3
    base = adapters.PeftConfig(base_model_name_or_path=Path("some") / "base")
    assert base.base_model_name_or_path == "some/base"
    left_out = adapters.PromptEncoderConfig(encoder_dropout=None, inference_mode=None)
    assert left_out == adapters.PromptEncoderConfig()


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_copied_and_listed_as_dataclasses_are(name):
    ours, theirs = (getattr(library, name)("CAUSAL_LM") for library in (adapters, peft))
    assert dataclasses.is_dataclass(ours)
    assert dataclasses.asdict(ours) == ours.to_dict()
    for change in (dataclasses.replace, lambda one, **to: one.model_copy(update=to)):
        assert change(ours, revision="b").revision == "b"
    assert [one.name for one in dataclasses.fields(ours)] == list(dataclasses.asdict(theirs))
    for same in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert same == ours
    with pytest.raises(ValueError, match="invalid task type"):
        dataclasses.replace(ours, task_type="CAUSAL")


def test_fields_are_set_as_attributes():
    config = adapters.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=4)
    other = adapters.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=4)
    assert config == other
    config.token_dim, config.num_layers = 5, 2
    assert config != other
    assert adapters.PrefixEncoder(config).embedding.weight.shape == (4, 20)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "args", "kwargs"), GOOD)
def test_what_one_library_saves_the_other_loads(name, args, kwargs, tmp_path):
    ours, theirs = getattr(adapters, name)(*args, **kwargs), getattr(peft, name)(*args, **kwargs)
    ours.save_pretrained(tmp_path / "a" / "ours", auto_mapping_dict={"base_model_class": "X"})
    theirs.save_pretrained(str(tmp_path / "theirs"))
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "a" / "ours"))
    assert type(read) is type(theirs)
    assert fields_of(read) == {**fields_of(theirs), "auto_mapping": {"base_model_class": "X"}}

    for loads in (adapters.PeftConfig, type(ours)):
        back = loads.from_pretrained(tmp_path, subfolder="theirs", token=None)
        assert type(back) is type(ours)
        assert fields_of(back) == fields_of(ours)
    raw = adapters.PeftConfig.from_json_file(tmp_path / "theirs" / "adapter_config.json")
    assert adapters.get_peft_config(raw) == back
    assert adapters.PEFT_TYPE_TO_CONFIG_MAPPING[raw["peft_type"]] is type(ours)


def test_folders_and_types_that_do_not_load(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter_config\.json at 'someone/adapter'"):
        adapters.PeftConfig.from_pretrained("someone/adapter")
    with pytest.raises(MethodUnsupported, match="LoRA adapters are not served"):
        adapters.PeftConfig.from_peft_type(peft_type=peft.PeftType.LORA, r=8)
    with pytest.warns(UserWarning, match="ignored as in PEFT: new_flag .true."):
        newer = adapters.IA3Config.from_peft_type(peft_type="IA3", new_flag=True)
    assert newer == adapters.IA3Config()
    with pytest.raises(ValueError, match="num_virtual_tokens: expected a whole number, came '3'"):
        adapters.PrefixTuningConfig(num_virtual_tokens="3")
    config = adapters.IA3Config.from_peft_type(target_modules=["k"])
    assert config == adapters.IA3Config(target_modules=["k"])
    with pytest.raises(ValueError, match="only supports task_type"):
        adapters.get_peft_config({"peft_type": "CPT"})
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder"):
        config.save_pretrained(tmp_path / "file")
    with pytest.raises(TypeError, match="no 'push_to_hub': it writes a folder"):
        config.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(NotImplementedError, match="hf upload"):
        config.push_to_hub("someone/adapter")


# --- modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PrefixEncoder", "PromptEncoder", "PromptEmbedding"])
def test_pefts_own_examples_run_with_these_classes(name, tokenizer_dir):
    names: dict[str, Any] = {
        "t5_model": SimpleNamespace(shared=nn.Embedding(400, 768)),
    }
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(peft, name)) or "")
    assert len(examples) == 3
    for example in examples:
        source = example.source.replace("from peft import", "from adapters import")
        exec(source.replace('"t5-base"', repr(tokenizer_dir)), names)
    (module,) = [value for value in names.values() if type(value) is getattr(adapters, name)]
    assert module(torch.arange(20).unsqueeze(0)).shape[:2] == (1, 20)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_text_is_tokenized_and_fitted_as_in_peft(count, tokenizer_dir):
    fields = {
        **TEXT,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": count,
        "token_dim": 8,
        "num_transformer_submodules": 1,
        "tokenizer_name_or_path": tokenizer_dir,
        "tokenizer_kwargs": {"trust_remote_code": True, "padding_side": "left"},
    }
    words = nn.Embedding(400, 8)
    ours = adapters.PromptEmbedding(adapters.PromptTuningConfig(**fields), words)
    theirs = peft.PromptEmbedding(peft.PromptTuningConfig(**fields), words)
    assert torch.equal(ours.embedding.weight, theirs.embedding.weight)

    gone = adapters.PromptTuningConfig(
        **{**fields, "tokenizer_name_or_path": f"{tokenizer_dir}/no"}
    )
    with pytest.raises(ValueError, match=r"no tokenizer loads from .* pass the text's tokens"):
        adapters.PromptEmbedding(gone, words)
    with pytest.raises(ValueError, match="the text has no tokens"):
        adapters.PromptEmbedding(gone, words, [])


def test_keys_and_values_of_a_text_become_a_prefix_as_in_peft():
    model = oracle.llama()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(6)[None], use_cache=True).past_key_values
    ours = adapters.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4)
    theirs = peft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4)
    assert torch.equal(ours, theirs)
    for value, error, words in (
        (cache, ValueError, "at least 7 cached positions, came 6"),
        ([], ValueError, "no layer"),
        (5, TypeError, "expected a cache"),
        ([(torch.zeros(2, 1, 9, 4),) * 2], ValueError, "expected .1, heads, positions, head size."),
        ([(torch.zeros(1, 1, 9, 4), torch.zeros(1, 2, 9, 4))], ValueError, "differ in shape"),
    ):
        with pytest.raises(error, match=words):
            adapters.prompt_embeddings_from_past_key_values(value, num_virtual_tokens=7)
