"""The packaged example: its messages are what is promised, its adapters are whole and small."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from adapters.checkpoint.folder import canonical_config
from server.base.load import load_base
from server.demo.install import ADAPTERS_DIR, DemoAdapter, demo_adapters, demo_messages
from tests.acceptance.real_base import BASE_DIR, needs_base

METHODS = {"prefix_tuning", "p_tuning", "ia3", "cpt", "prompt_tuning"}
MAX_BYTES = 2_500_000
adapters = pytest.mark.parametrize("demo", demo_adapters(), ids=lambda demo: demo.name)


def test_messages_are_split_and_balanced():
    counts = Counter((message.split, message.label) for message in demo_messages())
    assert counts == {
        ("train", "complaint"): 40,
        ("train", "no complaint"): 40,
        ("held_out", "complaint"): 10,
        ("held_out", "no complaint"): 10,
    }
    assert len(demo_messages("held_out")) == 20


def test_messages_are_short_distinct_and_name_nobody():
    texts = [message.text for message in demo_messages()]
    assert len({text.lower() for text in texts}) == len(texts)
    for text in texts:
        assert 10 <= len(text) <= 140
        assert not set(text) & set("@#{}\n")
        assert "http" not in text


def test_one_adapter_a_method_and_the_best_is_complaints():
    found = demo_adapters()
    assert {demo.job.method for demo in found} == METHODS
    assert len(found) == len(METHODS)
    names = {demo.name: f"complaints-{demo.job.method.replace('_', '-')}" for demo in found}
    assert found[0].name == "complaints"
    assert all(name == names[name] for name in names if name != "complaints")
    measured = {one["adapter"]: one["accuracy"] for one in held_out()["results"]}
    assert {Path(name).name for name in measured if name} == set(names)
    best = max(measured.values())
    assert measured["server/demo/adapters/complaints"] == best >= 0.9
    assert all(accuracy > measured[None] for name, accuracy in measured.items() if name)


def held_out() -> dict:
    """What `make demo-adapters` measured last."""
    return json.loads(ADAPTERS_DIR.with_name("held_out.json").read_text())


def test_they_are_small_enough_for_the_repository():
    assert sum(file.stat().st_size for file in ADAPTERS_DIR.rglob("*")) < MAX_BYTES


@adapters
def test_adapter_is_whole(demo: DemoAdapter):
    files = {file.name for file in demo.directory.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "graftwork.json"}
    job = demo.job
    assert job.template.format(text="x") == "Tweet text : x Label :"
    assert (job.labels, job.target_separator) == (["complaint", "no complaint"], " ")
    assert job.append_eos
    # The held-out messages were not seen.
    assert job.num_rows == len(demo_messages("train"))
    assert job.hyperparameters.validation_split == 0.0
    tensors = load_file(demo.directory / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@adapters
def test_config_names_the_base_and_no_machine(demo: DemoAdapter):
    text = (demo.directory / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert config["peft_type"] == demo.job.peft_type == demo.job.method.upper()
    assert config == canonical_config(demo.job.config)
    strings = [value for value in config.values() if isinstance(value, str)]
    assert not [value for value in strings if value.startswith(("/", "."))]


@pytest.mark.slow
@needs_base
@adapters
def test_peft_loads_it_without_a_warning(demo: DemoAdapter):
    base = load_base(BASE_DIR, dtype="bfloat16", device="cpu")
    assert demo.job.base_digest == base.spec.digest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = peft.PeftModel.from_pretrained(base.model, demo.directory)
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
