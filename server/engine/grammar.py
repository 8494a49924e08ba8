"""Grammars while the engine works: compiled once, followed by each output, masked ahead of time.

    start     a request that wants a grammar waits here, outside the scheduler, until it is compiled
    poll      it is: its guide knows which tokens may come first
    allowed   the mask of the next token, worked out while the forward pass ran
    advance   a token was chosen: the mask of the one after it is begun

What the engine's thread does here takes microseconds; the threads that do the work do not exist
before the first request that needs them. A mask that is late holds up its own output only. Knows no
logits and no scheduler.
"""

from __future__ import annotations

import queue
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field

import numpy as np
import torch
from llguidance import LLMatcher

from server.engine.grammar_check import GrammarRefused, refused
from server.engine.grammar_compiler import (
    Compiled,
    GrammarCompiler,
    TokenIds,
    Vocabulary,
    allowed_ids,
    thread_pool,
)
from server.engine.process_memory import give_back_free_memory
from server.engine.request import Grammar, SamplingParams

# The library bounds the work of one mask to less; beyond this the output has had its share.
MASK_SECONDS = 5.0
CACHED_GRAMMARS = 64
# Together; the newest one stays in any case.
CACHED_BYTES = 64 << 20
# The allocator retains freed memory; less than this is not worth returning.
_WORTH_TRIMMING = 8 << 20


@dataclass(frozen=True)
class Started:
    """A request whose wait is over: it has a guide, or `refusal` says why it has none."""

    request_id: str
    refusal: str | None = None


@dataclass
class _Job:
    """A grammar that is being compiled, and the requests that wait for it."""

    future: Future[None]
    request_ids: list[str] = field(default_factory=list)


class Guide:
    """One output's way through its grammar.

    Args:
        compiled: the grammar.
        grammar: what a refusal names.
        pool: where masks are worked out.
        vocabulary_size: width of the logits.
        ignore_eos: end only where nothing else may come.
    """

    def __init__(
        self,
        compiled: Compiled,
        grammar: Grammar,
        pool: ThreadPoolExecutor,
        vocabulary_size: int,
        ignore_eos: bool = False,
    ) -> None:
        self._matcher: LLMatcher = compiled.matcher.deep_copy()
        self._grammar = grammar
        self._pool = pool
        self._vocabulary_size = vocabulary_size
        self._eos_token_ids = compiled.eos_token_ids
        self.num_bytes = compiled.num_bytes
        self._ignore_eos = ignore_eos
        self._begun_at = time.monotonic()
        self._next: Future[TokenIds] = Future()
        self._next.set_result(self._wanted(compiled.first))

    def allowed(self, timeout: float) -> torch.Tensor | None:
        """Ids (K,) that may come next, ascending, K >= 1; None if that takes longer than `timeout`.

        Raises:
            GrammarRefused: the grammar turned out to be too much work, or nothing may come next.
        """
        try:
            return torch.from_numpy(self._next.result(timeout))
        except NotYet:
            if time.monotonic() - self._begun_at > MASK_SECONDS:
                message = f"one token's mask took more than {MASK_SECONDS:.0f} seconds"
                raise refused(self._grammar, message) from None
            return None

    def ends(self, token_id: int) -> bool:
        """Whether the output ends with this token."""
        return token_id in self._eos_token_ids

    def advance(self, token_id: int) -> None:
        """A token was chosen: begin the mask of the one after it."""
        self._begun_at = time.monotonic()
        self._next = self._pool.submit(self._follow, token_id)

    def _follow(self, token_id: int) -> TokenIds:
        try:
            self._matcher.consume_token(token_id)
            ids = allowed_ids(self._matcher, self._grammar, self._vocabulary_size)
        except GrammarRefused:
            raise
        except BaseException as error:  # a panic of the library's is no Exception
            raise refused(self._grammar, repr(error)) from error
        return self._wanted(ids)

    def _wanted(self, ids: TokenIds) -> TokenIds:
        if not self._ignore_eos:
            return ids
        going_on = ids[~np.isin(ids, list(self._eos_token_ids))]
        return going_on if len(going_on) else ids


class Guides:
    """The grammars of one engine. All methods are for the engine's thread.

    Args:
        read_vocabulary: called on a thread, once, for the first grammar; None refuses them all.
        vocabulary_size: width of the logits.
    """

    def __init__(
        self, read_vocabulary: Callable[[], Vocabulary] | None, vocabulary_size: int
    ) -> None:
        self._vocabulary_size = vocabulary_size
        self._compiler = GrammarCompiler(read_vocabulary, vocabulary_size)
        self._compilers: ThreadPoolExecutor | None = None
        self._maskers: ThreadPoolExecutor | None = None
        self._waiting: dict[str, SamplingParams] = {}
        self._jobs: dict[Grammar, _Job] = {}
        self._done: queue.SimpleQueue[tuple[Grammar, Compiled | GrammarRefused]]
        self._done = queue.SimpleQueue()
        self._cache: OrderedDict[Grammar, Compiled | GrammarRefused] = OrderedDict()
        self._started: list[Started] = []
        self._guides: dict[str, Guide] = {}

    @property
    def num_waiting(self) -> int:
        """Requests that `poll` has not returned yet."""
        return len(self._waiting) + len(self._started)

    def start(self, request_id: str, sampling: SamplingParams) -> None:
        """Compile a request's grammar unless that is done or under way; `poll` returns it when done.

        Args:
            request_id: the request.
            sampling: its parameters, `grammar` included.
        """
        grammar = sampling.grammar
        if grammar is None:
            raise ValueError("a request without a grammar has nothing to wait for")
        self._waiting[request_id] = sampling
        known = self._cache.get(grammar)
        if known is not None:
            self._cache.move_to_end(grammar)
            self._begin(request_id, known)
            return
        if grammar not in self._jobs:
            self._jobs[grammar] = _Job(self._pool().submit(self._compile, grammar))
        self._jobs[grammar].request_ids.append(request_id)

    def poll(self, timeout: float | None = None) -> list[Started]:
        """Requests whose wait has ended; waits up to `timeout` seconds where one is given."""
        if timeout is None or self._started:
            timeout = 0.0
        try:
            grammar, result = self._done.get(timeout=timeout) if timeout else self._done.get(False)
        except queue.Empty:
            pass
        else:
            self._keep(grammar, result)
            for request_id in self._jobs.pop(grammar).request_ids:
                self._begin(request_id, result)
        started, self._started = self._started, []
        return started

    def get(self, request_id: str) -> Guide | None:
        """The guide of a started request; None for one without a grammar."""
        return self._guides.get(request_id)

    def forget(self, request_id: str) -> None:
        """A request has ended; unknown ids are ignored."""
        guide = self._guides.pop(request_id, None)
        if guide is not None and guide.num_bytes > _WORTH_TRIMMING:
            self._trim()
        self._started = [one for one in self._started if one.request_id != request_id]
        sampling = self._waiting.pop(request_id, None)
        if sampling is None or sampling.grammar is None:
            return
        job = self._jobs[sampling.grammar]
        job.request_ids.remove(request_id)
        if not job.request_ids and job.future.cancel():
            del self._jobs[sampling.grammar]  # it had not begun, and nothing else waits for it

    def close(self) -> None:
        """Stop the threads and the processes behind them."""
        pools = [pool for pool in (self._compilers, self._maskers) if pool is not None]
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        self._compiler.stop()
        for pool in pools:
            pool.shutdown(wait=True)
        self._compiler.close()

    def _begin(self, request_id: str, result: Compiled | GrammarRefused) -> None:
        sampling = self._waiting.pop(request_id)
        if isinstance(result, GrammarRefused):
            self._started.append(Started(request_id, str(result)))
            return
        assert sampling.grammar is not None  # noqa: S101 - `start` has seen to it
        assert self._maskers is not None  # noqa: S101 - made before anything was compiled
        self._guides[request_id] = Guide(
            result, sampling.grammar, self._maskers, self._vocabulary_size, sampling.ignore_eos
        )
        self._started.append(Started(request_id))

    def _keep(self, grammar: Grammar, result: Compiled | GrammarRefused) -> None:
        if isinstance(result, GrammarRefused) and not result.lasting:
            return
        self._cache[grammar] = result
        while len(self._cache) > 1 and (
            len(self._cache) > CACHED_GRAMMARS
            or sum(map(_num_bytes, self._cache.values())) > CACHED_BYTES
        ):
            _, dropped = self._cache.popitem(last=False)
            if _num_bytes(dropped) > _WORTH_TRIMMING:
                self._trim()

    def _trim(self) -> None:
        if self._maskers is not None:
            # Behind what it waits for, and not here: it takes some hundredths of a second.
            self._maskers.submit(give_back_free_memory)

    def _pool(self) -> ThreadPoolExecutor:
        if self._compilers is None:
            self._compilers = thread_pool("grammar-compiler")
            self._maskers = thread_pool("grammar-masks")
        return self._compilers

    def _compile(self, grammar: Grammar) -> None:
        result: Compiled | GrammarRefused
        try:
            result = self._compiler.compile(grammar)
        except GrammarRefused as refusal:
            result = refusal
        except BaseException as error:  # of any kind: requests wait for this to end
            result = GrammarRefused(f"the grammar was not compiled: {error!r}", lasting=False)
        self._done.put((grammar, result))


def _num_bytes(result: Compiled | GrammarRefused) -> int:
    return result.num_bytes if isinstance(result, Compiled) else 0
