"""The packaged example: its messages are what is promised, its adapters are whole and small."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from server.demo.install import ADAPTERS_DIR, DemoAdapter, demo_adapters, demo_messages

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
    assert {demo.method for demo in found} == METHODS
    assert len(found) == len(METHODS)
    assert found[0].name == "complaints"
    best = max(demo.accuracy_held_out for demo in found)
    assert found[0].accuracy_held_out == best >= 0.85
    names = {demo.name for demo in found[1:]}
    assert names == {f"complaints-{demo.method.replace('_', '-')}" for demo in found[1:]}


def test_they_are_small_enough_for_the_repository():
    assert sum(file.stat().st_size for file in ADAPTERS_DIR.rglob("*")) < MAX_BYTES


@adapters
def test_adapter_is_whole(demo: DemoAdapter):
    files = {file.name for file in demo.directory.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "graftwork.json"}
    assert demo.template.format(text="x") == "Tweet text : x Label :"
    assert (demo.labels, demo.target_separator) == (("complaint", "no complaint"), " ")
    assert demo.append_eos
    tensors = load_file(demo.directory / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@adapters
def test_config_names_the_base_and_no_machine(demo: DemoAdapter):
    text = (demo.directory / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert config["peft_type"] == demo.method.upper()
    strings = [value for value in config.values() if isinstance(value, str)]
    assert not [value for value in strings if value.startswith(("/", "."))]
