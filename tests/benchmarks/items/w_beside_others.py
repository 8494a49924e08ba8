"""1. W beside PEFT, transformers' continuous batching, llama.cpp and vLLM.

Peers that are not installed or do not start are left out, and so are their bars; it is said who and why.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from server.base.convert import read_manifest
from tests.benchmarks.adapters import lora_adapters
from tests.benchmarks.children import Child, ChildFailed
from tests.benchmarks.items import Bench, w_asks
from tests.benchmarks.own import Own, rate_of
from tests.benchmarks.paired import Bar, Contestant
from tests.benchmarks.peers import llama
from tests.benchmarks.peers.install import llama_is_installed, vllm_is_installed, vllm_python
from tests.benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, prompts

OURS = "ours, mixed adapters"
PEFT_ONE = "PEFT, one at a time"
PEFT_BATCHES = "PEFT, a batch an adapter"
TRANSFORMERS = "transformers continuous batching, base only"
LLAMA = "llama.cpp, base only"
VLLM = "vLLM, base only"
VLLM_LORA = "vLLM, 8 LoRA adapters"

BARS = {
    32: [
        Bar(OURS, PEFT_ONE, 20.0),
        Bar(OURS, PEFT_BATCHES, 6.0),
        Bar(OURS, TRANSFORMERS, 4.0),
        Bar(OURS, LLAMA, 1.2),
        Bar(OURS, VLLM_LORA, 3.5),
        Bar(OURS, VLLM, 1.0),
    ],
    8: [Bar(OURS, LLAMA, 1.0), Bar(OURS, VLLM), Bar(OURS, VLLM_LORA)],
    1: [Bar(OURS, LLAMA, 0.6), Bar(OURS, VLLM), Bar(OURS, VLLM_LORA)],
}
# PEFT's rate is the same for two requests as for eight; one adapter of each method is asked.
_PEFT_ADAPTERS = slice(0, None, 2)
_SLOW = {PEFT_ONE, PEFT_BATCHES, TRANSFORMERS}

# Starts somebody, who lasts as long as the stack; what it returns makes a contestant of W(c) for each c.
Starter = Callable[[Bench, Own, ExitStack], Callable[[int], Contestant]]


def run(bench: Bench) -> None:
    """W(1), W(8) and W(32), the shortest first; the slowest take part in the last alone."""
    measure_w(bench, sorted({1, 8, bench.concurrency}), set(STARTERS))


def measure_w(bench: Bench, concurrencies: Sequence[int], wanted: set[str]) -> None:
    """Comparisons at W(c) of those that are wanted and installed."""
    missing = [c for c in concurrencies if not _is_done(bench, f"W({c})", wanted)]
    if not missing:
        return
    own = bench.own()
    with ExitStack() as stack:
        stack.callback(own.close)
        started: dict[str, Callable[[int], Contestant]] = {}
        left_out: dict[str, str] = {}
        for name in (name for name in STARTERS if name in wanted):
            why = why_not(bench, name)
            if why is None:
                try:
                    started[name] = STARTERS[name](bench, own, stack)
                except ChildFailed as failure:
                    why = f"did not start: {failure}"
            if why is not None:
                left_out[name] = why
                print(f"   left out: {name}: {why}", file=sys.stderr)
        for concurrency in missing:
            contestants = {
                name: contestant_of(concurrency)
                for name, contestant_of in started.items()
                if name not in _SLOW or concurrency == max(concurrencies)
            }
            for contestant in contestants.values():
                contestant(0)  # loads adapters, allocates, compiles
            bars = _bars(concurrency)
            bench.compare(1, f"W({concurrency})", contestants, bars, left_out=left_out)


def _is_done(bench: Bench, measure: str, wanted: set[str]) -> bool:
    """Whether it was taken with all who are wanted and can take part today."""
    if not bench.is_done(1, measure):
        return False
    found = bench.book.get(1, measure) or {}
    return all(name not in wanted or why_not(bench, name) for name in found.get("left out", ()))


def why_not(bench: Bench, name: str) -> str | None:
    """Why a contestant cannot take part; None where it can."""
    if name not in (LLAMA, VLLM, VLLM_LORA):
        return None
    there = llama_is_installed if name == LLAMA else vllm_is_installed
    if not there(bench.peers):
        return "not installed (make bench-peers)"
    if bench.engine.dtype != "bfloat16":
        return f"it computes in bfloat16, the others in {bench.engine.dtype}"
    if name == LLAMA and read_manifest(Path(bench.engine.base)) is None:
        return "it has the default base, the others another"
    return None


def _bars(concurrency: int) -> list[Bar]:
    if concurrency in BARS:
        return BARS[concurrency]
    return [dataclasses.replace(bar, limit=None) for bar in BARS[32]]


def _ours(bench: Bench, own: Own, stack: ExitStack) -> Callable[[int], Contestant]:
    refs = [adapter.ref for adapter in bench.adapters(own)]
    own.preload(refs)  # the one request of W(1) has another one in each round
    return lambda c: rate_of(own, lambda number: w_asks(own, c, refs, first=number))


def _peft(how: str) -> Starter:
    def start(bench: Bench, own: Own, stack: ExitStack) -> Callable[[int], Contestant]:
        asked = bench.adapters(own)[_PEFT_ADAPTERS]
        module = (sys.executable, "-m", "tests.benchmarks.peers.peft_child")
        fixed = (bench.engine.base, bench.engine.dtype, str(bench.threads))
        command = [*module, *fixed, *(adapter.directory for adapter in asked)]
        child = stack.enter_context(_child(bench, f"peft {how}", command))

        def contestant_of(c: int) -> Contestant:
            each = 1 if how == "one by one" else max(1, c // 8)
            names = [adapter.name for adapter in asked for _ in range(each)]
            asked_of = prompts(len(names), own.spec.vocab_size)
            return lambda number: child.rate(asked_of, NEW_TOKENS, how=how, adapters=names)

        return contestant_of

    return start


def _transformers(bench: Bench, own: Own, stack: ExitStack) -> Callable[[int], Contestant]:
    module = (sys.executable, "-m", "tests.benchmarks.peers.transformers_child")
    command = [*module, bench.engine.base, bench.engine.dtype, str(bench.threads)]
    child = stack.enter_context(_child(bench, "transformers", command))
    return _w(child, own)


def _llama(bench: Bench, own: Own, stack: ExitStack) -> Callable[[int], Contestant]:
    fixed = (bench.peers, bench.threads)
    return lambda c: lambda number: llama.rate(*fixed, c, PROMPT_TOKENS, NEW_TOKENS)


def _vllm(bench: Bench, own: Own, stack: ExitStack) -> Callable[[int], Contestant]:
    return _w(stack.enter_context(_vllm_child(bench, "vllm", [])), own)


def _vllm_lora(bench: Bench, own: Own, stack: ExitStack) -> Callable[[int], Contestant]:
    folder = bench.scratch / "lora"
    paths = sorted(folder.glob("*")) or lora_adapters(folder, bench.engine.base)
    return _w(stack.enter_context(_vllm_child(bench, "vllm-lora", paths)), own)


# In this order they are measured: the closest comparison is one of neighbours.
STARTERS: dict[str, Starter] = {
    PEFT_ONE: _peft("one by one"),
    PEFT_BATCHES: _peft("batches"),
    TRANSFORMERS: _transformers,
    OURS: _ours,
    VLLM: _vllm,
    VLLM_LORA: _vllm_lora,
    LLAMA: _llama,
}


@contextmanager
def _child(bench: Bench, name: str, command: list[Any], **environment: str) -> Iterator[Child]:
    log = bench.scratch / f"{name.replace(' ', '-')}.log"
    child = Child(command, log, environment)
    try:
        child.wait_ready()
        yield child
    finally:
        child.close()


def _vllm_child(bench: Bench, name: str, loras: list[Path]) -> Any:
    script = Path(__file__).parent.parent / "peers" / "vllm_child.py"
    base = Path(bench.engine.base).resolve()
    cores = sorted(os.sched_getaffinity(0))[: bench.threads]
    # vLLM asks for this library before all others "for best performance"; it comes with its requirements.
    # It would like tcmalloc too, which does not: here that made no difference.
    openmp = vllm_python(bench.peers).parent.parent / "lib" / "libiomp5.so"
    return _child(
        bench,
        name,
        [vllm_python(bench.peers), script, base, *loras],
        # Its engine in the child itself: nothing of it runs while another is measured. With engine and
        # worker in processes of their own, its default, it made 34 and 239 tokens/s in W(1) and W(8)
        # instead of 44 and 311: they poll, on the cores that compute.
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="2",
        OMP_NUM_THREADS=str(bench.threads),
        LD_PRELOAD=str(openmp.absolute()) if openmp.exists() else "",
        # What it sets for its worker process where it has one.
        KMP_AFFINITY=f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]",
        KMP_BLOCKTIME="5",
        KMP_TPAUSE="0",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CACHE_ROOT=str((bench.peers / "vllm-cache").resolve()),
        HF_HUB_OFFLINE="1",
    )


def _w(child: Child, own: Own) -> Callable[[int], Contestant]:
    return lambda c: lambda number: child.rate(prompts(c, own.spec.vocab_size), NEW_TOKENS)
