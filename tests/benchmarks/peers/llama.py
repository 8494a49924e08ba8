"""llama.cpp as a contestant: one run of `llama-batched-bench` a measurement.

The program loads the base and warms up before it takes the time, and it takes the time itself.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.benchmarks.peers.install import llama_dir


def is_installed(root: Path) -> bool:
    """Whether `make bench-peers` has put it there."""
    return (llama_dir(root) / "base.gguf").is_file()


def rate(root: Path, threads: int, concurrency: int, prompt_tokens: int, new_tokens: int) -> float:
    """Output tokens a second of as many sequences at once, prompts included."""
    home = llama_dir(root)
    context = concurrency * (prompt_tokens + new_tokens)
    done = subprocess.run(
        [
            *(str(home / "bin" / "llama-batched-bench"), "-m", str(home / "base.gguf")),
            *("-c", str(context), "-b", "2048", "-ub", "512", "-t", str(threads)),
            *("-npp", str(prompt_tokens), "-ntg", str(new_tokens), "-npl", str(concurrency)),
            *("--output-format", "jsonl"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    (line,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return concurrency * new_tokens / float(line["t"])
