"""How well adapters that were trained here do, beside PEFT's with the same rows, recipe and seeds.

    python -m tests.benchmarks.training_quality run --base DIR --emotion DIR --raft FILE --out DIR
    python -m tests.benchmarks.training_quality report --out DIR

Two tasks. Emotion: 128 training rows balanced over four labels, a draw for each seed, all test rows.
RAFT's twitter complaints: 5-fold cross-validation, stratified. Labels are ranked by log-likelihood,
PEFT's adapters by the same code (that both give the same logits is tested elsewhere).

A cell is one adapter: task, side, variant, seed or fold. Cells are written down one by one, so that a
run can be broken off, go on, and be shared by several processes. `report` prints accuracy and macro-F1
of every variant, and the difference to PEFT with its 95 % interval: a bootstrap over the rows, paired.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adapters.checkpoint.folder import load_serving_form, load_tensors
from adapters.method import parse_config
from adapters.methods import METHODS
from adapters.methods.ia3 import attach_ia3, detach_ia3, load_ia3
from adapters.training.job import TrainingRequest
from adapters.training.loop import train
from adapters.training.packed import PackedBase
from adapters.training.plan import Plan, make_plan
from adapters.training.ranking import rank, score
from server.base.load import load_base
from server.base.tokenizer import load_tokenizer
from server.text.tokenizer import TextTokenizer
from tests.benchmarks.peft_training import PlainLoop, wrap

SEEDS = (0, 1, 2)
FOLDS = 5
TRAIN_ROWS = 128
TASKS: dict[str, dict[str, Any]] = {
    "emotion": {
        "template": "Tweet text : {text} Label :",
        "target": "label",
        "labels": ["anger", "joy", "optimism", "sadness"],
        "init_text": "Classify the tweet as anger, joy, optimism or sadness. Tweet text : I am so "
        "happy Label : joy",
    },
    "raft": {
        "template": "Tweet text : {Tweet text} Label :",
        "target": "Label",
        "labels": ["complaint", "no complaint"],
        "init_text": "Classify the tweet as complaint or no complaint. Tweet text : My order never "
        "came Label : complaint",
    },
}
# The recipe that both sides share; learning rates were found with PEFT.
SHARED = {"epochs": 4, "batch_size": 8, "lr_scheduler_type": "linear", "warmup_ratio": 0.0}
P_TUNING = {"num_virtual_tokens": 20, "encoder_hidden_size": 128}
CPT = {"opt_projection_epsilon": 1.0, "opt_projection_format_epsilon": 1.0}


@dataclass(frozen=True)
class Variant:
    """One method with its options.

    Attributes:
        method: as in a request.
        learning_rate: of the shared recipe.
        config: PEFT's fields.
        from_text: start from the task's text.
        context_examples: CPT's.
        epochs: where it is not that of the shared recipe.
        sides: who runs it.
    """

    method: str
    learning_rate: float
    config: dict[str, Any]
    from_text: bool = False
    context_examples: int | None = None
    epochs: int | None = None
    sides: tuple[str, ...] = ("ours", "peft")


VARIANTS: dict[str, Variant] = {
    "ia3": Variant("ia3", 1e-2, {}),
    "prompt-tuning": Variant("prompt_tuning", 3e-2, {"num_virtual_tokens": 20}, from_text=True),
    "p-tuning": Variant("p_tuning", 1e-3, P_TUNING),
    "prefix-text": Variant("prefix_tuning", 3e-3, {"num_virtual_tokens": 20}, from_text=True),
    "prefix-random": Variant(
        "prefix_tuning", 1e-2, {"num_virtual_tokens": 20, "init_weights": None}, sides=("peft",)
    ),
    # PEFT runs the context once a row, which takes eight times as long: fewer epochs and examples.
    "cpt": Variant("cpt", 3e-3, CPT, context_examples=4, epochs=3),
}
# Our own recipes as they stand in adapters/training/recipes.py: nothing is said but the method.
DEFAULTS = ("ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "cpt")


@dataclass(frozen=True)
class Cell:
    """One adapter to train and to judge: `draw` is the seed, or the fold."""

    task: str
    side: str
    variant: str
    draw: int

    @property
    def name(self) -> str:
        """For its file."""
        return f"{self.task}_{self.side}_{self.variant}_{self.draw}"


def cells(tasks: list[str], sides: list[str], variants: list[str] | None) -> list[Cell]:
    """Every cell, task by task and draw by draw, so that a run cut short has whole comparisons."""
    found = []
    for task, draw in ((task, draw) for task in tasks for draw in range(FOLDS)):
        if task != "emotion" or draw < len(SEEDS):
            for side in sides:
                names = [n for n, v in VARIANTS.items() if side in v.sides]
                if side == "defaults":
                    names = list(DEFAULTS)
                if side == "untuned":
                    names = ["base"]
                for name in names:
                    if variants is None or name in variants:
                        found.append(Cell(task, side, name, draw))
    return found


class Bench:
    """One base, and everything that is done with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        loaded = load_base(options.base, dtype=options.dtype, device="cpu")
        self.model, self.spec = loaded.model, loaded.spec
        self.encoder = TextTokenizer(load_tokenizer(loaded.tokenizer_dir), loaded.eos_token_ids)
        self.base = PackedBase(self.model, self.spec)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and judge one cell."""
        started = time.perf_counter()
        train_rows, test_rows = self._rows(cell)
        plan = self._plan(cell, train_rows)
        test = self._plan(cell, test_rows, judge=True)
        virtual, attached = None, False
        if cell.side in ("ours", "defaults"):
            trained = train(plan.job, plan.examples, self.model, self.spec, on_event=lambda _: None)
            virtual, attached = self._attach(plan, trained.tensors)
            self.base = PackedBase(self.model, self.spec)
        elif cell.side == "peft":
            virtual, attached = self._peft(cell, plan)
        trained_at = time.perf_counter()
        prompts = [example.prompt_ids for example in test.examples.train]
        label_ids = test.examples.label_ids
        scores = rank(self.base, virtual, prompts, label_ids)
        if cell.side == "untuned":
            scores = scores / torch.tensor([len(ids) for ids in label_ids])
        if attached:
            detach_ia3(self.model)
        return {
            "task": cell.task,
            "side": cell.side,
            "variant": cell.variant,
            "draw": cell.draw,
            "chosen": scores.argmax(dim=1).tolist(),
            "right": [example.label for example in test.examples.train],
            "train_seconds": round(trained_at - started, 1),
            "judge_seconds": round(time.perf_counter() - trained_at, 1),
            "hyperparameters": plan.job.hyperparameters.model_dump(),
        }

    def _rows(self, cell: Cell) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if cell.task == "emotion":
            folder = Path(self.options.emotion)
            rows = _jsonl(folder / "train.jsonl")
            labels = TASKS["emotion"]["labels"]
            draw = random.Random(cell.draw)
            chosen: list[dict[str, Any]] = []
            for label in labels:
                own = [row for row in rows if row["label"] == label]
                chosen += draw.sample(own, TRAIN_ROWS // len(labels))
            return chosen, _jsonl(folder / "test.jsonl")[: self.options.max_test_rows]
        with Path(self.options.raft).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        folds = stratified_folds([row["Label"] for row in rows])
        train_rows = [row for row, fold in zip(rows, folds, strict=True) if fold != cell.draw]
        test_rows = [row for row, fold in zip(rows, folds, strict=True) if fold == cell.draw]
        return train_rows, test_rows

    def _plan(self, cell: Cell, rows: list[dict[str, Any]], judge: bool = False) -> Plan:
        task = TASKS[cell.task]
        request: dict[str, Any] = {k: task[k] for k in ("template", "target", "labels")}
        request["adapter"] = "bench"
        seed = cell.draw if cell.task == "emotion" else 0
        if judge or cell.side == "untuned":
            request |= {"method": "ia3", "append_eos": cell.side != "untuned"}
        elif cell.side == "defaults":
            request |= {"method": cell.variant, "hyperparameters": {"seed": seed}}
        else:
            variant = VARIANTS[cell.variant]
            shared = {**SHARED, "learning_rate": variant.learning_rate, "seed": seed}
            if variant.epochs:
                shared["epochs"] = variant.epochs
            request |= {
                "method": variant.method,
                "config": variant.config,
                "hyperparameters": shared,
            }
            if variant.from_text:
                request["init_text"] = task["init_text"]
            if variant.context_examples:
                request["context_examples"] = variant.context_examples
        parsed = TrainingRequest.model_validate(request)
        return make_plan(parsed, rows, self.encoder, self.spec, base_name="bench")

    def _attach(self, plan: Plan, tensors: dict[str, torch.Tensor]) -> tuple[Any, bool]:
        """What stands before the prompts, and whether IA3 now wraps the base."""
        method = METHODS[plan.job.peft_type]
        config = parse_config(method.config_class, plan.job.config)
        if plan.job.peft_type == "IA3":
            attach_ia3(self.model, config, self.spec)
            load_ia3(self.model, tensors)
            return None, True
        return method.serving_form(config, tensors, self.spec), False

    def _peft(self, cell: Cell, plan: Plan) -> tuple[Any, bool]:
        text = TASKS[cell.task]["init_text"] if VARIANTS[cell.variant].from_text else None
        dtype = getattr(torch, self.options.dtype)
        model = wrap(Path(self.options.base), plan.job, dtype, text)
        PlainLoop(model, plan.job, plan.examples.train).run()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            directory = Path(folder)
            (directory / "README.md").unlink()
            if plan.job.peft_type != "IA3":
                return load_serving_form(directory, self.spec), False
            path = directory / "adapter_model.safetensors"
            config = parse_config(METHODS["IA3"].config_class, plan.job.config)
            layers = attach_ia3(self.model, config, self.spec)
            names = [f"base_model.model.{name}.ia3_l" for name in layers]
            load_ia3(self.model, load_tensors(path, names))
            return None, True


def stratified_folds(labels: list[str]) -> list[int]:
    """A fold for every row; each label is spread evenly."""
    folds = [0] * len(labels)
    for label in sorted(set(labels)):
        rows = [row for row, own in enumerate(labels) if own == label]
        random.Random(0).shuffle(rows)
        for place, row in enumerate(rows):
            folds[row] = place % FOLDS
    return folds


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the report ------------------------------------------------------------------------------


def read_results(out: Path) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """(task, side, variant) -> its draws."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text())
        found[result["task"], result["side"], result["variant"]].append(result)
    return found


def accuracy_and_f1(draws: list[dict[str, Any]], task: str) -> tuple[float, float]:
    """Of cross-validation over all rows together, else the mean over the seeds."""
    if task == "raft":
        chosen = [c for draw in draws for c in draw["chosen"]]
        right = [r for draw in draws for r in draw["right"]]
        found = score(chosen, right)
        return found.accuracy, found.macro_f1
    each = [score(draw["chosen"], draw["right"]) for draw in draws]
    return statistics.mean(s.accuracy for s in each), statistics.mean(s.macro_f1 for s in each)


def difference(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], resamples: int = 2000
) -> tuple[float, float, float]:
    """Accuracy of ours minus theirs, and its 95 % interval: rows are drawn, paired by draw and row."""
    theirs_by_draw = {draw["draw"]: draw for draw in theirs}
    gains: list[int] = []
    for draw in ours:
        other = theirs_by_draw.get(draw["draw"])
        if other is None:
            continue
        for c, o, r in zip(draw["chosen"], other["chosen"], draw["right"], strict=True):
            gains.append((c == r) - (o == r))
    if not gains:
        return float("nan"), float("nan"), float("nan")
    generator = random.Random(0)
    means = sorted(
        statistics.fmean(generator.choices(gains, k=len(gains))) for _ in range(resamples)
    )
    low, high = means[int(0.025 * resamples)], means[int(0.975 * resamples)]
    return statistics.fmean(gains), low, high


def report(out: Path) -> None:
    """Print every variant beside PEFT."""
    results = read_results(out)
    console = Console(width=130)
    for task in TASKS:
        table = Table(
            "variant", "side", "draws", "accuracy", "macro-F1", "ours minus PEFT (95 %)", title=task
        )
        for (of, side, variant), draws in results.items():
            if of != task:
                continue
            accuracy, macro_f1 = accuracy_and_f1(draws, task)
            shown = ""
            peers = results.get((task, "peft", variant))
            if side == "ours" and peers:
                shown = "{:+.3f} ({:+.3f} to {:+.3f})".format(*difference(draws, peers))
            table.add_row(
                variant, side, str(len(draws)), f"{accuracy:.3f}", f"{macro_f1:.3f}", shown
            )
        console.print(table)
        best = {
            side: max(
                (accuracy_and_f1(draws, task)[0], variant)
                for (of, own, variant), draws in results.items()
                if of == task and own == side
            )
            for side in ("defaults", "peft")
            if any(of == task and own == side for of, own, _ in results)
        }
        if len(best) == 2:
            (ours, our_variant), (theirs, their_variant) = best["defaults"], best["peft"]
            gain = difference(
                results[task, "defaults", our_variant], results[task, "peft", their_variant]
            )
            console.print(
                f"best by our defaults: {our_variant} {ours:.3f}; best of PEFT: {their_variant} "
                f"{theirs:.3f}; difference {gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f})"
            )


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("--base", required=True)
    runner.add_argument("--emotion", help="folder with train.jsonl and test.jsonl")
    runner.add_argument("--raft", help="train.csv of twitter_complaints")
    runner.add_argument("--sides", nargs="+", default=["untuned", "defaults", "ours", "peft"])
    runner.add_argument("--variants", nargs="+")
    runner.add_argument("--dtype", default="bfloat16")
    runner.add_argument("--threads", type=int, default=1)
    runner.add_argument("--max-test-rows", type=int, default=None)
    runner.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after")
    for verb in (runner, verbs.add_parser("report")):
        verb.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.verb == "report":
        report(options.out)
        return
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = [task for task in TASKS if getattr(options, task)]
    started = time.monotonic()
    bench = Bench(options)
    for cell in cells(tasks, options.sides, options.variants):
        claim = options.out / f"{cell.name}.claim"
        try:
            claim.touch(exist_ok=False)  # another process may have taken it
        except FileExistsError:
            continue
        if time.monotonic() - started > options.seconds:
            claim.unlink()
            break
        try:
            result = bench.run(cell)
        except BaseException:
            claim.unlink()
            raise
        temporary = options.out / f".{cell.name}"
        temporary.write_text(json.dumps(result))
        os.replace(temporary, options.out / f"{cell.name}.json")
        found = score(result["chosen"], result["right"])
        print(
            f"{cell.name}: accuracy {found.accuracy:.3f}, macro-F1 {found.macro_f1:.3f}, "
            f"{result['train_seconds']} + {result['judge_seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
