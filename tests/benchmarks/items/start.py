"""10. Ready soon after `graftwork serve`, and small at rest."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from tests.benchmarks.book import fact
from tests.benchmarks.items import Bench
from tests.benchmarks.paired import LEAST_PAIRS, interval

_READY_SECONDS = 5.0
_ROOM = 400 * 1_000_000


def _first_start(bench: Bench) -> float:
    """Seconds to ready where no kernels were kept."""
    kept = {"NUMBA_CACHE_DIR": str(bench.scratch / "no-kernels")}
    with bench.serving("data-first", kept) as server:
        return server.ready_seconds


def run(bench: Bench) -> None:
    """Several starts on the converted base; memory after a few seconds of rest."""
    if bench.is_done(10, "start"):
        return
    if not bench.can_serve():
        return
    weights = sum(path.stat().st_size for path in Path(bench.engine.base).glob("*.safetensors"))
    seconds: list[float] = []
    memory: list[dict[str, int]] = []
    first = _first_start(bench)
    for number in range(bench.rounds):
        with bench.serving(f"data-{number}") as server:
            seconds.append(server.ready_seconds)
            if number < 3:
                time.sleep(2)
                memory.append(server.memory())
    low, high = interval(seconds)
    ready = fact("from the command to ready, median", statistics.median(seconds), "s")
    # As with ratios: the interval has to reach the bar.
    judged = len(seconds) >= LEAST_PAIRS
    met = low <= _READY_SECONDS if judged else None
    ready |= {"limit": _READY_SECONDS, "sense": "at most", "met": met}
    most = {kind: max(found[kind] for found in memory) for kind in memory[0]}
    room = weights + _ROOM
    facts = [
        ready,
        fact("the same, 95 % interval from", low, "s"),
        fact("the same, 95 % interval to", high, "s"),
        fact("the first start, which compiles the kernels", first, "s"),
        fact("base weights", weights, "bytes"),
        fact("anonymous memory at rest", most["anonymous"], "bytes", room, judged=judged),
        fact("file-backed pages at rest", most["file"], "bytes"),
        fact("shared memory at rest", most["shared"], "bytes"),
    ]
    bench.book.put(10, "start", {"facts": facts, "rounds": bench.rounds, "seconds": seconds})
