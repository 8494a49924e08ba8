"""A quick look at W(c): output tokens a second of the engine in this process, for work on the engine.

    python -m tests.benchmarks.serving [--concurrency 32] [--rounds 9] [--plain] [--peft]

`make bench` (tests.benchmarks.run) is the measurement beside others; this is its first contestant, without
waiting for them. With --peft PEFT takes part.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

# isort: off
from tests.benchmarks.as_served import torch
# isort: on

from rich.console import Console

from server.base.digest import base_digest
from tests.benchmarks.book import Book, show
from tests.benchmarks.items import Bench, add_engine_options, engine_options
from tests.benchmarks.items.w_beside_others import OURS, PEFT_BATCHES, PEFT_ONE, measure_w
from tests.benchmarks.stamp import stamp_of


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_engine_options(parser)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peft", action="store_true", help="PEFT takes part")
    parser.add_argument("--only-ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.json is not None:
        options.json.unlink(missing_ok=True)
    engine = engine_options(options)
    digest = base_digest(Path(engine.base))
    stamp = stamp_of(digest, engine.dtype, options.threads, options.concurrency, engine.changes)
    book = Book(options.json, stamp)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            engine=engine,
            book=book,
            scratch=Path(scratch),
            peers=Path("nowhere"),
            rounds=options.rounds,
            threads=options.threads,
        )
        wanted = {OURS, PEFT_ONE, PEFT_BATCHES} if options.peft else {OURS}
        measure_w(bench, [options.concurrency], wanted)
    show(book, Console())


if __name__ == "__main__":
    main()
