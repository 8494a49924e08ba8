"""One sequence and its life.

A sequence is a request while the engine works on it, or a fold: an adapter's soft prompt on its way
through the base. Its KV is its adapter's shared segment followed by a private tail:

    positions  [0, prefix_tokens)          [prefix_tokens, prefix_tokens + num_computed)
    held by    the adapter's segment       this sequence's own blocks

Pure: no tensors, clocks or threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from server.engine.request import GenerationRequest


class SequenceState(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.RUNNING: frozenset({SequenceState.PREEMPTED, SequenceState.FINISHED}),
    SequenceState.PREEMPTED: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


@dataclass(eq=False)
class Sequence:
    """State of one sequence.

    Attributes:
        request: the request; None for a fold.
        arrival: order of arrival, unique; lower is older.
        token_ids: prompt and output so far; empty for a fold.
        num_prompt_tokens: how many of `token_ids` are the prompt; the rows of a fold.
        num_computed: tokens whose KV is in place.
        block_ids: the private tail.
        fold_digest: the adapter that this fold is for.
        num_noted: full blocks of the tail that are in the prefix cache.
        node: the beginning that they make up there.
    """

    request: GenerationRequest | None
    arrival: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    state: SequenceState = SequenceState.WAITING
    fold_digest: str | None = None
    prompt_logprobs_done: bool = False
    num_noted: int = 0
    node: int = 0

    @classmethod
    def of(cls, request: GenerationRequest, arrival: int) -> Sequence:
        """A waiting sequence for a request."""
        ids = list(request.prompt_token_ids)
        done = not request.sampling.prompt_logprobs
        return cls(request, arrival, ids, len(ids), prompt_logprobs_done=done)

    @classmethod
    def fold(cls, digest: str, num_rows: int, block_ids: list[int], arrival: int) -> Sequence:
        """A running fold of `num_rows` soft rows into blocks that it already holds."""
        fold = cls(None, arrival, [], num_rows, block_ids=block_ids, fold_digest=digest)
        fold.to(SequenceState.RUNNING)
        return fold

    def to(self, state: SequenceState) -> None:
        """Move to `state`; a move that TRANSITIONS does not list is a bug and raises RuntimeError."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"sequence cannot go from {self.state.value} to {state.value}")
        self.state = state

    @property
    def adapter_digest(self) -> str | None:
        """The adapter that it runs with; None for the base and for a fold."""
        if self.request is None or self.request.adapter is None:
            return None
        return self.request.adapter.digest

    @property
    def cache_scope(self) -> str:
        """Scope of the cached prefixes that it may reuse, and that may reuse its own."""
        return "" if self.request is None else self.request.cache_scope

    @property
    def prefix_tokens(self) -> int:
        """Positions before its own tokens."""
        if self.request is None or self.request.adapter is None:
            return 0
        return self.request.adapter.num_virtual_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far (a fold: its rows)."""
        return self.num_prompt_tokens if self.request is None else len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_reusable(self) -> int:
        """Tokens whose keys and values may come from elsewhere; what follows needs logits."""
        if self.prompt_logprobs_done or self.request is None:
            return self.num_tokens - 1
        return max(0, min(self.num_tokens, self.request.sampling.prompt_logprobs_from) - 1)

    def next_chunk(self, prefill_chunk: int) -> int:
        """Tokens to compute next: 1 when decoding, else up to the next multiple of `prefill_chunk`."""
        pending = self.num_tokens - self.num_computed
        return min(pending, prefill_chunk - self.num_computed % prefill_chunk) if pending > 1 else 1
