"""transformers' continuous batching of the base alone, without shared blocks.

`python -m tests.benchmarks.peers.transformers_child BASE DTYPE THREADS`
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers import logging as transformers_logging

from tests.benchmarks.peers.pipe import serve


def start() -> Callable[[dict[str, Any]], int]:
    """Load the base; the cache is made with the first request and kept."""
    base, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
    return lambda request: run(model, request)


def run(model: Any, request: dict[str, Any]) -> int:
    """All prompts of a request at once; the number of tokens."""
    new_tokens = request["new_tokens"]
    outputs = model.generate_batch(
        request["prompts"],
        GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        ContinuousBatchingConfig(allow_block_sharing=False, num_blocks=64, max_batch_tokens=512),
        persistent_manager=True,
    )
    counts = [len(output.generated_tokens) for output in outputs.values()]
    if counts != [new_tokens] * len(request["prompts"]):
        raise RuntimeError(f"expected {new_tokens} tokens for each prompt, came {counts}")
    return sum(counts)


if __name__ == "__main__":
    serve(start)
