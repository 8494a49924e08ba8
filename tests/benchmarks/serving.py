"""`make bench`: output tokens a second here and in PEFT, interleaved in one run.

The workload: concurrent greedy requests of 48 prompt and 64 new tokens, end of sequence ignored, eight
adapters of four methods, each request the next adapter in turn. Prefill is part of the time.

    ours              all requests in one mixed batch, by the engine in this process
    peft, one by one  one request at a time with set_adapter (8 requests: the rate is the same)
    peft, batches     one generate() a batch of the requests of one adapter

Prints a table of ratios with their 95 % bootstrap intervals, and JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import logging as transformers_logging

from adapters.checkpoint import load_serving_form
from adapters.limits import CheckpointLimits
from server.base.load import load_base
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import AdapterRef, GenerationRequest, SamplingParams, TokenEvent
from tests.benchmarks.adapters import BenchAdapter, make_adapters

PROMPT_TOKENS, NEW_TOKENS = 48, 64
ONE_BY_ONE = 8


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    """`count` random prompts, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, vocabulary, (count, PROMPT_TOKENS), generator=generator)
    return ids.tolist()


class Ours:
    """The engine, stepped in this process."""

    def __init__(self, base: str, dtype: str, adapters: list[BenchAdapter], fast: bool) -> None:
        loaded = load_base(base, dtype=dtype, device="cpu")
        folders = {adapter.name: adapter.directory for adapter in adapters}
        config = EngineConfig(
            base=base,
            blobs_dir="",
            fast_kernels=fast,
            packed_linears=fast,
            prefix_caching=False,  # every round sends the same prompts
        )
        self.engine = Engine(
            loaded.model,
            loaded.spec,
            config,
            lambda name: load_serving_form(folders[name], loaded.spec, CheckpointLimits()),
        )
        self._refs = [
            AdapterRef(a.name, a.num_virtual_tokens, a.num_virtual_tokens == 0) for a in adapters
        ]
        self._runs = 0

    def generate(self, all_prompts: list[list[int]]) -> int:
        """Run all prompts to their end; the number of tokens."""
        self._runs += 1
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        for index, prompt in enumerate(all_prompts):
            ref = self._refs[index % len(self._refs)] if self._refs else None
            request_id = f"{self._runs}-{index}"
            self.engine.submit(GenerationRequest(request_id, tuple(prompt), sampling, ref))
        count = 0
        while self.engine.has_work:
            count += sum(isinstance(event, TokenEvent) for event in self.engine.step())
        return count


def peft_generate(adapter: BenchAdapter, batch: list[list[int]]) -> int:
    """One PEFT generate() of a batch; the number of tokens."""
    adapter.model.set_adapter(adapter.name)
    ids = torch.tensor(batch)
    with torch.inference_mode():
        out = adapter.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return len(batch) * NEW_TOKENS if out.shape[1] >= NEW_TOKENS else 0


def one_by_one(adapters: list[BenchAdapter], all_prompts: list[list[int]]) -> int:
    """Each request by itself, its adapter set before it."""
    chosen = all_prompts[:ONE_BY_ONE]
    return sum(peft_generate(adapters[i % len(adapters)], [p]) for i, p in enumerate(chosen))


def in_batches(adapters: list[BenchAdapter], all_prompts: list[list[int]]) -> int:
    """One batch an adapter, of all its requests."""
    count = 0
    for index, adapter in enumerate(adapters):
        batch = all_prompts[index :: len(adapters)]
        count += peft_generate(adapter, batch) if batch else 0
    return count


def rate(run: Callable[[], int]) -> float:
    """Tokens a second of one run."""
    start = time.perf_counter()
    count = run()
    return count / (time.perf_counter() - start)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(
        statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(4000)
    )
    return medians[int(0.025 * len(medians))], medians[int(0.975 * len(medians))]


def main() -> None:
    """Run the contestants in turn and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default=".graftwork/base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only-ours", action="store_true", help="skip PEFT, for quick looks")
    parser.add_argument("--plain", action="store_true", help="ours without its fast paths")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        run(options, Path(root))


def run(options: argparse.Namespace, root: Path) -> None:
    """Warm up, then `rounds` rounds of every contestant in turn."""
    base = load_base(options.base, dtype=options.dtype, device="cpu").model
    adapters = make_adapters(base, root)
    ours = Ours(options.base, options.dtype, adapters, fast=not options.plain)
    work = prompts(options.concurrency, ours.engine.spec.vocab_size)
    contestants: dict[str, Callable[[], int]] = {"ours": lambda: ours.generate(work)}
    if not options.only_ours:
        contestants["peft, one by one"] = lambda: one_by_one(adapters, work)
        contestants["peft, batches"] = lambda: in_batches(adapters, work)
    ours.generate(work)  # loads and folds the adapters
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, contestant in contestants.items():
            rates[name].append(rate(contestant))
    report(rates, options)


def report(rates: dict[str, list[float]], options: argparse.Namespace) -> None:
    """The table, and JSON if a file is named."""
    title = (
        f"{options.concurrency} requests, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, "
        f"{options.dtype}, {options.threads} threads, {options.rounds} rounds"
    )
    table = Table("contestant", "tokens/s (median)", "ours / it", "95 % interval", title=title)
    figures = {}
    for name, values in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(rates["ours"], values, strict=True)]
        low, high = interval(ratios)
        median, middle = statistics.median(values), statistics.median(ratios)
        figures[name] = {
            "rates": values,
            "median": median,
            "ratio": middle,
            "interval": [low, high],
        }
        table.add_row(name, f"{median:.1f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"workload": title, "contestants": figures}, indent=2))


if __name__ == "__main__":
    main()
