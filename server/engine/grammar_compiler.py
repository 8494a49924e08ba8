"""From a grammar to its compiled form, on threads of their own.

Three things are slow: reading the vocabulary (a second, once), compiling, and the first mask. The
first of them happens with the first grammar; none before. A grammar is compiled in a process that
may be lost (`grammar_check`) before it is compiled here. Knows no request and no step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray

from server.engine.grammar_check import (
    GrammarChecker,
    GrammarRefused,
    compile_limits,
    refused,
    source_of,
)
from server.engine.process_memory import resident_bytes
from server.engine.request import Grammar

_THREADS = 2
# Compilers recurse: more than the checking process had, for the same grammar.
_STACK_BYTES = 64 << 20

TokenIds = NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """What the engine's tokens mean.

    Attributes:
        tokenizer: the base's transformers fast tokenizer.
        eos_token_ids: ids that end an output.
    """

    tokenizer: Any
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, eos_token_ids: Sequence[int]) -> Vocabulary:
        """With the tokenizer's own end-of-sequence token among those that end an output."""
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        return cls(tokenizer, tuple(dict.fromkeys((*eos_token_ids, *own))))


@dataclass(frozen=True)
class Compiled:
    """A grammar that can be followed.

    Attributes:
        matcher: at the start; to be copied, never moved.
        first: ids that may come first, (K,) ascending, K >= 1.
        eos_token_ids: ids that end an output, among those of a mask where it may end.
        num_bytes: about what it takes, by how much this process grew; rather too much than too little.
    """

    matcher: LLMatcher
    first: TokenIds
    eos_token_ids: frozenset[int]
    num_bytes: int = 0


class GrammarCompiler:
    """Compiles grammars for one vocabulary; `compile` is for threads of `thread_pool`.

    Args:
        read_vocabulary: called for the first grammar; None refuses them all.
        vocabulary_size: width of the logits.
    """

    def __init__(
        self, read_vocabulary: Callable[[], Vocabulary] | None, vocabulary_size: int
    ) -> None:
        self._read_vocabulary = read_vocabulary
        self._vocabulary_size = vocabulary_size
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._checkers: list[GrammarChecker] = []

    def compile(self, grammar: Grammar) -> Compiled:
        """Compile a grammar and work out its first mask.

        Raises:
            GrammarRefused: it is invalid, takes too much, or nothing can satisfy it.
        """
        source = source_of(grammar)
        self._checker().check(grammar, source)
        tokenizer = self._vocabulary()
        before = resident_bytes()
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=compile_limits())
        first = allowed_ids(matcher, grammar, self._vocabulary_size)
        grown = max(0, resident_bytes() - before)
        return Compiled(matcher, first, frozenset(tokenizer.eos_tokens), grown)

    def stop(self) -> None:
        """End the checking processes, so that their waiters go on; before `close`."""
        for checker in self._checkers:
            checker.kill()

    def close(self) -> None:
        """Give everything back, once no thread compiles any more."""
        for checker in self._checkers:
            checker.close()

    def _checker(self) -> GrammarChecker:
        checker: GrammarChecker | None = getattr(self._of_thread, "checker", None)
        if checker is None:
            checker = self._of_thread.checker = GrammarChecker()
            self._checkers.append(checker)
        return checker

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._read()
            return self._tokenizer

    def _read(self) -> LLTokenizer:
        if self._read_vocabulary is None:
            raise GrammarRefused("this engine has no tokenizer, which a grammar needs")
        vocabulary = self._read_vocabulary()
        if not vocabulary.eos_token_ids:
            raise GrammarRefused("the base has no end-of-sequence token, which a grammar needs")
        # Some bases have more rows of logits than tokens, and some fewer.
        width = max(self._vocabulary_size, len(vocabulary.tokenizer))
        return from_tokenizer(
            vocabulary.tokenizer, n_vocab=width, eos_token=list(vocabulary.eos_token_ids)
        )


def allowed_ids(matcher: LLMatcher, grammar: Grammar, vocabulary_size: int) -> TokenIds:
    """Ids (K,) that may come next, ascending, K >= 1.

    Raises:
        GrammarRefused: the matcher is or gets into an error, or nothing may come next.
    """
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    ids = np.flatnonzero(np.unpackbits(bits, bitorder="little")[:vocabulary_size])
    if matcher.is_error():
        raise refused(grammar, matcher.get_error())
    if not len(ids):
        raise refused(grammar, "no token of the base can follow")
    return ids


def thread_pool(name: str) -> ThreadPoolExecutor:
    """A few threads with stacks for deep grammars, all of them started."""
    all_started = threading.Barrier(_THREADS)
    before = threading.stack_size(_STACK_BYTES)
    try:
        pool = ThreadPoolExecutor(_THREADS, name)
        for _ in range(_THREADS):
            pool.submit(all_started.wait)  # so that none is idle and the next one is started too
    finally:
        threading.stack_size(before)
    return pool
