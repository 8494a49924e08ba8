"""What PEFT loads is served with PEFT's numbers, whatever else its `adapter_config.json` says.

PEFT saves an adapter; fields of its config are set to null, to a stale number or to something unknown; then
PEFT and the server load the same folder. They must hold the same tensors, or the server must say why not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.checkpoint.field_names import FORK_FIELDS, PEFT_FIELDS
from adapters.checkpoint.folder import (
    CONFIG_FILE,
    TENSORS_FILE,
    check_checkpoint,
    load_serving_form,
)
from adapters.errors import AdapterError, CheckpointError
from adapters.parts import ActivationScales, KVPrefix, ServingForm, SoftPrompt
from tests.conformance.peft_oracle import make_adapter
from tests.tiny_models import tiny_model, tiny_spec

# Bases whose keys' width PEFT takes from their config, from the adapter's ratio, and as it is given.
BASES = ("llama", "qwen3", "qwen2", "gpt2")
METHOD_VARIANTS = {
    "PREFIX_TUNING": "prefix",
    "P_TUNING": "p-tuning-lstm",
    "PROMPT_TUNING": "prompt-tuning",
    "CPT": "cpt",
    "IA3": "ia3",
}
Tensors = dict[str, torch.Tensor]


@cache
def saved(base: str, peft_type: str) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of an adapter as PEFT saves it."""
    with TemporaryDirectory() as folder, quiet():
        directory = Path(folder)
        make_adapter(tiny_model(base), base, METHOD_VARIANTS[peft_type], directory)
        config = json.loads((directory / CONFIG_FILE).read_text())
        return config, safetensors.torch.load_file(directory / TENSORS_FILE)


@cache
def spec(base: str) -> Any:
    return tiny_spec(tiny_model(base))


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- both sides of one folder ----------------------------------------------------------------


def ours(folder: Path, base: str) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors that are served, and the upload's warnings."""
    checked = check_checkpoint(folder, spec(base))
    return flat(load_serving_form(folder, spec(base))), checked.warnings


def flat(form: ServingForm) -> Tensors:
    if isinstance(form, KVPrefix):
        return {"keys": form.keys, "values": form.values}
    if isinstance(form, SoftPrompt):
        return {"rows": form.embeddings}
    assert isinstance(form, ActivationScales)
    sides = {"in": form.inputs, "out": form.outputs}
    return {f"{side} {path}": t for side, found in sides.items() for path, t in found.items()}


def pefts(folder: Path, base: str) -> Tensors:
    """The tensors that PEFT's model computes with; raises what PEFT raises."""
    plain = tiny_model(base)
    with quiet():
        model = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
        kind = model.active_peft_config.peft_type
        if kind == "IA3":
            return scales(model)
        if type(model) is peft.PeftModel:
            return {}  # without a task PEFT's model calls the base and nothing else
        with torch.no_grad():
            prompt = model.get_prompt(1)
            model(input_ids=torch.tensor([[5, 9]]), attention_mask=torch.ones(1, 2))
    if kind != "PREFIX_TUNING":
        return {"rows": prompt[0]}
    layers = prompt.layers
    return {
        "keys": torch.stack([layer.keys[0] for layer in layers]),
        "values": torch.stack([layer.values[0] for layer in layers]),
    }


def scales(model: Any) -> Tensors:
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.ia3.layer.IA3Layer):
            side = "in" if module.is_feedforward else "out"
            found[f"{side} {name}"] = module.ia3_l["default"].detach().flatten()
    return found


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write(folder: Path, config: dict[str, Any] | bytes, tensors: Tensors) -> Path:
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / CONFIG_FILE).write_bytes(data)
    safetensors.torch.save_file(tensors, folder / TENSORS_FILE)
    return folder


# --- configs as people have them ---------------------------------------------------------------

UNREDUCED = {"token_dim": 32, "num_attention_heads": 4}
LEFT_OUT = object()

# method, base, changed fields, what a warning must name
SERVED: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("PREFIX_TUNING", "llama", UNREDUCED, ("token_dim is 32, this base has 16", "is 4, this")),
    ("PREFIX_TUNING", "llama", {**UNREDUCED, "init_weights": "zero"}, ("token_dim",)),
    ("PREFIX_TUNING", "llama", {"token_dim": 32}, ("token_dim is 32",)),
    ("PREFIX_TUNING", "llama", {"num_attention_heads": 3}, ("num_attention_heads is 3",)),
    ("PREFIX_TUNING", "qwen3", {"num_attention_heads": 4}, ("num_attention_heads is 4",)),
    ("PREFIX_TUNING", "qwen2", UNREDUCED, ("token_dim", "num_attention_heads")),
    ("PREFIX_TUNING", "qwen2", {"token_dim": None, "num_attention_heads": None}, ()),
    ("PREFIX_TUNING", "gpt2", {"token_dim": None, "num_layers": None}, ()),
    ("PREFIX_TUNING", "llama", {"future_field": None}, ("future_field (null)",)),
    ("PREFIX_TUNING", "llama", {"postprocess_past_key_value_function": None}, ("postprocess",)),
    ("PREFIX_TUNING", "llama", {"inference_mode": None, "prefix_projection": None}, ()),
    ("PREFIX_TUNING", "llama", {"inference_mode": "yes"}, ("inference_mode is 'yes'",)),
    ("PREFIX_TUNING", "llama", {"init_weights": "ones"}, ("init_weights",)),
    ("PREFIX_TUNING", "llama", {"num_transformer_submodules": LEFT_OUT}, ()),
    ("PREFIX_TUNING", "llama", {"lora_alpha": 16, "r": 8}, ("lora_alpha (16), r (8)",)),
    ("PREFIX_TUNING", "llama", {"max_grad_norm": 1.0, "notes": "a"}, ("max_grad_norm", "notes")),
    ("PROMPT_TUNING", "llama", {"num_attention_heads": 3}, ("num_attention_heads is 3",)),
    ("PROMPT_TUNING", "llama", {"num_layers": 12}, ("num_layers is 12, this base has 3",)),
    ("PROMPT_TUNING", "llama", {"num_layers": "12"}, ("num_layers is '12'",)),
    ("PROMPT_TUNING", "llama", {"prompt_tuning_init": "PromptTuningInit.TEXT"}, ("prompt_tun",)),
    ("PROMPT_TUNING", "llama", {"prompt_tuning_init": "random"}, ("prompt_tuning_init",)),
    ("PROMPT_TUNING", "llama", {"prompt_tuning_init": None, "init_prompts": None}, ("init_pro",)),
    ("PROMPT_TUNING", "llama", {"some_flag": False, "scaling": 1.0}, ("some_flag (false)",)),
    (
        "PROMPT_TUNING",
        "llama",
        {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "",
            "tokenizer_name_or_path": "gone/away",
        },
        (),
    ),
    ("P_TUNING", "llama", {"num_layers": 12, "num_attention_heads": 12}, ("num_layers", "heads")),
    ("P_TUNING", "llama", {"encoder_num_layers": None, "encoder_dropout": None}, ()),
    ("P_TUNING", "llama", {"encoder_dropout": 5, "encoder_hidden_size": "a"}, ("encoder_drop",)),
    ("P_TUNING", "llama", {"encoder_reparameterization_type": "Type.MLP"}, ("Type.MLP",)),
    ("CPT", "llama", {"num_layers": 12, "token_dim": 7}, ("num_layers is 12", "token_dim is 7")),
    ("CPT", "llama", {"num_virtual_tokens": 3}, ("num_virtual_tokens is 3, this adapter has 9",)),
    ("CPT", "llama", {"num_transformer_submodules": 2}, ("num_transformer_submodules",)),
    ("CPT", "llama", {"opt_loss_decay_factor": None, "opt_weighted_loss_type": None}, ()),
    ("CPT", "llama", {"opt_weighted_loss_type": "exp"}, ("opt_weighted_loss_type",)),
    ("IA3", "llama", {"fan_in_fan_out": None, "init_ia3_weights": None}, ()),
    ("IA3", "llama", {"fan_in_fan_out": True, "init_ia3_weights": "no"}, ("init_ia3_weights",)),
    ("IA3", "llama", {"task_type": None}, ()),
    ("IA3", "llama", {"target_modules": None, "feedforward_modules": None}, ()),
    ("IA3", "llama", {"feedforward_modules": ".*down_proj"}, ()),
    ("IA3", "llama", {"num_layers": 3, "runtime_config": {}}, ("num_layers (3)",)),
    ("IA3", "gpt2", {"fan_in_fan_out": False}, ()),
]


@pytest.mark.parametrize(("peft_type", "base", "fields", "named"), SERVED)
def test_a_config_that_peft_loads_is_served_with_its_numbers(
    peft_type: str, base: str, fields: dict[str, Any], named: tuple[str, ...], tmp_path: Path
) -> None:
    config, tensors = saved(base, peft_type)
    changed = {k: v for k, v in {**config, **fields}.items() if v is not LEFT_OUT}
    form, found = ours(write(tmp_path, changed, tensors), base)
    assert same(form, pefts(tmp_path, base))
    assert bool(found) == bool(named)
    for words in named:
        assert any(words in sentence for sentence in found), found


# method, base, changed fields, the field of the refusal, its words
REFUSED: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("PREFIX_TUNING", "llama", {"num_layers": 12}, "num_layers", "the tensors fit, but PEFT"),
    ("PREFIX_TUNING", "qwen2", {"num_attention_heads": 4}, "token_dim", "the one divided by"),
    ("PREFIX_TUNING", "qwen2", {"token_dim": None}, "token_dim", "as it is unset"),
    ("PREFIX_TUNING", "gpt2", {"num_attention_heads": 2}, "num_attention_heads", "base needs 4"),
    ("PREFIX_TUNING", "llama", {"num_virtual_tokens": None}, "num_virtual_tokens", "is unset"),
    ("PREFIX_TUNING", "llama", {"num_virtual_tokens": "7"}, "num_virtual_tokens", "whole number"),
    ("PREFIX_TUNING", "llama", {"num_virtual_tokens": 6}, "prompt_embeddings", "(7, 96)"),
    ("PREFIX_TUNING", "llama", {"num_transformer_submodules": 2}, "num_transformer_sub", "encoder"),
    ("PREFIX_TUNING", "llama", {"task_type": None}, "task_type", "answers with the base alone"),
    ("PREFIX_TUNING", "llama", {"task_type": "CausalLM"}, "task_type", "did you mean CAUSAL_LM"),
    ("PREFIX_TUNING", "llama", {"peft_type": "PeftType.IA3"}, "peft_type", "did you mean IA3"),
    ("PROMPT_TUNING", "llama", {"token_dim": 16}, "token_dim", "base needs 32"),
    ("PROMPT_TUNING", "llama", {"prompt_tuning_init": "TEXT"}, "", "needs tokenizer_name_or_path"),
    ("PROMPT_TUNING", "llama", {"tokenizer_kwargs": {"a": 1}}, "", "TEXT only"),
    ("CPT", "llama", {"task_type": None}, "task_type", "CAUSAL_LM"),
    ("CPT", "llama", {"cpt_mask": [1]}, "", "cpt_mask has 1"),
    ("CPT", "llama", {"cpt_token_ids": None}, "", "cpt_token_ids has 1 entries"),
    ("IA3", "llama", {"feedforward_modules": ["proj"]}, "feedforward_modules", "word for word"),
    (
        "IA3",
        "llama",
        {"feedforward_modules": [f"model.layers.{n}.mlp.down_proj" for n in range(3)]},
        "feedforward_modules",
        "word for word",
    ),
    ("IA3", "llama", {"target_modules": ["k_proj", "v_proj"]}, "feedforward_modules", "subset"),
    ("IA3", "llama", {"target_modules": "down_proj"}, "target_modules", "word for word"),
    ("IA3", "llama", {"target_modules": []}, "", ""),
    ("IA3", "llama", {"feedforward_modules": "down_proj"}, "base_model", "the pattern 'down_proj'"),
    ("IA3", "llama", {"exclude_modules": ["down_proj"]}, "target_modules", "exclude_modules"),
    ("IA3", "llama", {"target_modules": ["_proj", "down_proj"]}, "target_modules", "word for word"),
]


@pytest.mark.parametrize(("peft_type", "base", "fields", "field", "words"), REFUSED)
def test_a_config_that_peft_does_not_load_is_refused(
    peft_type: str, base: str, fields: dict[str, Any], field: str, words: str, tmp_path: Path
) -> None:
    config, tensors = saved(base, peft_type)
    write(tmp_path, {**config, **fields}, tensors)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(tmp_path, spec(base))
    assert (caught.value.field or "").startswith(field)
    assert words in caught.value.message or words in (caught.value.expected or "")
    write(tmp_path, config, tensors)
    good = pefts(tmp_path, base)
    write(tmp_path, {**config, **fields}, tensors)
    assert not peft_gives(good, tmp_path, base)


def peft_gives(good: Tensors, folder: Path, base: str) -> bool:
    """Whether PEFT loads the folder, runs it, and computes with these tensors."""
    try:
        return same(good, pefts(folder, base))
    except Exception:  # PEFT raises whatever torch, a dict or transformers raise
        return False


# Unknown fields with something in them, of programs that compute something else.
@pytest.mark.parametrize(
    "fields",
    [
        {"origin_prompts": ["a", "b"]},
        {"init_prompts": ["a"]},
        {"postprocess_past_key_value_function": "f"},
        {"scaling": 2.0},
        {"prefix_scale": 0.5},
        {"promptGate": True},
        {"prompt_position": "suffix"},
        {"insert_layers": [3, 4]},
        {"num_prompts": 4},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_an_unknown_field_that_may_change_the_numbers_is_refused(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    (name,) = fields
    config, tensors = saved("llama", "PROMPT_TUNING")
    write(tmp_path, {**config, **fields}, tensors)
    with pytest.raises(CheckpointError, match="is no field of PROMPT_TUNING in PEFT") as caught:
        check_checkpoint(tmp_path, spec("llama"))
    assert caught.value.field == name
    write(tmp_path, {**config, name: None}, tensors)
    assert any(name in sentence for sentence in check_checkpoint(tmp_path, spec("llama")).warnings)


def test_every_field_of_peft_is_known() -> None:
    every = {
        name
        for config_class in peft.PEFT_TYPE_TO_CONFIG_MAPPING.values()
        for name in config_class.__dataclass_fields__
    }
    assert every <= PEFT_FIELDS


# --- any field null, stale or unknown -----------------------------------------------------------

UNKNOWN = st.sampled_from(
    [*FORK_FIELDS, "future_field", "use_dora", "lora_alpha", "num_epochs", "prefix_gate", "Größe"]
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 64),
    st.sampled_from([0.0, 1.0, 0.5, "", "x", "CAUSAL_LM", [], ["a"], {}, {"a": None}]),
)


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    """A base, a method, and up to four fields of its saved config with other values."""
    base = draw(st.sampled_from(BASES))
    peft_type = draw(st.sampled_from(list(METHOD_VARIANTS)))
    known = sorted(set(saved(base, peft_type)[0]) - {"peft_type"})
    names = st.one_of(st.sampled_from(known), UNKNOWN)
    return base, peft_type, draw(st.dictionaries(names, VALUES, min_size=1, max_size=4))


@settings(max_examples=100)
@given(changes())
def test_any_field_null_stale_or_unknown(change: tuple[str, str, dict[str, Any]]) -> None:
    base, peft_type, fields = change
    config, tensors = saved(base, peft_type)
    with TemporaryDirectory() as folder:
        directory = write(Path(folder), {**config, **fields}, tensors)
        served = ours_or_refusal(directory, base)
        if isinstance(served, AdapterError):
            named = served.field or next(name for name in config if name in served.message)
            assert named in {*config, *fields} or named == "prompt_embeddings" or "ia3_l" in named
            assert served.message.isprintable()
            return
        form, found = served
        assert same(form, pefts(directory, base))
    for name in fields.keys() - config.keys():
        assert any(name in sentence for sentence in found)


def ours_or_refusal(folder: Path, base: str) -> tuple[Tensors, tuple[str, ...]] | AdapterError:
    try:
        return ours(folder, base)
    except AdapterError as error:
        return error
