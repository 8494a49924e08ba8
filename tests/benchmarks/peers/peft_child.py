"""PEFT as a contestant: `python -m tests.benchmarks.peers.peft_child BASE DTYPE THREADS ADAPTER_DIR...`

A request names its adapters, one a prompt. `"how": "one by one"` sets each prompt's adapter and generates;
`"how": "batches"` has one `generate` for all prompts of an adapter. Every method has a base of its own,
as PEFT changes it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers import logging as transformers_logging

from tests.benchmarks.peers.pipe import serve


def start() -> Callable[[dict[str, Any]], int]:
    """Load the base once a method, and every adapter."""
    base, dtype, threads, *folders = sys.argv[1:]
    torch.set_num_threads(int(threads))
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    models: dict[str, Any] = {}
    by_adapter: dict[str, Any] = {}
    for folder in map(Path, folders):
        method = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
        if method in models:
            models[method].load_adapter(folder, adapter_name=folder.name)
        else:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
            models[method] = PeftModel.from_pretrained(
                model, folder, adapter_name=folder.name
            ).eval()
        by_adapter[folder.name] = models[method]
    return lambda request: run(request, by_adapter)


def run(request: dict[str, Any], by_adapter: dict[str, Any]) -> int:
    """All prompts of a request; the number of tokens."""
    prompts, new_tokens = request["prompts"], request["new_tokens"]
    pairs = list(zip(request["adapters"], prompts, strict=True))
    groups: list[tuple[str, list[list[int]]]] = [(name, [prompt]) for name, prompt in pairs]
    if request["how"] == "batches":
        together: dict[str, list[list[int]]] = defaultdict(list)
        for name, prompt in pairs:
            together[name].append(prompt)
        groups = list(together.items())
    for name, batch in groups:
        generate(by_adapter[name], name, batch, new_tokens)
    return len(prompts) * new_tokens


def generate(model: Any, name: str, batch: list[list[int]], new_tokens: int) -> None:
    """One `generate` of PEFT."""
    model.set_adapter(name)
    ids = torch.tensor(batch)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    # With virtual tokens PEFT returns the new tokens behind the prompt; never fewer than those.
    if out.shape[1] < new_tokens:
        raise RuntimeError(f"expected {new_tokens} new tokens, came {out.shape[1]} in all")


if __name__ == "__main__":
    serve(start)
