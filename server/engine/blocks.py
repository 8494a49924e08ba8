"""Block accounting: which KV blocks are free.

Block ids are indices into the tensors of `kv_cache`; this file only counts. An owner holds a list of
ids; its tokens fill them in order, the last one perhaps in part:

    tokens   [0, 16) [16, 32) [32, 37)         block_size 16, 37 tokens
    ids          7       2       9
"""

from __future__ import annotations


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` tokens take."""
    return -(-num_tokens // block_size)


class BlockPool:
    """A fixed number of blocks, each free or held by exactly one owner."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # Popped from the end: low ids first, so that a small load touches little memory.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or none at all: None when fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def free(self, block_ids: list[int]) -> None:
        """Give blocks back. The caller must hold them; `check_integrity` of the scheduler proves it."""
        self._free.extend(reversed(block_ids))

    def free_ids(self) -> list[int]:
        """A copy of the free ids, for audits."""
        return list(self._free)
