"""llama.cpp as a contestant: one run of `llama-batched-bench` a measurement.

The program loads the base and warms up before it takes the time, and it takes the time itself. Its defaults
for flash attention and polling were as fast as the other values here, and `--kv-unified` was slower.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.benchmarks.peers.install import llama_dir


def rate(root: Path, threads: int, concurrency: int, prompt_tokens: int, new_tokens: int) -> float:
    """Output tokens a second of as many sequences at once, prompts included."""
    home = llama_dir(root)
    context = concurrency * (prompt_tokens + new_tokens)
    # It counts decode steps; the first token comes from the prompt, as everybody else's does.
    steps = new_tokens - 1
    done = subprocess.run(
        [
            *(str(home / "bin" / "llama-batched-bench"), "-m", str(home / "base.gguf")),
            *("-c", str(context), "-b", "2048", "-ub", "512", "-t", str(threads)),
            *("-npp", str(prompt_tokens), "-ntg", str(steps), "-npl", str(concurrency)),
            *("--output-format", "jsonl"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    (line,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return concurrency * new_tokens / float(line["t"])
