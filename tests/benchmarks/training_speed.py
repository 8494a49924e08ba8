"""Training tokens a second and peak memory, here and in PEFT with a plain torch loop.

    python -m tests.benchmarks.training_speed --base DIR --data FILE [--rounds 9] [--json FILE]

Batches of eight real rows (JSON lines with `text` and `label`), the same token ids on both sides,
forward, backward and AdamW. Steps of both sides take turns; what is printed is the median of the
paired ratios with its 95 % bootstrap interval. Tokens are those of the rows: neither padding nor
virtual tokens count. Memory is the peak of a process of its own, less what it had with the base loaded.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adapters.method import parse_config
from adapters.methods import METHODS
from adapters.training.batches import Steps
from adapters.training.job import TrainingRequest
from adapters.training.loop import make_optimizer
from adapters.training.objective import num_targets, summed_loss
from adapters.training.packed import PackedBase
from adapters.training.plan import Plan, make_plan
from server.base.load import load_base
from server.base.tokenizer import load_tokenizer
from server.text.tokenizer import TextTokenizer
from tests.benchmarks.peft_training import PlainLoop, wrap

NUM_ROWS = 256
VARIANTS: dict[str, dict[str, Any]] = {
    "prefix tuning": {"method": "prefix_tuning", "config": {"init_weights": None}},
    "P-tuning": {"method": "p_tuning"},
    "IA3": {"method": "ia3"},
    "prompt tuning": {"method": "prompt_tuning", "config": {"prompt_tuning_init": "RANDOM"}},
    "CPT, 8 examples": {"method": "cpt", "context_examples": 8},
}


class Ours:
    """Steps of the training loop, without its events."""

    def __init__(self, options: argparse.Namespace, variant: str) -> None:
        loaded = load_base(options.base, dtype=options.dtype, device="cpu")
        self.plan = plan_of(options, variant, loaded)
        job = self.plan.job
        self._base = PackedBase(loaded.model, loaded.spec)
        torch.manual_seed(0)
        method = METHODS[job.peft_type]
        config = parse_config(method.config_class, job.config)
        self._trainable = method.trainable(config, self._base, job.init_token_ids)
        self._optimizer = make_optimizer(self._trainable.parameters(), job.hyperparameters)
        self._steps = Steps.of(len(self.plan.examples.train), job.hyperparameters)

    def step(self, number: int) -> int:
        """One step; the tokens of its rows."""
        (rows,) = self._steps.batches(number)
        batch = [self.plan.examples.train[row] for row in rows]
        targets = self._trainable.targets
        self._optimizer.zero_grad(set_to_none=True)
        loss = summed_loss(self._base, self._trainable.virtual(), batch, targets)
        (loss / num_targets(batch, targets)).backward()
        torch.nn.utils.clip_grad_norm_(self._trainable.parameters().values(), 1.0)
        self._optimizer.step()
        return sum(example.num_tokens for example in batch)


class Peft:
    """Steps of the plain loop."""

    def __init__(self, options: argparse.Namespace, variant: str) -> None:
        loaded = load_base(options.base, dtype=options.dtype, device="cpu")
        plan = plan_of(options, variant, loaded)
        model = wrap(Path(options.base), plan.job, getattr(torch, options.dtype), None)
        self._loop = PlainLoop(model, plan.job, plan.examples.train)

    def step(self, number: int) -> int:
        """One step; the tokens of its rows."""
        return self._loop.step(number)[1]


SIDES = {"ours": Ours, "peft": Peft}


def plan_of(options: argparse.Namespace, variant: str, loaded: Any) -> Plan:
    """The job that both sides do."""
    lines = Path(options.data).read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    encoder = TextTokenizer(load_tokenizer(loaded.tokenizer_dir), loaded.eos_token_ids)
    request = TrainingRequest.model_validate(
        {
            "adapter": "bench",
            "template": "Tweet text : {text} Label :",
            "target": "label",
            "labels": ["anger", "joy", "optimism", "sadness"],
            "hyperparameters": {"batch_size": 8, "epochs": 1000},
            **VARIANTS[variant],
        }
    )
    rows = [json.loads(line) for line in lines]
    return make_plan(request, rows, encoder, loaded.spec, base_name="bench")


def compare(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Both sides in turn, after one step each that does not count."""
    sides = {name: make(options, variant) for name, make in SIDES.items()}
    for side in sides.values():
        side.step(0)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, options.rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            tokens = side.step(number)
            rates[name].append(tokens / (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(rates["ours"], rates["peft"], strict=True)]
    low, high = interval(ratios)
    return {
        "variant": variant,
        "ours_tokens_per_second": statistics.median(rates["ours"]),
        "peft_tokens_per_second": statistics.median(rates["peft"]),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def interval(ratios: list[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples)
    )
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]


def peak_mib(options: argparse.Namespace, variant: str, side: str) -> float:
    """Anonymous and mapped memory at its highest over three steps, less that before them."""
    command = [sys.executable, "-m", "tests.benchmarks.training_speed", "--base", options.base]
    command += ["--data", options.data, "--dtype", options.dtype, "--memory-of", side, variant]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(options: argparse.Namespace) -> None:
    """Body of a memory measurement."""
    side, variant = options.memory_of
    # Every page of the mapped base is touched before, so that neither side pays for it.
    loaded = load_base(options.base, dtype=options.dtype, device="cpu")
    for parameter in loaded.model.parameters():
        parameter.float().sum()
    del loaded
    contestant = SIDES[side](options, variant)
    before = _status("VmRSS")
    for number in range(3):
        contestant.step(number)
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print_peak(options)
        return
    table = Table("method", "ours", "PEFT", "ratio (95 %)", "ours MiB", "PEFT MiB")
    results = []
    for variant in options.variants:
        result = compare(options, variant)
        for side in SIDES:
            result[f"{side}_mib"] = peak_mib(options, variant, side)
        results.append(result)
        table.add_row(
            variant,
            f"{result['ours_tokens_per_second']:.0f}",
            f"{result['peft_tokens_per_second']:.0f}",
            f"{result['ratio']:.2f} ({result['ratio_low']:.2f} to {result['ratio_high']:.2f})",
            f"{result['ours_mib']:.0f}",
            f"{result['peft_mib']:.0f}",
        )
        print(json.dumps(result), file=sys.stderr, flush=True)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
