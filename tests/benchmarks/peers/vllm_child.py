"""vLLM as a contestant, in vLLM's own environment: `python vllm_child.py BASE [LORA_DIR...]`

With LoRA adapters each prompt gets the next one in turn. Everything else is vLLM's default: bf16, compiled.
Its environment (threads, cache) is set by whoever starts it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pipe import serve  # type: ignore[import-not-found]


def start() -> Callable[[dict[str, Any]], int]:
    """Load and compile."""
    from vllm import LLM

    base, *loras = sys.argv[1:]
    extra = {"enable_lora": True, "max_loras": len(loras), "max_lora_rank": 8} if loras else {}
    llm = LLM(
        model=base,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=64,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **extra,
    )
    return lambda request: run(llm, loras, request)


def run(llm: Any, loras: list[str], request: dict[str, Any]) -> int:
    """All prompts of a request at once; the number of tokens."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    adapters = None
    if loras:
        turns = [index % len(loras) for index in range(len(prompts))]
        adapters = [LoRARequest(Path(loras[i]).name, i + 1, loras[i]) for i in turns]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


if __name__ == "__main__":
    serve(start)
