"""Loads a base for the engine: in plain torch if that is equivalent, else with transformers.

The plain path takes Llamas on the CPU whose files hold exactly the tensors of the config, in the served
dtype: see `plain_llama`. Any other base goes to `load`, which reports errors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from adapters.base_files import weight_files
from adapters.base_model import BaseModelSpec, describe
from server.base.convert import read_manifest
from server.base.digest import CONFIG_FILE, base_digest
from server.base.dtypes import DTYPES, default_dtype
from server.base.plain_llama import LlamaForCausalLM, LlamaNumbers, read_numbers
from server.text.tokenizer import read_eos_token_ids

# Of one tensor where they are tied, which is stored under the second name then.
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
# Beside a base the first is refused; without the second the class says what ends a sequence.
_ADAPTER_FILE = "adapter_config.json"
_EOS_KEY = "eos_token_id"


@dataclass(frozen=True)
class ServedBase:
    """A frozen base model and its metadata; see `load.LoadedBase`."""

    model: nn.Module
    spec: BaseModelSpec
    name: str
    notes: tuple[str, ...]
    tokenizer_dir: Path
    eos_token_ids: tuple[int, ...]


def load_served(
    path_or_id: str, *, dtype: str | None, device: str, revision: str | None
) -> ServedBase:
    """Load and freeze a base model; arguments are those of `load.load_base`.

    Raises:
        BaseUnsupported: with the reason.
    """
    if device == "cpu" and revision is None:
        plain = load_plain(Path(path_or_id).expanduser(), dtype or default_dtype(device))
        if plain is not None:
            return plain
    # Imported late: it imports transformers' models.
    from server.base.load import load_base

    loaded = load_base(path_or_id, dtype=dtype, device=device, revision=revision)
    return ServedBase(
        model=loaded.model,
        spec=loaded.spec,
        name=loaded.name,
        notes=loaded.notes,
        tokenizer_dir=loaded.tokenizer_dir,
        eos_token_ids=loaded.eos_token_ids,
    )


def load_plain(directory: Path, dtype: str) -> ServedBase | None:
    """A directory's base in plain torch, weights memory-mapped; None if the plain path does not apply.

    Raises:
        BaseUnsupported: a weights file has no digest.
    """
    numbers = _numbers(directory)
    if numbers is None or dtype not in DTYPES:
        return None
    with torch.device("meta"):
        model = LlamaForCausalLM(numbers)
    try:
        eos_token_ids = read_eos_token_ids(directory)
        tensors = _tensors(weight_files(directory))
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    if numbers.tie_word_embeddings and _HEAD not in tensors and _EMBEDDINGS in tensors:
        tensors[_HEAD] = tensors[_EMBEDDINGS]
    elif numbers.tie_word_embeddings:
        return None
    wanted = {name: (part.shape, DTYPES[dtype]) for name, part in model.state_dict().items()}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != wanted:
        return None
    model.load_state_dict(tensors, assign=True)
    if numbers.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    manifest = read_manifest(directory) or {}
    return ServedBase(
        model=model.eval().requires_grad_(False),
        spec=describe(model, digest=base_digest(directory), dtype=dtype),
        name=str(manifest.get("name", directory.resolve().name)),
        notes=(str(manifest["note"]),) if "note" in manifest else (),
        tokenizer_dir=directory,
        eos_token_ids=eos_token_ids,
    )


def _numbers(directory: Path) -> LlamaNumbers | None:
    try:
        config: Any = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or _EOS_KEY not in config:
        return None
    if (directory / _ADAPTER_FILE).is_file():
        return None
    return read_numbers(config)


def _tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors by name, memory-mapped."""
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found
