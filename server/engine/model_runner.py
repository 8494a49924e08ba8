"""A planned step to logits: packing, the forward pass, adapter installs.

Owns every tensor of the engine. Knows chunks and adapter entries as the scheduler wrote them down, and
nothing of requests, text or time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from adapters.attention_hook import connect
from adapters.base_model import BaseModelSpec
from adapters.parts import ActivationScales, KVPrefix, ServingForm, SoftPrompt
from server.engine import block_copies, layer_kernels, sampling_kernels
from server.engine.adapter_slots import AdapterEntry
from server.engine.attention import AttentionPath, Rows
from server.engine.block_copies import BlockCopies
from server.engine.blocks import blocks_for
from server.engine.decode_kernel import DecodeKernel, KernelRows
from server.engine.kv_cache import BlockTable, KVBlocks, StepCache
from server.engine.layer_stack import LayerStack
from server.engine.prefix_attention import SharedPrefix
from server.engine.scales import ScaleTables
from server.engine.sequence import Sequence
from server.engine.step_plan import Chunk
from server.engine.tile_attention import NOWHERE, TileAttention, TilePiece

# Up to there the decode kernel takes prompts too, a token a row, where there are no tiles. Measured on two
# cores: 48 tokens took 29 ms where the plain path took 34, 128 the same, from 256 on the plain path won.
_KERNEL_POSITIONS = 192


# From there on single tokens attend to their adapter's prefix by tiles.
_LONG_PREFIX = 128


@dataclass(frozen=True)
class StepRows:
    """One chunk and its adapter, as the runner needs them.

    Attributes:
        chunk: what to compute.
        entry: the adapter that its sequence runs with, or None.
        soft_rows: for a fold, the rows (n, d) that stand in for token embeddings.
        num_logits: of how many of the chunk's last tokens logits are wanted.
    """

    chunk: Chunk
    entry: AdapterEntry | None
    soft_rows: torch.Tensor | None = None
    num_logits: int = 0


@dataclass(frozen=True)
class _Piece:
    """One chunk of a row, computed alike whatever else the step has.

    Attributes:
        sequence: whose it is.
        start, num_tokens: its tokens.
        at: index of the first of them in the packed row.
        table: see `_block_table`.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    at: int
    table: BlockTable

    @property
    def end_position(self) -> int:
        """The absolute position after its last token."""
        return self.sequence.prefix_tokens + self.start + self.num_tokens

    @property
    def for_tiles(self) -> TilePiece:
        """What `tile_attention` needs of it."""
        position = self.sequence.prefix_tokens + self.start
        return TilePiece(self.at, self.num_tokens, position, self.table)


class ModelRunner:
    """The base model with its KV blocks and scale tables.

    Args:
        model: a frozen transformers causal language model in eval mode.
        spec: its dimensions.
        num_blocks: KV blocks.
        block_size: tokens a block holds.
        num_scale_slots: IA3 adapters resident at once.
        prefill_chunk: tokens of a prompt that are attended together.
        fast_kernels: let `decode_kernel` take single-token rows and `layer_kernels` parts of layers,
            where they can.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: BaseModelSpec,
        *,
        num_blocks: int,
        block_size: int,
        num_scale_slots: int,
        prefill_chunk: int,
        fast_kernels: bool,
    ) -> None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        self.device: torch.device = embedding.weight.device
        self.dtype: torch.dtype = embedding.weight.dtype
        self._model = model
        self._prefill_chunk = prefill_chunk
        self._embedding = embedding
        self._blocks = KVBlocks(spec, num_blocks, block_size, self.dtype, self.device)
        self._block_starts = np.arange(num_blocks) * block_size
        self._cache = StepCache()
        self._path = AttentionPath(self._blocks)
        fast_layers = fast_kernels and layer_kernels.fits(self.device, self.dtype)
        self._scales = ScaleTables(model, spec, num_scale_slots, self.device, fast=fast_layers)
        self._kernel: DecodeKernel | None = None
        self._tiles: TileAttention | None = None
        if fast_kernels and DecodeKernel.fits(self.device, self.dtype, spec.head_dim):
            self._kernel = DecodeKernel(self._blocks)
            self._tiles = TileAttention.of(self._blocks)
            block_copies.prepare()
        connect(model, self._path)
        self._stack: LayerStack | None = None
        if fast_layers:
            layer_kernels.prepare(self.dtype)
            sampling_kernels.prepare(self.dtype)
            self._stack = LayerStack.of(model, self._path, self._scales, self._kernel)
        kernel, stack = self._kernel, self._stack
        self._splits_prefixes = (
            kernel is not None
            and kernel.prefixes is not None
            and stack is not None
            and not stack.has_windows
        )

    def install(self, entry: AdapterEntry, form: ServingForm) -> None:
        """Fill the slot of an adapter with its serving form."""
        if isinstance(form, ActivationScales):
            self._scales.install(entry.scale_slot, form)
        elif isinstance(form, KVPrefix):
            self._blocks.write_prefix(entry.block_ids, form.keys, form.values)
        elif isinstance(form, SoftPrompt):
            raise TypeError("a soft prompt is folded before it is installed")

    def copy_blocks(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy beginnings of blocks, (from, to, tokens), one after the other."""
        self._blocks.copy(copies)

    def clear_blocks(self, block_ids: list[int]) -> None:
        """Zero the previous contents of blocks."""
        self._blocks.clear(block_ids)

    def release_memory(self) -> None:
        """Release torch's cached memory of a failed step on a device with its own memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return blocks_for(num_tokens, self._blocks.block_size)

    def read_fold(self, entry: AdapterEntry) -> KVPrefix:
        """The keys and values that a finished fold left in its blocks, on the CPU."""
        return KVPrefix(*self._blocks.read_prefix(entry.block_ids, entry.ref.num_virtual_tokens))

    @torch.inference_mode()
    def run(self, rows: list[StepRows]) -> list[torch.Tensor]:
        """One forward pass.

        Returns:
            For each of `rows` its logits, (num_logits, V).
        """
        sizes = [row.chunk.num_tokens for row in rows]
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        positions = np.concatenate([_positions(row) for row in rows])
        self._scales.set_rows(
            [slot for row in rows for slot in [_scale_slot(row)] * row.chunk.num_tokens]
        )
        self._plan_attention(rows, offsets, positions)
        counts = [row.num_logits for row in rows]
        keep = [np.arange(end - n, end) for n, end in zip(counts, offsets[1:], strict=True)]
        given = (self._embed(rows), self._tensor(positions))
        kept = self._tensor(np.concatenate(keep).astype(np.int64))
        return list(torch.split(self._logits(*given, kept), counts))

    def _logits(
        self, embeddings: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """(T, d), (T,) and the tokens (n,) that are wanted -> (n, V)."""
        if self._stack is not None:
            return self._stack.logits(embeddings, positions, keep)
        output = self._model(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    # --- packing ---------------------------------------------------------------------------

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _embed(self, rows: list[StepRows]) -> torch.Tensor:
        """(T, d): token embeddings, with a fold's soft rows in their place."""
        ids: list[int] = []
        for row in rows:
            start, end = row.chunk.start, row.chunk.start + row.chunk.num_tokens
            if row.soft_rows is None:
                ids += row.chunk.sequence.token_ids[start:end]
            else:
                ids += [0] * (end - start)
        embeddings: torch.Tensor = self._embedding(torch.tensor(ids, device=self.device))
        at = 0
        for row in rows:
            size = row.chunk.num_tokens
            if row.soft_rows is not None:
                part = row.soft_rows[row.chunk.start : row.chunk.start + size]
                embeddings[at : at + size] = part.to(self.device, self.dtype)
            at += size
        return embeddings

    def _plan_attention(
        self, rows: list[StepRows], offsets: np.ndarray, positions: np.ndarray
    ) -> None:
        """Say where tokens go and what they see: by the kernels where there are any, or plainly."""
        by_row = [
            self._pieces(row, int(offset)) for row, offset in zip(rows, offsets[:-1], strict=True)
        ]
        self._path.rows, self._path.writes = [], None
        self._path.fast, self._path.tiles = None, None
        if self._kernel is None:
            self._plan_plain(list(itertools.chain.from_iterable(by_row)), positions)
        else:
            self._plan_fast(self._kernel, by_row, positions)

    def _plan_plain(self, pieces: list[_Piece], positions: np.ndarray) -> None:
        """Pieces of equal numbers of queries and blocks go together."""
        by_shape: dict[tuple[int, int], list[_Piece]] = {}
        for piece in pieces:
            by_shape.setdefault((piece.num_tokens, len(piece.table[0])), []).append(piece)
        self._path.rows = [self._rows(group, positions) for group in by_shape.values()]
        tokens, blocks, slots = (self._tensor(part) for part in self._places(pieces))
        self._path.writes = (tokens, blocks, slots)

    def _plan_fast(
        self, kernel: DecodeKernel, by_row: list[list[_Piece]], positions: np.ndarray
    ) -> None:
        """Pieces go to the decode kernel where that is faster; it writes the others' tokens too."""
        fast: list[_Piece] = []
        others: list[_Piece] = []
        for pieces in by_row:
            fast += [piece for piece in pieces if self._is_for_kernel(piece)]
            dense = [piece for piece in pieces if not self._is_for_kernel(piece)]
            others += dense
            if dense and self._tiles is None:
                # The last piece sees what the ones before it see, and more.
                seen = self._tensor(dense[-1].table[0])
                copies = BlockCopies(seen, self._blocks.keys[0])
                self._path.rows += [self._rows([piece], positions, copies) for piece in dense]
        if others and self._tiles is not None:
            self._path.tiles = self._tiles.plan([piece.for_tiles for piece in others])
        tokens, blocks, slots = self._places(fast + others)
        lines = np.repeat(np.arange(len(fast)), [piece.num_tokens for piece in fast])
        num_attended = len(lines)
        lines = np.concatenate((lines, np.zeros(len(tokens) - num_attended, np.int64)))
        tables, prefixes = self._own_tables(fast)
        # By sequence: one may have two pieces of a token each, where a chunk ends between them.
        are_alone = not others and len({id(piece.sequence) for piece in fast}) == len(tokens)
        places = (tokens, positions[tokens], lines, blocks, slots)
        rows = KernelRows(*places, tables, num_attended, are_alone, prefixes)
        self._path.fast = kernel.plan(rows)

    def _own_tables(self, pieces: list[_Piece]) -> tuple[list[BlockTable], list[SharedPrefix]]:
        """Tables of pieces for the decode kernel, and long prefixes apart from them.

        The split depends on the chunk alone, so that its arithmetic is the same in any batch.
        """
        tables = [piece.table for piece in pieces]
        if not self._splits_prefixes:
            return tables, []
        groups: dict[int, list[int]] = {}
        for line, piece in enumerate(pieces):
            if piece.sequence.prefix_tokens >= _LONG_PREFIX:
                groups.setdefault(int(piece.table[0][0]), []).append(line)
        prefixes = []
        for lines in groups.values():
            first = pieces[lines[0]]
            shared = blocks_for(first.sequence.prefix_tokens, self._blocks.block_size)
            ids, at, filled = (part[:shared] for part in first.table)
            prefixes.append(SharedPrefix(np.array(lines, np.int64), (ids, at, filled)))
            for line in lines:
                ids, at, filled = (part[shared:] for part in pieces[line].table)
                tables[line] = (ids, at, filled)
        return tables, prefixes

    def _is_for_kernel(self, piece: _Piece) -> bool:
        """Depends on the chunk alone, so that its arithmetic is the same in any batch."""
        if piece.num_tokens == 1:
            return True
        return self._tiles is None and piece.end_position <= _KERNEL_POSITIONS

    def _pieces(self, row: StepRows, offset: int) -> list[_Piece]:
        """A row's chunks, of which it may have several."""
        chunk, pieces = row.chunk, []
        start, end = chunk.start, chunk.start + chunk.num_tokens
        while start < end:
            size = min(end - start, self._prefill_chunk - start % self._prefill_chunk)
            table = self._block_table(row, start + size)
            at = offset + start - chunk.start
            pieces.append(_Piece(chunk.sequence, start, size, at, table))
            start += size
        return pieces

    def _places(self, pieces: list[_Piece]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each token: its index in the packed row, and its block and slot there."""
        size = self._blocks.block_size
        tokens, blocks, slots = [], [], []
        for piece in pieces:
            index = np.arange(piece.start, piece.start + piece.num_tokens)
            tokens.append(piece.at + np.arange(piece.num_tokens))
            blocks.append(np.asarray(piece.sequence.block_ids, dtype=np.int64)[index // size])
            slots.append(index % size)
        return np.concatenate(tokens), np.concatenate(blocks), np.concatenate(slots)

    def _rows(
        self, pieces: list[_Piece], positions: np.ndarray, copies: BlockCopies | None = None
    ) -> Rows:
        """What attention needs of pieces of one shape."""
        tables = [piece.table for piece in pieces]
        tokens = np.array([piece.at for piece in pieces])[:, None]
        tokens = tokens + np.arange(pieces[0].num_tokens)
        slots = np.arange(self._blocks.block_size)
        block_ids = np.stack([table[0] for table in tables])
        first = np.stack([table[1] for table in tables])[:, :, None]
        filled = np.stack([table[2] for table in tables])[:, :, None]
        key_positions = np.where(slots < filled, first + slots, NOWHERE)
        return Rows(
            tokens=self._tensor(tokens),
            positions=self._tensor(positions[tokens]),
            block_ids=self._tensor(block_ids),
            key_positions=self._tensor(key_positions.reshape(len(tables), -1)),
            copies=copies,
        )

    def _block_table(self, row: StepRows, end: int) -> BlockTable:
        """What tokens up to `end` see: block ids, each one's first position and number of keys; (N,)."""
        size = self._blocks.block_size
        tail = row.chunk.sequence.block_ids[: blocks_for(end, size)]
        shared = row.entry.block_ids if row.entry is not None else []
        prefix = row.chunk.sequence.prefix_tokens
        ids = np.array([*shared, *tail], dtype=np.int64)
        first = self._block_starts[: len(ids)].copy()
        filled = np.full(len(ids), size)
        if shared:
            first[len(shared) :] = prefix + self._block_starts[: len(tail)]
            filled[len(shared) - 1] = prefix - (len(shared) - 1) * size
        filled[-1] = end - (len(tail) - 1) * size
        return ids, first, filled


def _positions(row: StepRows) -> np.ndarray:
    start = row.chunk.sequence.prefix_tokens + row.chunk.start
    return np.arange(start, start + row.chunk.num_tokens)


def _scale_slot(row: StepRows) -> int:
    return 0 if row.entry is None else row.entry.scale_slot
