"""The decode kernel and the plain path against attention written out in float64."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from adapters.attention_hook import alibi_slopes
from server.engine.attention import AttentionPath, Rows
from server.engine.decode_kernel import DecodeKernel, KernelRows
from server.engine.kv_cache import KVBlocks
from server.engine.vector_ops import LANES
from tests.tiny_models import tiny_model, tiny_spec

NOWHERE = 2**31 - 1


@dataclass(frozen=True)
class Case:
    """Shapes and options of one attention call.

    Attributes:
        rows: (virtual tokens, own tokens) of each row; the newest own token is the query.
    """

    rows: tuple[tuple[int, int], ...] = ((0, 1), (0, 17), (7, 9), (16, 30), (20, 1), (3, 64))
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 8
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    spread: float = 1.0
    dtype: torch.dtype = torch.float32


CASES = {
    "plain": Case(),
    "window of one": Case(window=1),
    "window inside a block": Case(window=5),
    "window over blocks": Case(window=19),
    "window larger than all": Case(window=1000),
    "softcap": Case(softcap=2.0),
    "softcap and window": Case(softcap=30.0, window=11, spread=4.0),
    "alibi": Case(alibi=True, num_kv_heads=4),
    "alibi, heads no power of two": Case(alibi=True, num_heads=6, num_kv_heads=6),
    "no groups": Case(num_kv_heads=4),
    "one kv head": Case(num_heads=8, num_kv_heads=1),
    "nine heads over three": Case(num_heads=9, num_kv_heads=3, head_dim=64),
    "a register a head": Case(head_dim=LANES),
    "odd head size": Case(head_dim=5 * LANES),
    "seven heads over one": Case(num_heads=7, num_kv_heads=1, head_dim=48),
    "large heads": Case(head_dim=256, rows=((4, 30),)),
    "blocks of sixteen": Case(block_size=16),
    "blocks of three": Case(block_size=3),
    "one row": Case(rows=((5, 12),)),
    "many rows": Case(rows=tuple((i % 9, 1 + i) for i in range(70))),
    "long": Case(rows=((100, 6000), (0, 3001))),
    "long, window": Case(rows=((100, 6000), (0, 3001)), window=512),
    "peaked": Case(spread=30.0),
    "huge scores": Case(spread=3000.0),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16, long": Case(dtype=torch.bfloat16, rows=((30, 4000),), head_dim=64),
    "bf16, window, softcap": Case(dtype=torch.bfloat16, window=9, softcap=5.0),
    "bf16, alibi": Case(dtype=torch.bfloat16, alibi=True, num_kv_heads=4),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}


def single_tokens(tokens, positions, tables) -> KernelRows:
    """A row each, of as many sequences; its own slot is the last of its table."""
    blocks = np.array([ids[-1] for ids, _, _ in tables])
    slots = np.array([filled[-1] - 1 for _, _, filled in tables])
    lines = np.arange(len(tokens))
    return KernelRows(tokens, positions, lines, blocks, slots, tables, len(tokens), are_alone=True)


class Setting:
    """Blocks full of random numbers, and rows over them."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        size = case.block_size
        generator = torch.Generator().manual_seed(seed)
        spec = dataclasses.replace(
            tiny_spec(tiny_model("llama")),
            num_layers=2,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
        )
        lengths = [(-(-n // size), -(-t // size)) for n, t in case.rows]
        total = sum(a + b for a, b in lengths) + 5
        self.blocks = KVBlocks(spec, total, size, case.dtype, torch.device("cpu"))
        for tensor in self.blocks.keys + self.blocks.values:
            # Every cell, used or not: what must not be seen is there to be seen.
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        free = torch.randperm(total, generator=generator).tolist()
        self.tables, self.positions = [], []
        for (prefix, own), (shared, tail) in zip(case.rows, lengths, strict=True):
            ids = [free.pop() for _ in range(shared + tail)]
            shared_at, tail_at = np.arange(shared) * size, np.arange(tail) * size
            first = np.concatenate((shared_at, prefix + tail_at))
            filled = np.concatenate((prefix - shared_at, own - tail_at)).clip(max=size)
            self.tables.append((np.array(ids, dtype=np.int64), first, filled))
            self.positions.append(prefix + own - 1)
        shape = (len(case.rows), case.num_heads, case.head_dim)
        self.query = (case.spread * torch.randn(shape, generator=generator)).to(case.dtype)
        # The newest token's key and value are not in place yet: attention puts them there.
        shape = (len(case.rows), case.num_kv_heads, case.head_dim)
        self.new_keys = torch.randn(shape, generator=generator).to(case.dtype)
        self.new_values = torch.randn(shape, generator=generator).to(case.dtype)
        self.slopes = alibi_slopes(case.num_heads) if case.alibi else None
        self.options = {
            "scale": case.head_dim**-0.5,
            "window": case.window,
            "softcap": case.softcap,
            "alibi_slopes": self.slopes,
        }

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.new_keys, self.new_values

    def by_kernel(self, rows: list[int] | None = None, relayout=lambda tensor: tensor):
        rows = list(range(len(self.tables))) if rows is None else rows
        path = AttentionPath(self.blocks)
        positions = np.array([self.positions[row] for row in rows])
        tables = [self.tables[row] for row in rows]
        path.fast = DecodeKernel(self.blocks).plan(
            single_tokens(np.arange(len(rows)), positions, tables)
        )
        tensors = [relayout(tensor[rows]) for tensor in self.tensors]
        return path.attend(1, *tensors, **self.options)

    def by_plain_path(self):
        path = AttentionPath(self.blocks)
        tokens = torch.arange(len(self.tables))
        last = torch.tensor([[ids[-1], filled[-1] - 1] for ids, _, filled in self.tables])
        path.writes = (tokens, last[:, 0], last[:, 1])
        for token, ((ids, first, filled), position) in enumerate(
            zip(self.tables, self.positions, strict=True)
        ):
            slots = np.arange(self.case.block_size)
            at = np.where(slots < filled[:, None], first[:, None] + slots, NOWHERE)
            path.rows.append(
                Rows(
                    tokens=torch.tensor([[token]]),
                    positions=torch.tensor([[position]]),
                    block_ids=torch.from_numpy(ids)[None],
                    key_positions=torch.from_numpy(at.reshape(1, -1)),
                )
            )
        return path.attend(1, *self.tensors, **self.options)

    def by_definition(self) -> torch.Tensor:
        return torch.stack([self._row(row) for row in range(len(self.tables))])

    def _row(self, row: int) -> torch.Tensor:
        """softmax(q k^T) v over the keys that the row may see, one head after another."""
        ids, first, filled = self.tables[row]
        position, case = self.positions[row], self.case
        keys, values, at = [], [], []
        for block, begin, count in zip(ids, first, filled, strict=True):
            keys.append(self.blocks.keys[1][block, :, :count].double())
            values.append(self.blocks.values[1][block, :, :count].double())
            at += range(begin, begin + count)
        key, value = torch.cat(keys, 1), torch.cat(values, 1)  # (H_kv, T, D)
        key[:, -1], value[:, -1] = self.new_keys[row].double(), self.new_values[row].double()
        assert at == list(range(position + 1))
        distance = torch.tensor(at) - position
        group = case.num_heads // case.num_kv_heads
        out = []
        for head in range(case.num_heads):
            scores = key[head // group] @ self.query[row, head].double() * case.head_dim**-0.5
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if self.slopes is not None:
                scores = scores + self.slopes[head].double() * distance
            if case.window:
                scores = scores.masked_fill(distance <= -case.window, -math.inf)
            out.append(torch.softmax(scores, 0) @ value[head // group])
        return torch.stack(out)


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_plain_path_are_attention(name):
    case = CASES[name]
    assert DecodeKernel.fits(torch.device("cpu"), case.dtype, case.head_dim)
    setting = Setting(case)
    expected = setting.by_definition()
    # At huge scores float32 itself is off by whole units; then the two paths are near each other.
    tolerance = TOLERANCE[case.dtype] * max(1.0, case.spread)
    for got in (setting.by_kernel(), Setting(case).by_plain_path()):
        assert got.dtype == case.dtype
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype, threads):
    case = Case(rows=tuple((i % 9, 1 + 5 * i) for i in range(40)), dtype=dtype, window=50)
    setting = Setting(case)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = torch.cat([setting.by_kernel([row]) for row in range(40)])
        torch.set_num_threads(threads)
        for _ in range(5):
            assert torch.equal(setting.by_kernel(), alone)
        for rows in ([39, 0, 7], list(range(39, -1, -1)), [3, 3, 3]):
            assert torch.equal(setting.by_kernel(rows), alone[rows])
    finally:
        torch.set_num_threads(before)


LAYOUTS = {
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimension strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of qkv": lambda x: torch.stack((x, x + 1, x + 2), dim=2)[:, :, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_any_layout(layout):
    setting = Setting(Case())
    expected = setting.by_kernel()
    assert not LAYOUTS[layout](setting.query).is_contiguous()
    assert torch.equal(Setting(Case()).by_kernel(relayout=LAYOUTS[layout]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_writes_its_own_tokens_and_no_others(dtype):
    setting = Setting(Case(dtype=dtype))
    tokens = np.array([19, 2, 11, 3, 0, 7])
    packed = []
    for tensor in setting.tensors:
        packed.append(torch.randn(20, *tensor.shape[1:]).to(dtype))
        packed[-1][torch.from_numpy(tokens)] = tensor
    keys, values = setting.blocks.keys[1].clone(), setting.blocks.values[1].clone()
    for row, (ids, _, filled) in enumerate(setting.tables):
        keys[ids[-1], :, filled[-1] - 1] = setting.new_keys[row]
        values[ids[-1], :, filled[-1] - 1] = setting.new_values[row]
    kernel = DecodeKernel(setting.blocks)
    plan = kernel.plan(single_tokens(tokens, np.array(setting.positions), setting.tables))
    out = torch.full_like(packed[0], 777.0)
    plan.set_layer(1, *packed, out, **setting.options)
    plan.run()
    assert torch.equal(setting.blocks.keys[1], keys)
    assert torch.equal(setting.blocks.values[1], values)
    assert torch.equal(out[torch.from_numpy(tokens)], setting.by_kernel())
    others = [i for i in range(20) if i not in tokens]
    assert (out[others] == 777.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_tokens_of_one_sequence_are_as_if_they_came_one_after_the_other(dtype, window):
    case = Case(rows=((0, 9), (7, 13), (16, 20)), dtype=dtype, window=window)
    count = 6  # the newest tokens of each sequence
    together, apart = Setting(case), Setting(case)
    generator = torch.Generator().manual_seed(5)
    num_tokens = count * len(case.rows)
    packed = [
        torch.randn(num_tokens, *tensor.shape[1:], generator=generator).to(dtype)
        for tensor in apart.tensors
    ]
    lines = np.repeat(np.arange(len(case.rows)), count)
    back = np.tile(np.arange(count)[::-1], len(case.rows))
    positions = np.array(apart.positions)[lines] - back
    own = positions - np.array([prefix for prefix, _ in case.rows])[lines]
    tails = [
        ids[(first >= prefix)]
        for (ids, first, _), (prefix, _) in zip(apart.tables, case.rows, strict=True)
    ]
    blocks = np.array(
        [tails[line][at // case.block_size] for line, at in zip(lines, own, strict=True)]
    )
    slots = own % case.block_size

    def run(setting, chosen):
        tokens = np.array(chosen)
        tables = [setting.tables[line] for line in dict.fromkeys(lines[tokens])]
        numbers = np.unique(lines[tokens], return_inverse=True)[1]
        rows = KernelRows(
            tokens, positions[tokens], numbers, blocks[tokens], slots[tokens], tables, len(tokens)
        )
        path = AttentionPath(setting.blocks)
        path.fast = DecodeKernel(setting.blocks).plan(rows)
        return path.attend(1, *packed, **setting.options)[tokens]

    expected = [run(apart, [token]) for token in range(num_tokens)]
    assert torch.equal(run(together, range(num_tokens)), torch.cat(expected))


def test_nan_in_one_row_stays_there():
    setting = Setting(Case())
    expected = setting.by_kernel()
    setting.blocks.keys[1][setting.tables[2][0][0]] = math.nan
    got = setting.by_kernel()
    assert torch.isnan(got[2]).any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], expected[others])


def test_what_it_serves():
    cpu = torch.device("cpu")
    assert DecodeKernel.fits(cpu, torch.float32, 64)
    assert not DecodeKernel.fits(cpu, torch.float16, 64)
    assert not DecodeKernel.fits(cpu, torch.float32, 12)
    assert not DecodeKernel.fits(torch.device("cuda"), torch.bfloat16, 64)
