"""The KV blocks as tensors, and what a transformers model is given for a cache.

One pair of views a layer, (num_blocks, H_kv, block_size, D), of one tensor in which a block's layers
lie together: a block that was never used takes no memory, and one is wiped or copied as a whole. Who
owns which block is the scheduler's affair; how they are read is `attention`'s.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from adapters.base_model import BaseModelSpec

# What the end of one sequence sees: block ids, first positions and key counts, each (N,) int64.
BlockTable = tuple[np.ndarray, np.ndarray, np.ndarray]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take no memory on the CPU until they are written.

    Pages come from the system as zeros. Small ones: a large one of several blocks, wiped when the first
    of them is written, held a step up by 5 ms.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a system that knows no large pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)


class KVBlocks:
    """Keys and values of all layers.

    Attributes:
        keys, values: a list of L tensors (num_blocks, H_kv, block_size, D).
        block_size: tokens a block holds.
    """

    def __init__(
        self,
        spec: BaseModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, 2, spec.num_layers, spec.num_kv_heads, block_size, spec.head_dim)
        self._all = _zeros(shape, dtype, device)
        self.keys = [self._all[:, 0, layer] for layer in range(spec.num_layers)]
        self.values = [self._all[:, 1, layer] for layer in range(spec.num_layers)]
        self.block_size = block_size

    @staticmethod
    def bytes_per_block(spec: BaseModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, keys and values."""
        per_token = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * dtype.itemsize
        return block_size * per_token

    def clear(self, block_ids: list[int]) -> None:
        """Fill blocks with zeros.

        Unused slots of a block are read too, and masked: 0 * NaN and infinity - infinity are NaN, so
        that what another sequence left there must go.
        """
        if block_ids:
            index = torch.tensor(block_ids, device=self._all.device)
            self._all.index_fill_(0, index, 0)

    def write(
        self,
        layer: int,
        slots: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Put tokens (T, H_kv, D) where `slots` says: block ids (T,) and offsets inside them (T,)."""
        blocks, offsets = slots
        self.keys[layer][blocks, :, offsets] = keys
        self.values[layer][blocks, :, offsets] = values

    def write_prefix(self, block_ids: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy an adapter's keys and values, (L, H_kv, n, D), into its blocks; the rest is zeros."""
        size = self.block_size
        self.clear(block_ids[-1:])
        for index, block in enumerate(block_ids):
            part_k = keys[:, :, index * size : (index + 1) * size]
            part_v = values[:, :, index * size : (index + 1) * size]
            count = part_k.shape[2]
            self._all[block, 0, :, :, :count] = part_k
            self._all[block, 1, :, :, :count] = part_v

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy beginnings of blocks, (from, to, tokens), one after the other, in all layers.

        The rest of the target is wiped, as by `clear`: what stands behind the tokens is another's.
        """
        for source, target, num_tokens in copies:
            self._all[target, :, :, :, :num_tokens] = self._all[source, :, :, :, :num_tokens]
            self._all[target, :, :, :, num_tokens:] = 0

    def read_prefix(
        self, block_ids: list[int], num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `write_prefix`: (L, H_kv, n, D) twice, on the CPU."""
        index = torch.tensor(block_ids, device=self.keys[0].device)

        def gather(layers: list[torch.Tensor]) -> torch.Tensor:
            parts = [layer[index].transpose(0, 1).flatten(1, 2) for layer in layers]
            return torch.stack([part[:, :num_tokens] for part in parts]).cpu()

        return gather(self.keys), gather(self.values)


class StepCache(Cache):
    """What the model is given as `past_key_values`.

    `update` returns the step's keys and values as they came: the attention function writes them into
    the blocks and reads the blocks itself. To the model the past is empty, since positions are explicit.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, unchanged."""
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """0: the packed row has no past of its own."""
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        """The step's own length and no offset."""
        return query_length, 0
