"""What one step computes, and what has to be done before it: the scheduler's answer to the engine.

Plain numbers and sequences. It does not know how a step is chosen or computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.adapter_slots import AdapterEntry
from server.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + num_tokens) of one sequence, its prefix not counted.

    More than `prefill_chunk` of them are several chunks in one. `samples` says that the last of them
    is the sequence's newest token: a token is drawn after it.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @classmethod
    def of(cls, sequence: Sequence, start: int, num_tokens: int) -> Chunk:
        """These tokens of a sequence; a fold draws none."""
        is_last = start + num_tokens == sequence.num_tokens
        return cls(sequence, start, num_tokens, sequence.request is not None and is_last)


@dataclass
class StepPlan:
    """One step.

    Attributes:
        loads: digests to read from disk, each requested once.
        copies: (from, to, tokens), blocks whose first tokens are copied before anything else is written, in
            this order.
        clears: blocks that the step fills in part and that may hold what others left; to be wiped
            after the copies.
        installs: adapters whose slot must be filled before the forward pass.
        chunks: what the forward pass computes; rows of one adapter stand together.
        preempted: sequences that lost their blocks in this step.
        joined: whether a sequence began to run in this step; no sequence yields to others after that.
    """

    loads: list[str] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    clears: list[int] = field(default_factory=list)
    installs: list[AdapterEntry] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    joined: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed step."""
        return sum(chunk.num_tokens for chunk in self.chunks)


def side_by_side(chunk: Chunk) -> tuple[bool, str]:
    """By what a plan's chunks are sorted: rows of one adapter stand together, and all that use scales."""
    request = chunk.sequence.request
    adapter = request.adapter if request is not None else None
    return (False, "") if adapter is None else (adapter.uses_scales, adapter.digest)
