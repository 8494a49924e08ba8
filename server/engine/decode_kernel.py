"""The CPU's fast path for single-token rows: attention straight over the KV blocks.

The plain path gathers every row's blocks into one tensor and pads them; this kernel reads them where they
lie, whatever their number, and reads bf16 keys and values as their bits. It is compiled by numba, so no
compiler is needed on the machine. Everything is accumulated in float32, one (row, KV head) at a time in
a fixed order: a row's result does not depend on the others.

Knows KV blocks and the planned tables; not sequences, adapters or the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from server.engine.kv_cache import KVBlocks

_DTYPES = (torch.bfloat16, torch.float32)


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    """A float32 from a float32, or from the 16 bits of a bf16."""
    signature = types.float32(bits)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        (value,) = args
        if bits == types.float32:
            return value
        wide = builder.zext(value, ir.IntType(32))
        shifted = builder.shl(wide, wide.type(16))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return signature, generate


@numba.njit(parallel=True, fastmath={"contract", "reassoc"}, cache=True)
def _decode(  # noqa: C901 - one loop nest; numba would not inline its parts
    query: np.ndarray,  # (T, H, D) float32
    out: np.ndarray,  # (T, H, D) float32
    keys: np.ndarray,  # (num_blocks, H_kv, S, D) float32 or uint16
    values: np.ndarray,
    table: np.ndarray,  # (R, N) int64 block ids
    first: np.ndarray,  # (R, N) int64 position of the first key
    filled: np.ndarray,  # (R, N) int64 keys in the block
    counts: np.ndarray,  # (R,) blocks of the row
    positions: np.ndarray,  # (R,) query positions
    scale: float,
    window: int,  # 0: none
    softcap: float,  # 0: none
    slopes: np.ndarray,  # (H,) zeros: none
) -> None:
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, block_size = keys.shape[1], keys.shape[2]
    group = num_heads // num_kv_heads
    for job in numba.prange(num_rows * num_kv_heads):
        row, kv_head = job // num_kv_heads, job % num_kv_heads
        scores = np.empty((group, block_size), np.float32)
        total = np.zeros(group, np.float32)
        peak = np.full(group, np.float32(-np.inf))
        sums = np.zeros((group, head_dim), np.float32)
        position = positions[row]
        for index in range(counts[row]):
            block = table[row, index]
            begin = first[row, index]
            count = min(filled[row, index], position + 1 - begin)
            skip = 0 if window == 0 else max(0, position - window + 1 - begin)
            if skip >= count:
                continue
            for member in range(group):
                head = kv_head * group + member
                best = peak[member]
                for slot in range(skip, count):
                    score = np.float32(0.0)
                    for d in range(head_dim):
                        score += query[row, head, d] * _float_of_bits(keys[block, kv_head, slot, d])  # type: ignore[call-arg]
                    score *= np.float32(scale)
                    if softcap != 0.0:
                        score = np.float32(softcap * math.tanh(score / softcap))
                    score += slopes[head] * np.float32(begin + slot - position)
                    scores[member, slot] = score
                    best = max(best, score)
                shrink = np.float32(math.exp(peak[member] - best))
                peak[member] = best
                total[member] *= shrink
                for d in range(head_dim):
                    sums[member, d] *= shrink
                for slot in range(skip, count):
                    weight = np.float32(math.exp(scores[member, slot] - best))
                    scores[member, slot] = weight
                    total[member] += weight
                for slot in range(skip, count):
                    weight = scores[member, slot]
                    for d in range(head_dim):
                        sums[member, d] += weight * _float_of_bits(values[block, kv_head, slot, d])
        for member in range(group):
            inverse = np.float32(1.0) / total[member]
            for d in range(head_dim):
                out[row, kv_head * group + member, d] = sums[member, d] * inverse


class DecodeKernel:
    """Plans and runs the kernel over one engine's blocks."""

    def __init__(self, blocks: KVBlocks) -> None:
        self._keys = [_bits(layer) for layer in blocks.keys]
        self._values = [_bits(layer) for layer in blocks.values]

    @staticmethod
    def fits(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the kernel serves this device and dtype."""
        return device.type == "cpu" and dtype in _DTYPES

    def plan(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ) -> Callable[..., None]:
        """Bind one step's single-token rows.

        Args:
            tokens: (R,) their indices in the packed row.
            positions: (R,) their absolute positions.
            tables: for each row its block ids, first positions and key counts, each (N,).

        Returns:
            `AttentionPath.fast` for this step.
        """
        counts = np.array([len(table[0]) for table in tables])
        padded = np.zeros((3, len(tables), int(counts.max())), dtype=np.int64)
        for row, table in enumerate(tables):
            for side in range(3):
                padded[side, row, : counts[row]] = table[side]
        rows = torch.from_numpy(tokens)
        ids, first, filled = padded

        def run(
            layer: int,
            query: torch.Tensor,
            out: torch.Tensor,
            scale: float,
            window: int | None,
            softcap: float | None,
            alibi_slopes: torch.Tensor | None,
        ) -> None:
            q = query[rows].float().contiguous()
            result = torch.empty_like(q)
            slopes = (
                np.zeros(q.shape[1], np.float32) if alibi_slopes is None else alibi_slopes.numpy()
            )
            _decode(
                q.numpy(), result.numpy(), self._keys[layer], self._values[layer],
                ids, first, filled, counts, positions,
                float(scale), window or 0, softcap or 0.0, slopes,
            )  # fmt: skip
            out[rows] = result.to(out.dtype)

        return run


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as float32, or as uint16 for bf16; nothing is copied."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
