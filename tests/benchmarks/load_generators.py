"""Load on a running server by other people's generators, next to what the server counted.

    vllm      the traffic of `vllm bench serve`, the models in turn, request by request
    guidellm  guidellm itself, a run a model

`python -m tests.benchmarks.load_generators --url http://127.0.0.1:8000 --tokenizer DIR --models A,B`
prints a table: a generator's figure, the server's, and their ratio. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from tests.clients.counted import Counted
from tests.clients.standalone import DIRECTORY
from tests.clients.vllm_bench import bench

# What is compared: its name, and where the server counts it.
_COMPARED = (
    ("requests", "vllm:request_success_total"),
    ("prompt tokens", "vllm:prompt_tokens_total"),
    ("output tokens", "vllm:generation_tokens_total"),
    ("seconds to the first token, sum", "vllm:time_to_first_token_seconds_sum"),
)


def main() -> None:
    options = _options()
    models = options.models.split(",")
    console = Console()
    if options.tool == "vllm":
        counted = Counted(options.url)
        told = _vllm(options, models)
        console.print(_table("vllm bench serve, " + ", ".join(models), told, counted))
        return
    for model in models:
        counted = Counted(options.url)
        told = _guidellm(options, model)
        console.print(_table(f"guidellm, {model}", told, counted))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", required=True, help="the base's directory")
    parser.add_argument("--models", required=True, help="base and adapters, in turn: A,B")
    parser.add_argument("--tool", choices=("vllm", "guidellm"), default="vllm")
    parser.add_argument("--requests", type=int, default=60, help="in all; guidellm: a model")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    return parser.parse_args()


def _vllm(options: argparse.Namespace, models: Sequence[str]) -> list[float]:
    vocabulary = len(AutoTokenizer.from_pretrained(options.tokenizer))
    chosen = random.Random(0)
    # `--dataset-name random`: no two prompts begin alike.
    prompts = [
        [chosen.randrange(100, vocabulary) for _ in range(options.prompt_tokens)]
        for _ in range(options.requests)
    ]
    answers, figures = asyncio.run(
        bench(
            options.url,
            prompts,
            models=models,
            max_tokens=options.output_tokens,
            max_concurrency=options.concurrency,
        )
    )
    for answer in answers:
        if answer.error is not None:
            print(f"{answer.ask.model}: {answer.error}", file=sys.stderr)
    print(
        f"{figures.duration:.1f} s, {figures.output_throughput:.0f} output tokens/s, mean TTFT "
        f"{figures.mean_ttft * 1000:.0f} ms, TPOT {figures.mean_tpot * 1000:.1f} ms"
    )
    sums = (figures.completed, figures.total_input, figures.total_output)
    return [*sums, figures.mean_ttft * figures.completed]


def _guidellm(options: argparse.Namespace, model: str) -> list[float]:
    with tempfile.TemporaryDirectory() as home:
        report = Path(home) / "report.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "guidellm", "run", "--disable-console"),
                *("--backend", f"kind=openai_http,target={options.url},model={model}"),
                *("--profile", f"kind=concurrent,streams={options.concurrency}"),
                *("--constraint", f"kind=max_requests,count={options.requests}"),
                *(
                    "--tokenizer",
                    f"kind=huggingface_auto,model={Path(options.tokenizer).resolve()}",
                ),
                "--data",
                f"kind=synthetic_text,prompt_tokens={options.prompt_tokens}"
                f",output_tokens={options.output_tokens}",
                *("--output", f"kind=json,path={report}"),
            ],
            env={**os.environ, "PYTHONPATH": str(DIRECTORY), "HF_HUB_OFFLINE": "1"},
            check=True,
        )
        [run] = json.loads(report.read_text())["benchmarks"]
    metrics = run["metrics"]
    sums = [
        metrics[name]["successful"]["total_sum"]
        for name in ("prompt_token_count", "output_token_count", "time_to_first_token_ms")
    ]
    return [metrics["request_totals"]["successful"], *sums[:2], sums[2] / 1000]


def _table(title: str, told: Sequence[float], counted: Counted) -> Table:
    server: Counter[str] = counted.since(int(told[0]))
    table = Table("", "generator", "server", "ratio", title=title)
    for (name, where), figure in zip(_COMPARED, told, strict=True):
        own = server[where]
        ratio = f"{figure / own:.3f}" if own else "-"
        table.add_row(name, f"{figure:,.6g}", f"{own:,.6g}", ratio)
    return table


if __name__ == "__main__":
    main()
