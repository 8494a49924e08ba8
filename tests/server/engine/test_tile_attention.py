"""Attention on tiles against the plain path in float32, and its promise of the same bits in any company."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from adapters.attention_hook import alibi_slopes
from server.engine.attention import Rows, attend_rows
from server.engine.kv_cache import KVBlocks
from server.engine.tile_attention import NOWHERE, TileAttention, TilePiece
from server.engine.tiles import has_tiles
from tests.tiny_models import tiny_model, tiny_spec

if not has_tiles():
    pytest.skip("this processor has no tiles", allow_module_level=True)

# Weights and results are rounded to bf16, and so are the inputs, alike on both sides.
TOLERANCE = 1.5e-2


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call.

    Attributes:
        pieces: (virtual tokens, own tokens before it, its tokens) of each piece.
    """

    pieces: tuple[tuple[int, int, int], ...] = ((0, 0, 32), (20, 32, 16), (7, 5, 2), (0, 64, 31))
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    spread: float = 1.0


CASES = {
    "plain": Case(),
    "nine heads over three": Case(num_heads=9, num_kv_heads=3, head_dim=64),
    "one KV head": Case(num_heads=7, num_kv_heads=1),
    "large heads": Case(head_dim=256, pieces=((4, 30, 40),)),
    "heads of 96": Case(head_dim=96),
    "blocks of 32": Case(block_size=32),
    "blocks of 48": Case(block_size=48),
    "more queries than tiles hold": Case(pieces=((20, 0, 100), (0, 3, 65))),
    "one token": Case(pieces=((3, 9, 1),)),
    "an odd number of blocks": Case(pieces=((0, 0, 9), (16, 16, 16), (5, 0, 33))),
    "window of one": Case(window=1),
    "window inside a panel": Case(window=5),
    "window over panels": Case(window=40, pieces=((20, 100, 32),)),
    "softcap": Case(softcap=2.0),
    "softcap and window": Case(softcap=30.0, window=11, spread=4.0),
    "alibi": Case(alibi=True),
    "alibi, heads no power of two": Case(alibi=True, num_heads=6, num_kv_heads=6),
    "long": Case(pieces=((100, 3000, 32), (0, 2001, 7))),
    "peaked": Case(spread=8.0),
}


class Step:
    """Blocks full of numbers, and pieces of which no two share one."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        size = case.block_size
        self.case = case
        self.tables = []
        ids = iter(np.random.default_rng(seed).permutation(1000))
        for virtual, before, count in case.pieces:
            own = before + count
            shared, tail = -(-virtual // size), -(-own // size)
            at = np.arange(shared) * size, np.arange(tail) * size
            first = np.concatenate((at[0], virtual + at[1]))
            filled = np.concatenate((virtual - at[0], own - at[1])).clip(max=size)
            chosen = np.array([next(ids) for _ in range(shared + tail)], np.int64)
            self.tables.append((chosen, first, filled))
        spec = tiny_spec(tiny_model("llama"))
        changed = {"num_layers": 2, "num_kv_heads": case.num_kv_heads, "head_dim": case.head_dim}
        spec = type(spec)(**{**spec.__dict__, **changed})
        self.blocks = KVBlocks(spec, 1000, size, torch.bfloat16, torch.device("cpu"))
        torch.manual_seed(seed)
        for layer in (*self.blocks.keys, *self.blocks.values):
            layer.copy_(torch.randn(layer.shape))
        num_tokens = sum(count for _, _, count in case.pieces)
        query = torch.randn(num_tokens, case.num_heads, case.head_dim) * case.spread
        self.query = query.bfloat16()
        slopes = alibi_slopes(case.num_heads) if case.alibi else None
        self.options = {
            "scale": case.head_dim**-0.5,
            "window": case.window,
            "softcap": case.softcap,
            "alibi_slopes": slopes,
        }

    def pieces(self) -> list[TilePiece]:
        starts = np.cumsum([0] + [count for _, _, count in self.case.pieces])
        return [
            TilePiece(int(at), count, virtual + before, table)
            for at, (virtual, before, count), table in zip(
                starts[:-1], self.case.pieces, self.tables, strict=True
            )
        ]

    def run(self, pieces: list[TilePiece], query: torch.Tensor | None = None) -> torch.Tensor:
        """What layer 1 gives; rows of no piece stay NaN."""
        query = self.query if query is None else query
        out = torch.full(self.query.shape, float("nan"), dtype=torch.bfloat16)
        kernel = TileAttention.of(self.blocks)
        assert kernel is not None
        plan = kernel.plan(pieces)
        plan.set_layer(1, query, out, **self.options)
        plan.run()
        return out

    def plain(self, piece: TilePiece) -> torch.Tensor:
        ids, first, filled = (torch.from_numpy(part) for part in piece.table)
        slots = torch.arange(self.case.block_size)
        key_positions = torch.where(slots < filled[:, None], first[:, None] + slots, NOWHERE)
        tokens = torch.arange(piece.at, piece.at + piece.num_tokens)
        rows = Rows(
            tokens[None], tokens[None] - piece.at + piece.position, ids[None],
            key_positions.reshape(1, -1),
        )  # fmt: skip
        keys, values = self.blocks.keys[1].float(), self.blocks.values[1].float()
        given = self.query[tokens][None].float()
        return attend_rows(1, given, keys, values, rows, **self.options)[0]


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_the_plain_path_gives(name):
    step = Step(CASES[name])
    out = step.run(step.pieces())
    for piece in step.pieces():
        mine = out[piece.at : piece.at + piece.num_tokens].float()
        torch.testing.assert_close(mine, step.plain(piece), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_piece_is_the_same_in_any_company(torch_threads, threads):
    torch_threads(threads)
    step = Step(CASES["more queries than tiles hold"])
    step = Step(Case(pieces=CASES["long"].pieces + CASES["plain"].pieces + step.case.pieces))
    together = step.run(step.pieces())
    for piece in step.pieces():
        tokens = slice(piece.at, piece.at + piece.num_tokens)
        alone = step.run([piece])
        assert torch.equal(alone[tokens], together[tokens])
        others = torch.ones(len(alone), dtype=torch.bool)
        others[tokens] = False
        assert alone[others].isnan().all()


def test_what_others_hold_is_not_read():
    """Blocks of others, and their queries, may hold anything."""
    step = Step(Case(pieces=((5, 0, 9), (20, 3, 40))))
    mine, other = step.pieces()
    expected = step.run([mine])[: mine.num_tokens]
    for layer in (*step.blocks.keys, *step.blocks.values):
        layer[torch.from_numpy(other.table[0])] = float("nan")
    query = step.query.clone()
    query[other.at :] = float("nan")
    out = step.run([other, mine], query)
    assert torch.equal(out[: mine.num_tokens], expected)
    assert out[other.at :].isnan().all()


def test_queries_in_any_order_of_memory():
    step = Step(CASES["nine heads over three"])
    wide = torch.randn(len(step.query), 20, step.case.head_dim).bfloat16()
    wide[:, 3:12] = step.query
    expected = step.run(step.pieces())
    assert torch.equal(step.run(step.pieces(), wide[:, 3:12]), expected)
    turned = step.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(step.run(step.pieces(), turned), expected)


def test_an_infinite_score_makes_its_own_query_nan():
    step = Step(CASES["plain"])
    query = step.query.clone()
    query[3, 1] = float("inf")
    expected, out = step.run(step.pieces()), step.run(step.pieces(), query)
    assert out[3, 1].isnan().all()
    out[3, 1] = expected[3, 1]
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("size", "head_dim", "dtype"),
    [(8, 32, torch.bfloat16), (16, 48, torch.bfloat16), (16, 32, torch.float32)],
)
def test_what_it_leaves_to_others(size, head_dim, dtype):
    spec = tiny_spec(tiny_model("llama"))
    spec = type(spec)(**{**spec.__dict__, "head_dim": head_dim})
    assert TileAttention.of(KVBlocks(spec, 4, size, dtype, torch.device("cpu"))) is None


def test_too_many_heads_without_slopes():
    step = Step(Case(pieces=((0, 0, 2),)))
    with pytest.raises(ValueError, match="at most 1024"):
        step.run(step.pieces(), torch.zeros(2, 1025, 32, dtype=torch.bfloat16))
