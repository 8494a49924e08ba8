"""The frozen base on one packed row of tokens, with gradients to the virtual tokens.

Every token of a step is computed once, without padding. The rows of a step are concatenated to (1, T);
attention masks separate them. Virtual tokens (a prefix's keys and values, a soft prompt's rows) are
present once per step: all rows attend to them, and their gradients accumulate. Logits are computed only
at the requested positions.

    [ soft prompt | row 1 | row 2 | ... ]       the packed row
      positions 0..n-1, then n, n+1, ... restarting in every row

A row may end in branches: alternatives that attend to the row's trunk and to themselves but not to one
another (the labels of a ranking). Independent of methods, losses and optimisers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adapters.attention_hook import connect
from adapters.base_model import BaseModelSpec
from adapters.parts import KVPrefix, SoftPrompt

# Minimum ratio of a row's length to its group's longest row. Trades padding against kernel calls.
SIMILAR = 0.6


@dataclass(frozen=True)
class TokenRow:
    """One sequence of a step.

    Attributes:
        trunk: token ids, at least one.
        branches: alternatives that follow it.
    """

    trunk: Sequence[int]
    branches: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Packed:
    """A step's rows, concatenated.

    Attributes:
        ids: (T,) token ids, without virtual tokens.
        positions: (T,) position within the row, from 0, without virtual tokens.
        branches: (T,) 0 for the trunk, then 1, 2, ... within the row.
        starts: start of every row in the packed ids, and T at the end.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    branches: torch.Tensor
    starts: tuple[int, ...]


def pack(rows: Sequence[TokenRow]) -> Packed:
    """Concatenate rows.

    Raises:
        ValueError: no rows, or an empty row.
    """
    ids: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    starts = [0]
    for row in rows:
        length = len(row.trunk)
        if not length:
            raise ValueError("a row needs at least one token")
        ids += row.trunk
        positions += range(length)
        branches += [0] * length
        for number, branch in enumerate(row.branches, start=1):
            ids += branch
            positions += range(length, length + len(branch))
            branches += [number] * len(branch)
        starts.append(len(ids))
    if not ids:
        raise ValueError("a step needs at least one row")
    return Packed(torch.tensor(ids), torch.tensor(positions), torch.tensor(branches), tuple(starts))


@dataclass
class _Group:
    """Rows of similar length whose attention is computed as one padded batch; Tq is the longest length.

    Attributes:
        tokens: (R,) indices of these rows' tokens in the packed row, soft prompt included.
        places: (R,) position of each in the padded layout, (B * Tq).
        shape: (B, Tq).
        visible: (B, Tq, n + Tq) bool, before any window: virtual tokens first.
        distances: (B, Tq, n + Tq) query position minus key position.
        sees_virtual: whether these rows attend to the virtual tokens (false for the soft prompt itself).
        masks: additive masks by window, filled on first use and shared by the layers.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    shape: tuple[int, int]
    visible: torch.Tensor
    distances: torch.Tensor
    sees_virtual: bool
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """(B, 1, 1, Tq, n + Tq) float32: 0 where a query sees a key, -inf elsewhere."""
        mask = self.masks.get(window)
        if mask is None:
            hidden = ~self.visible
            if window is not None:
                hidden = hidden | (self.distances >= window)
            mask = torch.zeros(hidden.shape, device=hidden.device)
            mask = mask.masked_fill(hidden, float("-inf"))[:, None, None]
            self.masks[window] = mask
        return mask


class PackedAttention:
    """Attention of the current step, an `adapters.attention_hook.Attention`.

    Explicit matrix products over rows padded to a similar length: scores and softmax in float32,
    weighted values in the base's dtype, as in flash attention. torch's flash kernel was measured on the
    CPU: its backward pass with a mask takes four times as long at 30 tokens a row, and a mask over
    several rows makes it visit all their keys.
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._prefix: KVPrefix | None = None
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def plan(self, packed: Packed, virtual: KVPrefix | SoftPrompt | None) -> None:
        """Set up the groups of a step.

        Args:
            packed: the rows.
            virtual: virtual tokens before each row; a prefix's keys are float32, its values have the
                base's dtype.
        """
        num_virtual = 0 if virtual is None else virtual.num_virtual_tokens
        self._prefix = virtual if isinstance(virtual, KVPrefix) else None
        is_soft = isinstance(virtual, SoftPrompt)
        self._groups = [_soft_group(num_virtual, packed.ids.device)] if is_soft else []
        offset = num_virtual if is_soft else 0
        for rows in _similar_rows(packed.starts):
            self._groups.append(_group(packed, rows, num_virtual, offset))

    def keep_keys_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Collect every layer's keys and values, each (T, H_kv, D), during the next forward."""
        self._kept = []
        return self._kept

    def stop_keeping(self) -> None:
        """Stop collecting keys and values."""
        self._kept = None

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
        """Attend over the packed row, see `adapters.attention_hook.Attention.attend`."""
        if self._kept is not None:
            self._kept.append((new_keys.detach(), new_values.detach()))
        queries = _to_rows(query.float() * scale, self._groups)
        keys = _to_rows(new_keys.float(), self._groups)
        values = _to_rows(new_values, self._groups)
        shared: tuple[torch.Tensor, torch.Tensor] | None = None
        if self._prefix is not None:
            # (H_kv, n, D) -> (n, H_kv, D)
            prefix = (self._prefix.keys[layer], self._prefix.values[layer])
            shared = (prefix[0].transpose(0, 1), prefix[1].transpose(0, 1))
        outputs: list[torch.Tensor] = []
        for group, q, k, v in zip(self._groups, queries, keys, values, strict=True):
            if not group.sees_virtual:
                shared = (k[0], v[0])  # the soft prompt itself, which precedes the rows
            elif shared is not None:
                k, v = (_behind(s, x) for s, x in zip(shared, (k, v), strict=True))
            outputs.append(_attend(q, k, v, group, window, softcap, alibi_slopes))
        return _from_rows(outputs, self._groups, query.shape[0]).to(query.dtype)


class PackedBase:
    """The frozen base with packed attention; implements `adapters.trainable.FrozenBase`.

    Args:
        model: a frozen transformers causal language model in eval mode; its attention is replaced.
        spec: its dimensions.

    Raises:
        BaseUnsupported: its attention cannot be replaced.
    """

    def __init__(self, model: nn.Module, spec: BaseModelSpec) -> None:
        self.model = model
        self.spec = spec
        self.attention = PackedAttention()
        self._embedding = model.get_input_embeddings()  # type: ignore[operator]
        self.device: torch.device = self._embedding.weight.device
        self.dtype: torch.dtype = self._embedding.weight.dtype
        connect(model, self.attention)

    def logits(
        self, packed: Packed, virtual: KVPrefix | SoftPrompt | None, at: torch.Tensor
    ) -> torch.Tensor:
        """One forward pass.

        Args:
            packed: the rows.
            virtual: virtual tokens before each row, float32 or the base's dtype.
            at: (K,) indices into the packed ids at which to compute logits; a soft prompt's own rows
                are -n to -1.

        Returns:
            (K, V), in the base's dtype.
        """
        virtual = self._cast(virtual)
        num_virtual = 0 if virtual is None else virtual.num_virtual_tokens
        self.attention.plan(self._on_device(packed), virtual)
        embeddings = self._embedding(packed.ids.to(self.device))
        positions = packed.positions.to(self.device) + num_virtual
        at = at.to(self.device)
        if isinstance(virtual, SoftPrompt):
            embeddings = torch.cat((virtual.embeddings, embeddings))
            positions = torch.cat((torch.arange(num_virtual, device=self.device), positions))
            at = at + num_virtual
        output = self.model(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=at,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Embeddings of tokens, see `FrozenBase.embed`."""
        with torch.no_grad():
            ids = torch.tensor(list(token_ids), device=self.device)
            rows: torch.Tensor = self._embedding(ids)
            return rows.to(torch.float32, copy=True)

    def keys_values(self, token_ids: Sequence[int]) -> KVPrefix:
        """Keys and values of tokens, see `FrozenBase.keys_values`."""
        return self._keys_values(pack([TokenRow(token_ids)]), None, len(token_ids))

    def fold(self, virtual: KVPrefix | SoftPrompt | None) -> KVPrefix | None:
        """Convert virtual tokens to keys and values, without gradients; a soft prompt is run once."""
        if not isinstance(virtual, SoftPrompt):
            return virtual
        # The layout needs at least one row; its output is discarded.
        return self._keys_values(pack([TokenRow([0])]), virtual, virtual.num_virtual_tokens)

    @torch.no_grad()
    def _keys_values(self, packed: Packed, virtual: SoftPrompt | None, length: int) -> KVPrefix:
        """Keys and values of every layer for the first `length` tokens of a forward pass."""
        kept = self.attention.keep_keys_values()
        try:
            self.logits(packed, virtual, torch.tensor([0]))
        finally:
            self.attention.stop_keeping()
        # (L, T, H_kv, D) -> (L, H_kv, n, D)
        keys, values = (
            torch.stack(side)[:, :length].transpose(1, 2).float().contiguous()
            for side in zip(*kept, strict=True)
        )
        return KVPrefix(keys, values)

    def _cast(self, virtual: KVPrefix | SoftPrompt | None) -> KVPrefix | SoftPrompt | None:
        if isinstance(virtual, KVPrefix):
            # Rounded to the dtype that serving stores; scores are computed in float32.
            return KVPrefix(virtual.keys.to(self.dtype).float(), virtual.values.to(self.dtype))
        if isinstance(virtual, SoftPrompt):
            return SoftPrompt(virtual.embeddings.to(self.dtype))
        return None

    def _on_device(self, packed: Packed) -> Packed:
        ids, positions, branches = (
            tensor.to(self.device) for tensor in (packed.ids, packed.positions, packed.branches)
        )
        return Packed(ids, positions, branches, packed.starts)


def _similar_rows(starts: Sequence[int]) -> list[list[int]]:
    """Group row numbers so that no row is shorter than SIMILAR times its group's longest."""
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[row] >= SIMILAR * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _group(packed: Packed, rows: list[int], num_virtual: int, offset: int) -> _Group:
    device = packed.ids.device
    starts = torch.tensor([packed.starts[row] for row in rows], device=device)
    ends = torch.tensor([packed.starts[row + 1] for row in rows], device=device)
    longest = int((ends - starts).max())
    # (B, Tq): packed index of each position; positions past a row's end repeat some token.
    tokens = starts[:, None] + torch.arange(longest, device=device)
    is_token = tokens < ends[:, None]
    safe = torch.where(is_token, tokens, starts[:, None])
    positions, branches = packed.positions[safe], packed.branches[safe]
    distances = positions[:, :, None] - positions[:, None, :]
    same_branch = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    visible = same_branch & (distances >= 0) & is_token[:, None, :]
    before = torch.arange(num_virtual, device=device)
    to_virtual = positions[:, :, None] + num_virtual - before
    return _Group(
        tokens=tokens[is_token] + offset,
        places=is_token.flatten().nonzero()[:, 0],
        shape=(len(rows), longest),
        visible=torch.cat((torch.ones_like(to_virtual, dtype=torch.bool), visible), dim=2),
        distances=torch.cat((to_virtual, distances), dim=2),
        sees_virtual=True,
    )


def _soft_group(length: int, device: torch.device) -> _Group:
    positions = torch.arange(length, device=device)
    distances = (positions[:, None] - positions[None, :])[None]
    return _Group(positions, positions, (1, length), distances >= 0, distances, False)


class _ToRows(torch.autograd.Function):
    """Packed tokens (T, ...) -> one padded tensor (B, Tq, ...) per group.

    Every token is in exactly one group, so the backward pass copies gradients; torch's own indexing
    would accumulate them one by one.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: list[_Group]) -> tuple[torch.Tensor, ...]:
        ctx.groups = groups
        ctx.length = x.shape[0]
        return tuple(_padded(x, group) for group in groups)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _packed(gradients, ctx.groups, ctx.length), None


class _FromRows(torch.autograd.Function):
    """The inverse of `_ToRows`."""

    @staticmethod
    def forward(ctx: Any, groups: list[_Group], length: int, *padded: torch.Tensor) -> torch.Tensor:
        ctx.groups = groups
        return _packed(padded, groups, length)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(_padded(gradient, group) for group in ctx.groups)


def _to_rows(x: torch.Tensor, groups: list[_Group]) -> tuple[torch.Tensor, ...]:
    padded: tuple[torch.Tensor, ...] = _ToRows.apply(x, groups)  # type: ignore[no-untyped-call]
    return padded


def _from_rows(padded: list[torch.Tensor], groups: list[_Group], length: int) -> torch.Tensor:
    packed: torch.Tensor = _FromRows.apply(groups, length, *padded)  # type: ignore[no-untyped-call]
    return packed


def _padded(x: torch.Tensor, group: _Group) -> torch.Tensor:
    count, longest = group.shape
    padded = x.new_zeros((count * longest, *x.shape[1:]))
    padded.index_copy_(0, group.places, x.index_select(0, group.tokens))
    return padded.view(count, longest, *x.shape[1:])


def _packed(padded: Sequence[torch.Tensor], groups: list[_Group], length: int) -> torch.Tensor:
    packed = padded[0].new_empty((length, *padded[0].shape[2:]))
    for x, group in zip(padded, groups, strict=True):
        packed.index_copy_(0, group.tokens, x.flatten(0, 1).index_select(0, group.places))
    return packed


def _behind(shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Prepend (n, H_kv, D) to each of (B, Tq, H_kv, D): (B, n + Tq, H_kv, D)."""
    return torch.cat((shared.expand(own.shape[0], *shared.shape), own), dim=1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: _Group,
    window: int | None,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Scaled query (B, Tq, H, D), keys and values (B, Tk, H_kv, D) -> (B, Tq, H, D)."""
    count, num_queries, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[2]
    repeats = num_heads // num_kv_heads
    # Query heads that share a KV head are treated as additional queries; keys and values are not repeated.
    q = query.view(count, num_queries, num_kv_heads, repeats, head_dim)
    q = q.permute(0, 2, 3, 1, 4).reshape(count, num_kv_heads, repeats * num_queries, head_dim)
    scores = torch.matmul(q, keys.permute(0, 2, 3, 1))
    scores = scores.view(count, num_kv_heads, repeats, num_queries, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        # Masked keys need no slope.
        distances = group.distances[:, None, None].clamp(min=0).float()
        scores = scores - alibi_slopes.view(num_kv_heads, repeats, 1, 1) * distances
    weights = torch.softmax(scores + group.mask(window), dim=-1).flatten(2, 3).to(values.dtype)
    out = torch.matmul(weights, values.permute(0, 2, 1, 3))
    out = out.view(count, num_kv_heads, repeats, num_queries, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(count, num_queries, num_heads, head_dim)
