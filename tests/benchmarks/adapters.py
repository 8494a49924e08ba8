"""Adapters for the benchmarks: random, of small scale, written as PEFT writes them.

`of_the_workload` makes the eight of W: two each of prefix tuning, P-tuning, IA3 and CPT. Knows PEFT's
files; no engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    CPTConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from adapters.base_model import BaseModelSpec
from server.engine.request import AdapterRef

NUM_VIRTUAL_TOKENS = 20
METHODS = ("prefix", "p-tuning", "ia3", "cpt")
_FILE = "adapter_model.safetensors"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BenchAdapter:
    """One adapter on disk.

    Attributes:
        name: also its folder's, and its digest for the engine.
        method: one of METHODS.
        directory: its checkpoint.
        num_virtual_tokens: positions it takes.
    """

    name: str
    method: str
    directory: Path
    num_virtual_tokens: int

    @property
    def ref(self) -> AdapterRef:
        """It, as the engine knows it."""
        return self.copy(0)

    def copy(self, number: int) -> AdapterRef:
        """The same file under a digest of its own: to the engine, another adapter."""
        digest = self.name if number == 0 else f"{self.name}+{number}"
        return AdapterRef(digest, self.num_virtual_tokens, self.num_virtual_tokens == 0)


def of_the_workload(root: Path, spec: BaseModelSpec) -> list[BenchAdapter]:
    """Two adapters of each method."""
    return [
        write_adapter(root, f"{method}-{number}", method, spec, seed=number)
        for method in METHODS
        for number in range(2)
    ]


def write_adapter(
    root: Path,
    name: str,
    method: str,
    spec: BaseModelSpec,
    *,
    n: int = NUM_VIRTUAL_TOKENS,
    seed: int = 0,
) -> BenchAdapter:
    """One adapter, random.

    Args:
        root: where its folder is made.
        name: of the folder.
        method: one of METHODS.
        spec: the base's dimensions.
        n: virtual tokens; IA3 has none.
        seed: another one gives other weights.
    """
    generator = torch.Generator().manual_seed(seed)
    config, tensors = _MAKERS[method](spec, n, generator)
    directory = root / name
    directory.mkdir(parents=True)
    config.inference_mode = True
    config.save_pretrained(directory)
    save_file(tensors, directory / _FILE)
    return BenchAdapter(name, method, directory, 0 if method == "ia3" else n)


def _prefix(spec: BaseModelSpec, n: int, generator: torch.Generator) -> tuple[Any, Tensors]:
    width = spec.num_kv_heads * spec.head_dim
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=n,
        num_layers=spec.num_layers,
        num_attention_heads=spec.num_kv_heads,
        token_dim=width,
        num_transformer_submodules=1,
        encoder_hidden_size=width,
    )
    return config, _rows(n, spec.num_layers * 2 * width, generator)


def _p_tuning(spec: BaseModelSpec, n: int, generator: torch.Generator) -> tuple[Any, Tensors]:
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=n,
        encoder_hidden_size=128,
        **_soft_prompt_fields(spec),
    )
    return config, _rows(n, spec.hidden_size, generator)


def _cpt(spec: BaseModelSpec, n: int, generator: torch.Generator) -> tuple[Any, Tensors]:
    config = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=list(range(100, 100 + n)),
        cpt_mask=[1] * n,
        cpt_tokens_type_mask=[2] * n,
        num_virtual_tokens=n,
        **_soft_prompt_fields(spec),
    )
    return config, _rows(n, spec.hidden_size, generator)


def _ia3(spec: BaseModelSpec, n: int, generator: torch.Generator) -> tuple[Any, Tensors]:
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules={"k_proj", "v_proj", "down_proj"},
        feedforward_modules={"down_proj"},
    )
    tensors = {}
    for path, linear in spec.linear_modules.items():
        last = path.rpartition(".")[2]
        if last in ("k_proj", "v_proj"):
            shape = (linear.out_features, 1)
        elif last == "down_proj":
            shape = (1, linear.in_features)
        else:
            continue
        scales = 1 + 0.1 * torch.randn(shape, generator=generator)
        tensors[f"base_model.model.{path}.ia3_l"] = scales
    return config, tensors


_MAKERS: dict[str, Callable[[BaseModelSpec, int, torch.Generator], tuple[Any, Tensors]]] = {
    "prefix": _prefix,
    "p-tuning": _p_tuning,
    "ia3": _ia3,
    "cpt": _cpt,
}


def _soft_prompt_fields(spec: BaseModelSpec) -> dict[str, int]:
    return {
        "num_layers": spec.num_layers,
        "num_attention_heads": spec.num_attention_heads,
        "token_dim": spec.hidden_size,
        "num_transformer_submodules": 1,
    }


def _rows(n: int, width: int, generator: torch.Generator) -> Tensors:
    return {"prompt_embeddings": 0.1 * torch.randn(n, width, generator=generator)}


def lora_adapters(root: Path, base: str, count: int = 8) -> list[Path]:
    """LoRA adapters of rank 8 on q and v, for peers that serve no others."""
    paths = []
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config)
        for number in range(count):
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for name, parameter in wrapped.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            paths.append(root / f"lora-{number}")
            wrapped.save_pretrained(paths[-1])
    return paths
