"""Tiny random bases, and PEFT as the oracle: what it saves, what it loads, what it warns of."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from adapters.base_model import BaseModelSpec, describe
from adapters.method import PeftConfig, TensorInfo, parse_config
from adapters.methods import method_of

VOCAB = 64
PROMPT = torch.tensor([[5, 9, 33, 2]])
# transformers 5.23 warns when PEFT asks for a property under its old name; not our matter.
PEFT_NOISE = "`is_gradient_checkpointing`"


def llama() -> PreTrainedModel:
    """Grouped-query attention: 4 query heads, 2 key/value heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> PreTrainedModel:
    """Conv1D modules, learned positions."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).eval()


def bloom() -> PreTrainedModel:
    """ALiBi, fused query_key_value."""
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    return BloomForCausalLM(config).eval()


BASES: dict[str, Callable[[], PreTrainedModel]] = {"llama": llama, "gpt2": gpt2, "bloom": bloom}


def spec_of(model: PreTrainedModel) -> BaseModelSpec:
    return describe(model, digest="0" * 64, dtype="float32")


@contextmanager
def no_peft_warnings() -> Iterator[None]:
    """Every warning is an error, but for the noise that comes with every PEFT model."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=PEFT_NOISE, category=FutureWarning)
        yield


def peft_model(base: PreTrainedModel, config: Any, seed: int = 1) -> Any:
    """PEFT's model with trainables of unit scale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def peft_save(base: PreTrainedModel, config: Any, folder: Path, seed: int = 1) -> Any:
    model = peft_model(base, config, seed)
    with no_peft_warnings():
        model.save_pretrained(str(folder))
    return model


def peft_load(base: PreTrainedModel, folder: Path) -> Any:
    """Load with PEFT; a warning fails the test."""
    with no_peft_warnings():
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), no_peft_warnings():
        return model(input_ids=PROMPT).logits


def read(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo], dict[str, torch.Tensor]]:
    """Raw config, header and tensors of a checkpoint folder."""
    raw = json.loads((folder / "adapter_config.json").read_text())
    infos: dict[str, TensorInfo] = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            part = file.get_slice(name)
            infos[name] = TensorInfo(part.get_dtype(), tuple(part.get_shape()))
    return raw, infos, load_file(folder / "adapter_model.safetensors")


def parse(raw: dict[str, Any]) -> Any:
    return parse_config(method_of(raw).config_class, raw)


def write(folder: Path, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config.model_dump(mode="json")))
    save_file(tensors, folder / "adapter_model.safetensors")


def infos_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
