"""5. Soft prompts are free: first tokens behind 200 virtual ones, and 1,024 virtual tokens that all share.

Sharing off is an engine to which every request's adapter is another one: the same file under as many
digests as there are requests, so that each has keys and values of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from adapters.base_model import BaseModelSpec
from server.engine.request import AdapterRef
from tests.benchmarks.adapters import BenchAdapter, write_adapter
from tests.benchmarks.book import fact
from tests.benchmarks.items import Bench, w_asks
from tests.benchmarks.own import Ask, Own, rate_of
from tests.benchmarks.paired import Bar, Contestant
from tests.benchmarks.workload import PROMPT_TOKENS, prompt

SHORT, LONG = 16, 1024
LONG_SHARED, LONG_ALONE = f"{LONG} virtual tokens", f"{LONG} virtual tokens, sharing off"
SHORT_SHARED = f"{SHORT} virtual tokens"
_FIRST = 200
_BASE = "base only"
# First tokens a measurement; one takes a few hundredths of a second.
_REPEATS = 5


def run(bench: Bench) -> None:
    """First tokens, then throughput and memory."""
    own = bench.own(folders={})
    root = bench.scratch / "soft"
    if not bench.is_done(5, "first token"):
        _first_tokens(bench, own.spec, root)
    spec, block_bytes = own.spec, own.block_bytes
    own.close()
    if not bench.is_done(5, "sharing"):
        short = write_adapter(root, "short", "p-tuning", spec, n=SHORT)
        long = write_adapter(root, "long", "p-tuning", spec, n=LONG)
        _sharing(bench, short, long, block_bytes)


def _first_tokens(bench: Bench, spec: BaseModelSpec, root: Path) -> None:
    adapters = [
        write_adapter(root, f"{method}-{_FIRST}", method, spec, n=_FIRST)
        for method in ("p-tuning", "cpt")
    ]
    own = bench.own(folders={adapter.name: adapter.directory for adapter in adapters})
    own.preload([adapter.ref for adapter in adapters])
    contestants = {_BASE: first_token(own, None)}
    for adapter in adapters:
        contestants[f"{adapter.method}, {_FIRST} virtual tokens"] = first_token(own, adapter.ref)
    for contestant in contestants.values():
        contestant(0)
    bars = [Bar(name, _BASE, 1.15, "at most") for name in list(contestants)[1:]]
    bench.compare(5, "first token", contestants, bars, unit="ms to the first token")
    own.close()


def first_token(own: Own, ref: AdapterRef | None) -> Contestant:
    """Milliseconds until the first token of one request by itself."""

    def measure(number: int) -> float:
        seconds = []
        for repeat in range(_REPEATS):
            ids = prompt(PROMPT_TOKENS, own.spec.vocab_size, (number, repeat))
            seconds.append(own.run([Ask(ids, 1, ref)]).first_token_seconds)
        return 1000 * statistics.median(seconds)

    return measure


def _sharing(bench: Bench, short: BenchAdapter, long: BenchAdapter, block_bytes: int) -> None:
    c = bench.concurrency
    alone = [long.copy(number) for number in range(c)]
    folders = {short.name: short.directory, long.name: long.directory}
    # Room for a segment of its own for every request, and for what they generate.
    blocks = c * (LONG // 16 + 16)
    own = bench.own(
        folders=folders | {ref.digest: long.directory for ref in alone},
        kv_bytes=max(1 << 30, 2 * blocks * block_bytes),
        adapter_kv_share=0.8,
        host_bytes=4 << 30,
    )
    contestants = {
        LONG_SHARED: rate_of(own, lambda _: w_asks(own, c, [long.ref])),
        SHORT_SHARED: rate_of(own, lambda _: w_asks(own, c, [short.ref])),
        LONG_ALONE: rate_of(own, lambda _: w_asks(own, c, alone)),
    }
    facts = []
    for count in sorted({1, 8, c}):
        facts += _memory(own, f"sharing, c = {count}", count, [long.ref])
    facts += _memory(own, f"sharing off, c = {c}", c, alone)
    contestants[SHORT_SHARED](0)
    bars = [Bar(LONG_SHARED, SHORT_SHARED, 0.55), Bar(LONG_SHARED, LONG_ALONE, 1.3)]
    bench.compare(5, "sharing", contestants, bars, facts=facts)
    own.close()


def _memory(own: Own, what: str, count: int, refs: Sequence[AdapterRef]) -> list[dict[str, object]]:
    """KV bytes of the adapters that `refs` name, and of everything at the most; in a fresh pool."""
    for ref in refs:
        own.engine.unload(ref.digest)
    run = own.run(w_asks(own, count, refs))
    entries = own.engine.scheduler.slots.entries
    held = sum(len(entries[ref.digest].block_ids) for ref in set(refs)) * own.block_bytes
    peak = run.most_blocks * own.block_bytes
    return [
        fact(f"KV of the adapter, {what}", held, "bytes"),
        fact(f"KV in use at the most, {what}", peak, "bytes"),
    ]
