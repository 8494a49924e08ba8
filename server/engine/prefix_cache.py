"""Which blocks hold the keys and values of which beginnings.

A beginning is a scope, an adapter (or the base) and the token ids from the first prompt token on. It is
kept as a tree: a full block is found under the beginning before it by its own token ids, and so on down.

    root of adapter a --(Tweet text : The ...)--> block 7 --(fridge you ...)--> block 2
                                                         `--(parcel is ...)---> block 5

Another adapter has another root, since its keys and values of the same tokens are others. So has
another scope: those are the same, but whether they are there is nobody else's to find out. A full block is
shared as it is. A block that is only partly the same, or only partly filled, is copied and goes on
from where the tokens part. Pure: tensors are copied by somebody else.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass

from server.engine.blocks import BlockPool, blocks_for
from server.engine.sequence import Sequence

# Blocks under one beginning that are looked at for one that starts the same, latest first.
_MAX_SIBLINGS = 32

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """The longest known beginning of a sequence.

    Attributes:
        block_ids: full blocks, in order.
        node: the beginning that they make up.
        partial: a block whose first `num_partial` tokens come next, to be copied; None if there is none.
        num_tokens: tokens whose keys and values are known, those of `partial` included.
    """

    block_ids: list[int]
    node: int
    partial: int | None
    num_tokens: int


NOTHING = Match([], 0, None, 0)


@dataclass(frozen=True)
class _Place:
    parent: int
    tokens: Tokens


class PrefixCache:
    """The tree of known beginnings over the blocks of a pool.

    Args:
        pool: where the blocks are counted; this becomes its `on_reuse`.
        block_size: tokens a block holds.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._roots: dict[tuple[str | None, str], int] = {}
        self._children: dict[int, dict[Tokens, int]] = {}  # beginning -> its next tokens -> block
        self._places: dict[int, _Place] = {}  # block -> where it stands
        self._nodes: dict[int, int] = {}  # full block -> the beginning that ends with it
        self._num_nodes = 0
        # A root has a block, or may be forgotten: so a thousand new ones come between two clearings.
        self._max_roots = pool.num_blocks + 1024
        pool.on_reuse = self._drop

    def root(self, digest: str | None, scope: str = "") -> int:
        """The empty beginning of an adapter in a scope; None is the base."""
        place = (digest, scope)
        if place not in self._roots:
            if len(self._roots) >= self._max_roots:  # roots of adapters whose blocks are gone
                self._roots = {p: n for p, n in self._roots.items() if n in self._children}
            self._roots[place] = self._new_node()
        return self._roots[place]

    def match(self, sequence: Sequence) -> Match:
        """The longest known beginning of `sequence` that it may reuse."""
        size, limit, token_ids = self._block_size, sequence.num_reusable, sequence.token_ids
        node = self.root(sequence.adapter_digest, sequence.cache_scope)
        found: list[int] = []
        while (len(found) + 1) * size <= limit:
            at = len(found) * size
            block_id = self._children.get(node, {}).get(tuple(token_ids[at : at + size]))
            if block_id is None:
                break
            found.append(block_id)
            node = self._nodes[block_id]
        num_tokens = len(found) * size
        rest = tuple(token_ids[num_tokens : min(num_tokens + size, limit)])
        partial, common = self._closest(node, rest)
        return Match(found, node, partial, num_tokens + common)

    def is_under_way(self, sequence: Sequence, match: Match, running: Iterable[Sequence]) -> bool:
        """Whether a running prompt will soon have computed a block more of the same beginning."""
        limit, least = sequence.num_reusable, match.num_tokens + self._block_size
        if least > limit:
            return False
        return any(
            other.num_computed < len(other.token_ids) - 1
            and other.adapter_digest == sequence.adapter_digest
            and other.cache_scope == sequence.cache_scope
            and min(limit, num_common(other.token_ids, sequence.token_ids)) >= least
            for other in running
            if other.request is not None
        )

    def attach(self, sequence: Sequence, match: Match) -> tuple[int, int, int] | None:
        """Make `sequence` hold the blocks of a match, as computed.

        Returns:
            (from, to, tokens): a block that it shares only in part and whose first tokens are to be copied,
            or None.
        """
        size = self._block_size
        self._pool.hold(match.block_ids)
        sequence.block_ids = list(match.block_ids)
        sequence.num_computed = len(match.block_ids) * size
        sequence.num_noted, sequence.node = len(match.block_ids), match.node
        if match.partial is None:
            return None
        copy = None
        # Held at once: what is taken next may not be what was found. The two stand side by side for a
        # moment; where there is no room for that, the tokens are computed again.
        self._pool.hold([match.partial])
        if self._pool.num_free >= blocks_for(sequence.num_tokens, size) - len(match.block_ids):
            target = self._pool.allocate(1) or []
            sequence.block_ids += target
            sequence.num_computed = match.num_tokens
            copy = (match.partial, target[0], match.num_tokens - len(match.block_ids) * size)
        self._pool.free([match.partial])
        return copy

    def detach(self, sequence: Sequence) -> None:
        """Undo `attach`."""
        self._pool.free(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = sequence.num_noted = 0

    def note(self, sequence: Sequence) -> None:
        """Take in the blocks that `sequence` has filled since the last time, and where its prompt ends."""
        size = self._block_size
        while (sequence.num_noted + 1) * size <= sequence.num_computed:
            at = sequence.num_noted * size
            tokens = tuple(sequence.token_ids[at : at + size])
            block_id = sequence.block_ids[sequence.num_noted]
            sequence.node = self.add(sequence.node, tokens, block_id)
            sequence.num_noted += 1
        if sequence.num_computed == sequence.num_prompt_tokens:
            tail = tuple(sequence.token_ids[sequence.num_noted * size : sequence.num_computed])
            if tail:
                self.add(sequence.node, tail, sequence.block_ids[sequence.num_noted])

    def add(self, node: int, tokens: Tokens, block_id: int) -> int:
        """Note that a block holds `tokens` after the beginning `node`.

        Returns:
            The beginning with those tokens, for a full block; `node` for one that is not full.
        """
        full = len(tokens) == self._block_size
        known = self._children.get(node, {}).get(tokens)
        if known is not None:  # computed twice: the first one stays
            return self._nodes[known] if full else node
        self._drop(block_id)  # it was known for fewer tokens
        self._children.setdefault(node, {})[tokens] = block_id
        self._places[block_id] = _Place(node, tokens)
        self._pool.keep(block_id)
        if full:
            self._nodes[block_id] = node = self._new_node()
        return node

    def forget(self, block_ids: SequenceType[int]) -> None:
        """Drop what is known of blocks: their contents are not to be used again."""
        for block_id in block_ids:
            if block_id in self._places:
                self._drop(block_id)
                self._pool.forget(block_id)

    def _closest(self, node: int, tokens: Tokens) -> tuple[int | None, int]:
        """The block under `node` that shares the most first tokens, and how many."""
        best, longest = None, 0
        siblings = list(self._children.get(node, {}).items())[-_MAX_SIBLINGS:]
        for theirs, block_id in siblings:
            common = num_common(theirs, tokens)
            if common > longest:
                best, longest = block_id, common
        # A copy costs about as much as a few tokens do.
        return (best, longest) if longest * 4 >= self._block_size else (None, 0)

    def _drop(self, block_id: int) -> None:
        place = self._places.pop(block_id, None)
        if place is None:
            return
        siblings = self._children[place.parent]
        del siblings[place.tokens]
        if not siblings:
            del self._children[place.parent]
        self._nodes.pop(block_id, None)

    def _new_node(self) -> int:
        self._num_nodes += 1
        return self._num_nodes


def num_common(left: SequenceType[int], right: SequenceType[int]) -> int:
    """Tokens that two lists share from their first one on."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
