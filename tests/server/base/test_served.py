"""Bases in plain torch: the same as transformers loads them, and only where nothing is in doubt."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.checkpoint.folder import load_serving_form
from adapters.checkpoint.limits import CheckpointLimits
from adapters.errors import BaseUnsupported
from adapters.parts import ServingForm
from server.base.convert import MANIFEST_FILE
from server.base.load import load_base
from server.base.served import ServedBase, load_plain, load_served
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from tests.conformance.peft_oracle import make_adapter, prompt_ids
from tests.engine_tools import TINY, adapter_ref, request, run, tokens
from tests.server.base.tiny import edit_config, save_tiny
from tests.tiny_models import tiny_model

DTYPES = ["float32", "bfloat16", "float16"]
VARIANTS_OF_ADAPTERS = ("prefix", "p-tuning-mlp", "cpt", "prompt-tuning", "ia3", "ia3-output-side")
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one head a group": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 16},
    "other numbers": {
        "rms_norm_eps": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    # Large weights: an error of a place or a sign moves the logits, not only their last digits.
    return save_tiny(tmp_path / "base", initializer_range=0.3)


def plain_of(directory: Path, dtype: str = "float32") -> ServedBase:
    plain = load_plain(directory, dtype)
    assert plain is not None
    return plain


def assert_same_logits(plain: torch.nn.Module, theirs: Any) -> None:
    with torch.inference_mode():
        for shape in ((1, 24), (1, 1), (2, 9)):
            ids = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(0))
            want = theirs(input_ids=ids, use_cache=False).logits
            assert torch.equal(plain(input_ids=ids, use_cache=False).logits, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers_to_the_bit(tmp_path, variant, dtype):
    changes = {"initializer_range": 0.3, **VARIANTS[variant]}
    directory = save_tiny(tmp_path / "base", dtype=dtype, **changes)
    if "attention_bias" in changes:
        fill_biases(directory)
    plain, theirs = plain_of(directory, dtype), load_base(directory, dtype=dtype, device="cpu")
    assert_same_logits(plain.model, theirs.model)
    assert plain.spec == theirs.spec
    assert plain.model.state_dict().keys() == theirs.model.state_dict().keys()
    names = [name for name, _ in theirs.model.named_modules()]
    assert [name for name, _ in plain.model.named_modules() if "act_fn" not in name] == [
        name for name in names if "act_fn" not in name
    ]


def fill_biases(directory: Path) -> None:
    """Biases are zeros at first."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensors[name] = torch.randn_like(tensor)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_configs_of_older_transformers_are_read_alike(base):
    config = json.loads((base / "config.json").read_text())
    for key in ("rope_parameters", "attention_bias", "mlp_bias", "head_dim"):
        del config[key]
    config |= {"rope_theta": 100000, "rope_scaling": None, "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    plain, theirs = plain_of(base), load_base(base, dtype="float32", device="cpu")
    assert_same_logits(plain.model, theirs.model)
    assert plain.spec == theirs.spec


def test_what_is_told_of_it_is_the_same(base):
    (base / MANIFEST_FILE).write_text(json.dumps({"name": "Some-Base", "note": "was quantized"}))
    generation = base / "generation_config.json"
    for eos in ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {}, None):
        generation.unlink(missing_ok=True)
        if eos is not None:
            generation.write_text(json.dumps(eos))
        assert_same_facts(base)
    (base / MANIFEST_FILE).unlink()
    assert_same_facts(base)


def assert_same_facts(base: Path) -> None:
    plain, theirs = plain_of(base), load_base(base, dtype="float32", device="cpu")
    for field in dataclasses.fields(ServedBase):
        if field.name != "model":
            assert getattr(plain, field.name) == getattr(theirs, field.name)


def test_it_is_frozen(base):
    model = plain_of(base).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_shards_are_read_as_one(tmp_path):
    sharded = save_tiny(tmp_path / "sharded", shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    theirs = load_base(sharded, dtype="float32", device="cpu")
    assert_same_logits(plain_of(sharded).model, theirs.model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_weights_are_pages_of_the_file(tmp_path):
    model = plain_of(save_tiny(tmp_path / "base")).model
    file = str(tmp_path / "base" / "model.safetensors")
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0] for line in lines if line.endswith(file)]
    mapped = [tuple(int(end, 16) for end in place.split("-")) for place in places]
    for parameter in model.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped)


# --- engines -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """An adapter of each kind for the tiny Llama of `tiny_model`, by digest."""
    made = {variant: tmp_path_factory.mktemp(variant) for variant in VARIANTS_OF_ADAPTERS}
    for variant, folder in made.items():
        make_adapter(tiny_model("llama"), "llama", variant, folder)
    return made


def outputs(served: Any, config: EngineConfig, folders: dict[str, Path]) -> dict[str, list[int]]:
    """What the base and every adapter say together."""
    limits = CheckpointLimits()

    def read(digest: str) -> ServingForm:
        return load_serving_form(folders[digest], served.spec, limits)

    engine = Engine(served.model, served.spec, config, read)
    requests = [request("base", prompt_ids(20))]
    for digest, folder in folders.items():
        requests.append(request(digest, prompt_ids(20), adapter_ref(digest, folder, engine)))
    out = {name: tokens(events) for name, events in run(engine, requests).items()}
    engine.close()
    return out


@pytest.mark.parametrize("fast_kernels", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_engines_say_the_same_of_both(tmp_path, folders, dtype, fast_kernels):
    tiny_model("llama", dtype=getattr(torch, dtype)).save_pretrained(tmp_path)
    config = dataclasses.replace(TINY, fast_kernels=fast_kernels)
    want = outputs(load_base(tmp_path, dtype=dtype, device="cpu"), config, folders)
    assert len(set(map(tuple, want.values()))) == len(folders) + 1
    assert outputs(plain_of(tmp_path, dtype), config, folders) == want


# --- what is left to transformers ----------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "many"}},
        {"rope_theta": 10000.0},
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear"}},
        {"a_key_of_tomorrow": 1},
        {"quantization_config": {"quant_method": "gptq"}},
        {"pretraining_tp": 2},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "mistral"},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": 3},
        {"num_attention_heads": None},
        {"num_attention_heads": 0},
        {"vocab_size": 65},
        {"head_dim": 7},
        {"rms_norm_eps": 1},
        {"attention_bias": True},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": "yes"},
    ],
    ids=str,
)
def test_configs_that_are_not_plainly_those_of_its_weights(base, changes):
    edit_config(base, **changes)
    assert load_plain(base, "float32") is None


def test_weights_that_are_not_those_of_the_config(base):
    tensors = load_file(base / "model.safetensors")
    norm = tensors["model.norm.weight"]
    without = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    for others in (
        without,
        {**tensors, "model.more.weight": norm.clone()},
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        {**without, "model.norm.weight": norm[:16].clone()},
        {**without, "model.norm.weight": norm.half()},
    ):
        save_file(others, base / "model.safetensors", {"format": "pt"})
        assert load_plain(base, "float32") is None


def test_another_dtype_than_the_stored_one(base):
    assert load_plain(base, "bfloat16") is None
    served = load_served(str(base), dtype="bfloat16", device="cpu", revision=None)
    assert {parameter.dtype for parameter in served.model.parameters()} == {torch.bfloat16}


def without_config(base: Path) -> None:
    (base / "config.json").unlink()


def config_that_is_no_json(base: Path) -> None:
    (base / "config.json").write_text("{")


def no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def weights_cut_short(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def adapter_beside(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}")


def no_directory(base: Path) -> None:
    shutil.rmtree(base)


@pytest.mark.parametrize(
    "damage",
    [
        without_config,
        config_that_is_no_json,
        no_weights,
        weights_cut_short,
        adapter_beside,
        no_directory,
    ],
)
def test_what_cannot_be_served_is_refused_in_the_words_of_load(base, damage):
    damage(base)
    assert load_plain(base, "float32") is None
    refusals = []
    for refused in (
        lambda: load_served(str(base), dtype="float32", device="cpu", revision=None),
        lambda: load_base(base, dtype="float32", device="cpu"),
    ):
        with pytest.raises(BaseUnsupported) as caught:
            refused()
        refusals.append(str(caught.value))
    assert refusals[0] == refusals[1]


def test_a_dtype_that_is_not_served(base):
    with pytest.raises(BaseUnsupported, match="int8"):
        load_served(str(base), dtype="int8", device="cpu", revision=None)
