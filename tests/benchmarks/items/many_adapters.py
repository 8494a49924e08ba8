"""4. Many adapters: registered ones cost nothing, and more active ones than there are slots cost little.

An adapter of the workload under many digests is many adapters to the engine: each is read, folded and
evicted by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.engine.request import AdapterRef
from tests.benchmarks.adapters import BenchAdapter
from tests.benchmarks.items import Bench, w_asks
from tests.benchmarks.own import Own, rate_of
from tests.benchmarks.paired import Bar

REGISTERED = 1000
MANY, FEW = f"{REGISTERED} known, 8 active", "8 known"
# Adapters that have a slot each. Of more adapters than requests run at a time, some wait.
FIT = 16
_WORKING_SETS = (8, 12, 16, 20, 24, 32, 48, 64)
_TURNS = 256


def run(bench: Bench) -> None:
    """Registered, working sets, and 256 in turn."""
    if not bench.is_done(4, "registered"):
        _registered(bench)
    if not bench.is_done(4, "working set"):
        _working_sets(bench)
    if not bench.is_done(4, "256 active", 1):
        _in_turn(bench)


def _registered(bench: Bench) -> None:
    adapters = bench.adapters()
    many, few = _engine(bench, adapters, REGISTERED), _engine(bench, adapters, 8)
    many.preload(copies(adapters, REGISTERED))
    active = [adapter.ref for adapter in adapters]
    c = bench.concurrency
    contestants = {
        MANY: rate_of(many, lambda _: w_asks(many, c, active)),
        FEW: rate_of(few, lambda _: w_asks(few, c, active)),
    }
    for contestant in contestants.values():
        contestant(0)
    bench.compare(4, "registered", contestants, [Bar(MANY, FEW, 0.97)])
    many.close()
    few.close()


def _working_sets(bench: Bench) -> None:
    """W with ever more adapters in turn, on an engine with slots for FIT of them."""
    adapters = bench.adapters()
    blocks = 1024
    # A quarter of the workload's adapters are IA3; each of the others has 20 positions: two blocks.
    segments = FIT * 3 // 4 * 2
    probe = bench.own()
    kv_bytes = blocks * probe.block_bytes
    probe.close()
    own = _engine(
        bench,
        adapters,
        max(_WORKING_SETS),
        kv_bytes=kv_bytes,
        adapter_kv_share=(segments + 0.5) / blocks,
        scale_slots=FIT // 4,
        max_running=bench.concurrency,
    )
    own.preload(copies(adapters, max(_WORKING_SETS)))

    def working_set(size: int) -> Any:
        refs = copies(adapters, size)
        return rate_of(own, lambda _: w_asks(own, max(bench.concurrency, size), refs))

    contestants = {f"{size} active": working_set(size) for size in _WORKING_SETS}
    two = (f"{2 * FIT} active", f"{FIT} active")
    shown = {name: contestants[name] for name in two}
    for contestant in shown.values():
        contestant(0)
    bench.compare(4, "working set", shown, [Bar(*two, 0.6)])
    curve = [contestant(0) for contestant in contestants.values()]
    bench.book.put(
        4,
        "working set sizes",
        {
            "over": f"active adapters ({FIT} have slots)",
            "x": _WORKING_SETS,
            "unit": "tokens/s",
            "curves": {f"W({bench.concurrency}), the longer sets two turns of it": curve},
        },
    )
    own.close()


def _in_turn(bench: Bench) -> None:
    """256 requests, no more than c running: each its own adapter, over 8 adapters in turn."""
    adapters = bench.adapters()
    own = _engine(bench, adapters, _TURNS, max_running=bench.concurrency)
    all_refs, few = copies(adapters, _TURNS), [adapter.ref for adapter in adapters]
    own.preload(all_refs)
    contestants = {
        "256 active in turn": rate_of(own, lambda _: w_asks(own, _TURNS, all_refs)),
        "8 active": rate_of(own, lambda _: w_asks(own, _TURNS, few)),
    }
    bars = [Bar("256 active in turn", "8 active")]
    bench.compare(4, "256 active", contestants, bars, rounds=1)
    own.close()


def copies(adapters: list[BenchAdapter], count: int) -> list[AdapterRef]:
    """So many adapters, the workload's over and over, each under a digest of its own."""
    size = len(adapters)
    return [adapters[i % size].copy(i // size) for i in range(count)]


def _engine(bench: Bench, adapters: list[BenchAdapter], count: int, **config: Any) -> Own:
    directories = {adapter.name: adapter.directory for adapter in adapters}
    folders: dict[str, Path] = {
        ref.digest: directories[ref.digest.partition("+")[0]] for ref in copies(adapters, count)
    }
    return bench.own(folders=folders, **config)
