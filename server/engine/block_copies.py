"""KV blocks gathered into dense keys and values, for attention by products of whole matrices.

torch's indexing makes two copies of each and new memory for all of them in every layer; here it is one
pass into memory that a step's layers share. At 2,000 keys that was 4 ms of a step instead of 15. Compiled
by numba, run on torch's own OpenMP threads: see `decode_kernel`. Knows blocks; no sequence or adapter.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from server.engine.openmp import Kernel
from server.engine.vector_loops import VERSION
from server.engine.vector_ops import array_at, take_number

# Fields of a job table, int64: addresses, numbers, bytes. A job is one block.
(
    _NEXT_JOB, _TABLE_AT, _JOBS, _BLOCKS, _HEADS, _PIECE, _BLOCK_BYTES, _FROM_KEYS,
    _FROM_VALUES, _TO_KEYS, _TO_VALUES, _TABLE_SIZE,
) = range(12)  # fmt: skip


@njit
def _copy(source: Any, target: Any, num_words: Any) -> None:
    words = carray(array_at(source), (num_words,), np.int64)
    copied = carray(array_at(target), (num_words,), np.int64)
    for i in range(num_words):
        copied[i] = words[i]


@njit
def _take_jobs(table: Any) -> None:
    """Copy blocks until none is left; any number of threads may do so at once."""
    heads, piece = table[_HEADS], table[_PIECE]
    blocks = carray(array_at(table[_BLOCKS]), (table[_JOBS],), np.int64)
    job = take_number(table[_TABLE_AT])
    while job < table[_JOBS]:
        source = blocks[job] * table[_BLOCK_BYTES]
        for head in range(heads):
            target = (head * table[_JOBS] + job) * piece
            _copy(table[_FROM_KEYS] + source, table[_TO_KEYS] + target, piece // 8)
            _copy(table[_FROM_VALUES] + source, table[_TO_VALUES] + target, piece // 8)
            source += piece
        job = take_number(table[_TABLE_AT])


@cache
def _entry(version: int = VERSION) -> Kernel:
    """The compiled function, compiled at first use; `version` as in `vector_loops`."""

    @cfunc(types.void(types.voidptr), cache=True)
    def run(table_at: Any) -> None:
        if version:
            _take_jobs(carray(table_at, (_TABLE_SIZE,), np.int64))

    return Kernel(run)


def prepare() -> None:
    """Compile now, so that no request waits for it."""
    _entry()


class BlockCopies:
    """Dense copies of the blocks that one sequence sees, written over by each layer.

    Args:
        block_ids: (N,) int64.
        like: one layer's keys, (num_blocks, H_kv, S, D) on the CPU; a block is dense and of whole 8
            bytes a head.
    """

    def __init__(self, block_ids: torch.Tensor, like: torch.Tensor) -> None:
        (num_blocks,), (_, heads, size, head_dim) = block_ids.shape, like.shape
        self._copies = torch.empty((2, 1, heads, num_blocks * size, head_dim), dtype=like.dtype)
        self._block_ids = block_ids.contiguous()
        self._size = size
        self._layer: int | None = None
        self._run = _entry()
        self._table = (ctypes.c_int64 * _TABLE_SIZE)()
        self._at = self._table[_TABLE_AT] = ctypes.addressof(self._table)
        self._table[_JOBS], self._table[_HEADS] = num_blocks, heads
        self._table[_BLOCKS] = self._block_ids.data_ptr()
        self._table[_PIECE] = size * head_dim * like.element_size()
        self._table[_BLOCK_BYTES] = like.stride(0) * like.element_size()
        self._table[_TO_KEYS], self._table[_TO_VALUES] = (part.data_ptr() for part in self._copies)

    def of(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, num_blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values in the first blocks, (1, H_kv, num_blocks * S, D).

        Layers come one after the other; those of one are good until the next.
        """
        if layer != self._layer:
            table = self._table
            table[_NEXT_JOB] = 0
            table[_FROM_KEYS], table[_FROM_VALUES] = keys.data_ptr(), values.data_ptr()
            self._run.run(self._at, table[_JOBS])
            self._layer = layer
        found = self._copies[:, :, :, : num_blocks * self._size]
        return found[0], found[1]
