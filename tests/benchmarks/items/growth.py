"""9. Cost grows as it should: tokens a second over concurrency, context and prefix length."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.adapters import write_adapter
from tests.benchmarks.items import Bench, w_asks
from tests.benchmarks.own import Ask, Own, Run
from tests.benchmarks.workload import NEW_TOKENS, prompt

_CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128)
_CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
_PREFIXES = (0, 16, 64, 256, 512, 1024, 2048)
# Rows of the two sweeps over lengths.
_ROWS = 4
_WITH_PREFIX = 16
_RATE, _DECODE = "prefill included", "decode alone"


def run(bench: Bench) -> None:
    """One run of each size, after one that does not count."""
    if not bench.is_done(9, "concurrency"):
        _concurrency(bench)
    if not bench.is_done(9, "context"):
        _context(bench)
    if not bench.is_done(9, "prefix length"):
        _prefix(bench)


def _concurrency(bench: Bench) -> None:
    most = max(_CONCURRENCIES)
    own = bench.own(max_running=most, max_step_tokens=most + 384)
    refs = [adapter.ref for adapter in bench.adapters(own)]
    own.run(w_asks(own, 8, refs))
    sizes = [size for size in _CONCURRENCIES if size <= 4 * bench.concurrency]
    runs = [own.run(w_asks(own, size, refs)) for size in sizes]
    _put(bench, "concurrency", "concurrent requests, mixed adapters", sizes, runs)
    own.close()


def _context(bench: Bench) -> None:
    own = bench.own(folders={})
    sizes = [size for size in _CONTEXTS if size <= own.spec.max_positions]
    own.run(_of_context(own, 128))
    runs = [own.run(_of_context(own, size)) for size in sizes]
    over = f"tokens of context, {_ROWS} requests of {NEW_TOKENS} new tokens"
    _put(bench, "context", over, sizes, runs)
    own.close()


def _of_context(own: Own, size: int) -> list[Ask]:
    """Requests that end with so many tokens."""
    return [
        Ask(prompt(size - NEW_TOKENS, own.spec.vocab_size, index), NEW_TOKENS)
        for index in range(_ROWS)
    ]


def _prefix(bench: Bench) -> None:
    probe = bench.own(folders={})
    root = bench.scratch / "prefixes"
    adapters = {
        n: write_adapter(root, f"prefix-{n}", "prefix", probe.spec, n=n) for n in _PREFIXES if n
    }
    probe.close()
    own = bench.own(folders={adapter.name: adapter.directory for adapter in adapters.values()})
    runs = []
    for n in _PREFIXES:
        ref = adapters[n].ref if n else None
        own.preload([ref] if ref else [])
        runs.append(own.run(w_asks(own, _WITH_PREFIX, [ref])))
    over = f"virtual tokens of the one adapter of {_WITH_PREFIX} requests"
    _put(bench, "prefix length", over, _PREFIXES, runs)
    own.close()


def _put(bench: Bench, measure: str, over: str, x: Sequence[int], runs: list[Run]) -> None:
    curves = {_RATE: [run.rate for run in runs], _DECODE: [run.decode_rate for run in runs]}
    result = {"over": over, "x": list(x), "unit": "tokens/s", "curves": curves}
    bench.book.put(9, measure, result)
