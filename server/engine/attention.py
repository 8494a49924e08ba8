"""Attention over segments: one function for every model.

A step is one packed row of tokens. Attention alone knows sequences: each `Rows` group says which
packed tokens are queries and which KV blocks they see. The plain torch path below is the reference
for every device; `decode_kernel` takes over single-token rows on the CPU.

What a query at position p sees: keys at positions <= p, and > p - window where the layer slides.
Positions are absolute, virtual tokens included. ALiBi adds slope * (key position - p).

Groups hold sequences of equal shape only (same number of queries, same number of blocks), and padding
is up to the block: so a row's arithmetic depends on its own sequence, never on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

from server.engine.block_copies import BlockCopies
from server.engine.decode_kernel import KernelPlan
from server.engine.kv_cache import KVBlocks
from server.engine.tile_attention import TilePlan


@dataclass
class Rows:
    """Sequences of equal shape in one step.

    Attributes:
        tokens: (B, Tq) indices into the packed row.
        positions: (B, Tq) absolute positions of the queries.
        block_ids: (B, N) KV blocks, shared segment first.
        key_positions: (B, N * block_size) absolute position of each key; a slot without one holds
            a number above every position, so that no query sees it.
        masks: additive masks (B, 1, Tq, Tk) by window, filled on first use and shared by the layers.
        tiled_masks: the same in the dtype of the queries, (B, 1, G * Tq, Tk) for G heads a KV head.
        copies: gathers the blocks on the CPU's fast path, where B is 1; None leaves that to torch.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    block_ids: torch.Tensor
    key_positions: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    tiled_masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    copies: BlockCopies | None = None


class AttentionPath:
    """How the rows of one step are computed. One instance a model runner.

    Attributes:
        rows: groups for the plain path.
        writes: which packed tokens the plain path writes (W,), their block ids and offsets.
        fast: computes some tokens of the packed row and writes all of them in place of `writes`; None
            where there is no kernel.
        tiles: computes others that `fast` wrote, or None.
    """

    def __init__(self, blocks: KVBlocks) -> None:
        self.blocks = blocks
        self.rows: list[Rows] = []
        self.writes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.fast: KernelPlan | None = None
        self.tiles: TilePlan | None = None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Put the step's keys and values in place, then attend from every token over its sequence.

        See `adapters.attention_hook.Attention`.
        """
        # Not empty_like: that would keep the strides of a transposed query.
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self.writes is not None:
            tokens, block_ids, offsets = self.writes
            self.blocks.write(layer, (block_ids, offsets), new_keys[tokens], new_values[tokens])
        if self.fast is not None:
            self.fast.set_layer(
                layer, query, new_keys, new_values, out,
                scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
            )  # fmt: skip
            self.fast.run()
        if self.tiles is not None:
            self.tiles.set_layer(
                layer, query, out,
                scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
            )  # fmt: skip
            self.tiles.run()
        keys, values = self.blocks.keys[layer], self.blocks.values[layer]
        for rows in self.rows:
            out[rows.tokens] = attend_rows(
                layer, query[rows.tokens], keys, values, rows, scale, window, softcap, alibi_slopes
            )
        return out


def attend_rows(
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: Rows,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """The plain path for one group: query (B, Tq, H, D) -> (B, Tq, H, D)."""
    num_rows, num_queries, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    if rows.copies is not None:
        k, v = rows.copies.of(layer, keys, values, rows.block_ids.shape[1])
    else:
        # (B, N, H_kv, S, D) -> (B, H_kv, N * S, D)
        k = keys[rows.block_ids].transpose(1, 2).flatten(2, 3)
        v = values[rows.block_ids].transpose(1, 2).flatten(2, 3)
    # Query heads of one KV head become more queries of it: no copy of the keys.
    q = query.view(num_rows, num_queries, num_kv_heads, group, head_dim)
    q = q.permute(0, 2, 3, 1, 4)  # (B, H_kv, G, Tq, D)
    if softcap is None and alibi_slopes is None:
        flat = q.reshape(num_rows, num_kv_heads, group * num_queries, head_dim)
        tiled = rows.tiled_masks.get(window)
        if tiled is None:
            tiled = _mask(rows, window).to(q.dtype).repeat(1, 1, group, 1)
            rows.tiled_masks[window] = tiled
        out = functional.scaled_dot_product_attention(flat, k, v, attn_mask=tiled, scale=scale)
        out = out.view(num_rows, num_kv_heads, group, num_queries, head_dim)
    else:
        scores = torch.matmul(q, k[:, :, None].transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores + _alibi(rows, alibi_slopes, num_kv_heads)
        weights = torch.softmax(scores + _mask(rows, window)[:, :, None], dim=-1).to(v.dtype)
        out = torch.matmul(weights, v[:, :, None])
    return out.permute(0, 3, 1, 2, 4).reshape(num_rows, num_queries, num_heads, head_dim)


def _mask(rows: Rows, window: int | None) -> torch.Tensor:
    """(B, 1, Tq, Tk) float32: 0 where a query sees a key, -inf elsewhere."""
    mask = rows.masks.get(window)
    if mask is None:
        distance = rows.positions[:, :, None] - rows.key_positions[:, None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, float("-inf"))
        rows.masks[window] = mask = mask[:, None]
    return mask


def _alibi(rows: Rows, slopes: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """(B, H_kv, G, Tq, Tk): slope * (key position - query position), 0 for keys that are not there."""
    distance = rows.key_positions[:, None, :] - rows.positions[:, :, None]
    distance = distance.clamp(max=0).float()
    per_head = slopes.view(1, num_kv_heads, -1, 1, 1)
    return per_head * distance[:, None, None]
