"""Block accounting: which KV blocks are free, held, or cached for their contents.

Block ids are indices into the tensors of `kv_cache`; this file only counts. An owner holds a list of
ids; its tokens fill them in order, the last one perhaps in part:

    tokens   [0, 16) [16, 32) [32, 37)         block_size 16, 37 tokens
    ids          7       2       9

A full block may have several holders, since nobody writes into it any more. One that is kept
(`prefix_cache` knows its contents) stays as it is when its last holder lets go, until its room is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` tokens take."""
    return -(-num_tokens // block_size)


def room_in_blocks(num_blocks: int, block_size: int, num_virtual_tokens: int) -> int:
    """Tokens that fit into all blocks beside a prefix, which shares none of its blocks."""
    return (num_blocks - blocks_for(num_virtual_tokens, block_size)) * block_size


class BlockPool:
    """A fixed number of blocks, each free, held by one or more owners, or idle: cached without a holder.

    Args:
        num_blocks: how many.

    Attributes:
        on_reuse: called with the id of an idle block whose contents are about to be lost.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.on_reuse: Callable[[int], None] = lambda block_id: None
        # Popped from the end: low ids first, so that a small load touches little memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders: dict[int, int] = {}
        self._kept: set[int] = set()

    @property
    def num_free(self) -> int:
        """Number of blocks without a holder, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Number of held blocks."""
        return self.num_blocks - self.num_free

    @property
    def num_idle(self) -> int:
        """Number of idle blocks: cached without a holder."""
        return len(self._idle)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or none at all: None when fewer are free. Idle ones go last."""
        if count > self.num_free:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block_id = self._free.pop()
            else:
                block_id, _ = self._idle.popitem(last=False)
                self._kept.discard(block_id)
                self.on_reuse(block_id)
            self._holders[block_id] = 1
            taken.append(block_id)
        return taken

    def hold(self, block_ids: Iterable[int]) -> None:
        """Become one more holder of blocks that are held or idle."""
        for block_id in block_ids:
            self._idle.pop(block_id, None)
            self._holders[block_id] = self._holders.get(block_id, 0) + 1

    def free(self, block_ids: list[int]) -> None:
        """Let go. The caller must hold them; `check_integrity` of the scheduler proves it.

        Of cached blocks the last one becomes idle first: a block is useless without those before it.
        """
        for block_id in reversed(block_ids):
            self._holders[block_id] -= 1
            if self._holders[block_id]:
                continue
            del self._holders[block_id]
            if block_id in self._kept:
                self._idle[block_id] = None
            else:
                self._free.append(block_id)

    def keep(self, block_id: int) -> None:
        """From now on a held block becomes idle, not free, when its last holder lets go."""
        self._kept.add(block_id)

    def forget(self, block_id: int) -> None:
        """The contents of a block are worth nothing any more."""
        self._kept.discard(block_id)
        if block_id in self._idle:
            del self._idle[block_id]
            self._free.append(block_id)

    def free_ids(self) -> list[int]:
        """A copy of the free ids, the idle ones included, for audits."""
        return [*self._free, *self._idle]

    def holders(self) -> dict[int, int]:
        """How many owners each held block has, for audits."""
        return dict(self._holders)
