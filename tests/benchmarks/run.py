"""`make bench`: what the engine must reach, contestants in turn, ratios with their intervals.

    python -m tests.benchmarks.run [--items 1,2,5] [--rounds 9] [--json FILE] [--plots DIR]

Each item runs in a process of its own and writes its measures to the file as it goes; an item that the file
has already, of the same code, options and machine, is not measured again, so that a run that was
interrupted goes on where it stopped (--again measures anew). Without a compiler, or without fast paths:
--plain, --engine FIELD=VALUE.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

# isort: off
from tests.benchmarks.as_served import torch
# isort: on

from rich.console import Console
from transformers import logging as transformers_logging

from server.base.digest import base_digest
from tests.benchmarks.book import Book, show
from tests.benchmarks.items import Bench, add_engine_options, engine_options
from tests.benchmarks.peers.install import ROOT
from tests.benchmarks.stamp import stamp_of


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        module: below tests.benchmarks.items, with a function `run`.
        about: what it measures.
        minutes: roughly, in 9 rounds on two cores.
    """

    module: str
    about: str
    minutes: float


ITEMS = {
    1: Item("w_beside_others", "W(1), W(8), W(32) beside PEFT, transformers, llama.cpp, vLLM", 19),
    2: Item("mixed_adapters", "mixed adapters over the base alone", 2.5),
    3: Item("real_traffic", "mixed lengths and Poisson arrivals; sampling", 5),
    4: Item("many_adapters", "1,000 registered, more than there are slots, 256 active", 4),
    5: Item("soft_prompts", "long soft prompts", 3.5),
    6: Item("kept_prompts", "prompts that repeat", 0.5),
    7: Item("over_http", "CPU seconds of the server over those of the engine", 2),
    8: Item("stalls", "a long prompt among streams", 1),
    9: Item("growth", "tokens a second over concurrency, context and prefix length", 3),
    10: Item("start", "time to ready, memory at rest", 1),
    11: Item("policies", "--batching per-adapter, fairness between adapters", 8),
    12: Item("costly_bytes", "a stream beside bytes that are costly to parse", 9),
}


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{n:3}  {i.about} ({i.minutes} min)" for n, i in ITEMS.items()),
    )
    add_engine_options(parser)
    parser.add_argument("--items", type=_items, default=list(ITEMS), help="such as 1,2,5; all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--concurrency", type=int, default=32, help="less only to try it out")
    parser.add_argument("--json", type=Path, default=Path(".graftwork/bench/figures.json"))
    parser.add_argument("--plots", type=Path, default=Path(".graftwork/bench"))
    parser.add_argument("--peers", type=Path, default=ROOT, help="see make bench-peers")
    parser.add_argument("--again", action="store_true", help="measure what the file has already")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _measure(options)
        return
    failed = [item for item in options.items if not _in_a_process(options, item)]
    book = Book(options.json)
    show(book, Console())
    from tests.benchmarks.plots import draw

    for path in draw(book, options.plots):
        print(path)
    if failed:
        raise SystemExit(f"items that did not end: {', '.join(map(str, failed))}")


def _items(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    unknown = [number for number in numbers if number not in ITEMS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected items of 1 to {max(ITEMS)}, came {unknown}")
    return numbers


def _in_a_process(options: argparse.Namespace, item: int) -> bool:
    """Run one item with fresh memory and threads; whether it ended well."""
    options.json.parent.mkdir(parents=True, exist_ok=True)
    if options.again:
        Book(options.json).drop(item)
    command = [sys.executable, "-m", "tests.benchmarks.run", "--child", "--items", str(item)]
    for name in ("base", "dtype", "threads", "rounds", "concurrency", "json", "peers"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--plain"] if options.plain else []
    for change in options.engine:
        command += ["--engine", change]
    print(f"== item {item}: {ITEMS[item].about}", flush=True)
    began = time.monotonic()
    ended = subprocess.run(command, check=False).returncode == 0
    print(f"   {time.monotonic() - began:.0f} s{'' if ended else ', failed'}", flush=True)
    return ended


def _measure(options: argparse.Namespace) -> None:
    """The body of an item's process."""
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    engine = engine_options(options)
    digest = base_digest(Path(engine.base))
    stamp = stamp_of(digest, engine.dtype, options.threads, options.concurrency, engine.changes)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            engine=engine,
            book=Book(options.json, stamp),
            scratch=Path(scratch),
            peers=options.peers,
            rounds=options.rounds,
            threads=options.threads,
            concurrency=options.concurrency,
        )
        for item in options.items:
            module = importlib.import_module(f"tests.benchmarks.items.{ITEMS[item].module}")
            module.run(bench)


if __name__ == "__main__":
    main()
