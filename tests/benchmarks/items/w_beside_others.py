"""1. W beside PEFT, transformers' continuous batching, llama.cpp and vLLM.

Peers that are not installed are left out, and so are their bars.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.adapters import lora_adapters
from tests.benchmarks.children import Child
from tests.benchmarks.items import Bench, w_asks
from tests.benchmarks.own import Own, rate_of
from tests.benchmarks.paired import Bar, Contestant
from tests.benchmarks.peers import llama
from tests.benchmarks.peers.install import vllm_python
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
    missing = [c for c in concurrencies if not bench.is_done(1, f"W({c})")]
    if not missing:
        return
    own = bench.own()
    with ExitStack() as stack:
        stack.callback(own.close)
        started = {
            name: start(bench, own, stack)
            for name, start in STARTERS.items()
            if name in wanted and is_there(bench, name)
        }
        for concurrency in missing:
            contestants = {
                name: contestant_of(concurrency)
                for name, contestant_of in started.items()
                if name not in _SLOW or concurrency == max(concurrencies)
            }
            for contestant in contestants.values():
                contestant(0)  # loads adapters, allocates, compiles
            bars = BARS.get(concurrency, BARS[32])
            bench.compare(1, f"W({concurrency})", contestants, bars)


def is_there(bench: Bench, name: str) -> bool:
    """Whether a contestant is installed."""
    if name == LLAMA:
        return llama.is_installed(bench.peers)
    if name in (VLLM, VLLM_LORA):
        return vllm_python(bench.peers).exists()
    return True


def _ours(bench: Bench, own: Own, stack: ExitStack) -> Callable[[int], Contestant]:
    refs = [adapter.ref for adapter in bench.adapters(own)]
    return lambda c: rate_of(own, lambda number: w_asks(own, c, refs))


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


STARTERS: dict[str, Starter] = {
    OURS: _ours,
    PEFT_ONE: _peft("one by one"),
    PEFT_BATCHES: _peft("batches"),
    TRANSFORMERS: _transformers,
    LLAMA: _llama,
    VLLM: _vllm,
    VLLM_LORA: _vllm_lora,
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
    # vLLM asks for this library before all others "for best performance"; it comes with its requirements.
    openmp = vllm_python(bench.peers).parent.parent / "lib" / "libiomp5.so"
    return _child(
        bench,
        name,
        [vllm_python(bench.peers), script, base, *loras],
        # Its engine in the child itself: nothing of it runs while another is measured.
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="2",
        OMP_NUM_THREADS=str(bench.threads),
        LD_PRELOAD=str(openmp.absolute()) if openmp.exists() else "",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{bench.threads - 1}",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CACHE_ROOT=str((bench.peers / "vllm-cache").resolve()),
        HF_HUB_OFFLINE="1",
    )


def _w(child: Child, own: Own) -> Callable[[int], Contestant]:
    return lambda c: lambda number: child.rate(prompts(c, own.spec.vocab_size), NEW_TOKENS)
