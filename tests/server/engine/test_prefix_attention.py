"""Long prefixes attended apart: as the decode kernel does it in one, and the same bits in any company."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from adapters.parts import KVPrefix
from server.engine import model_runner
from server.engine.adapter_slots import AdapterEntry
from server.engine.attention import AttentionPath
from server.engine.decode_kernel import DecodeKernel
from server.engine.model_runner import ModelRunner, StepRows
from server.engine.packed_linear import pack_linears
from server.engine.prefix_attention import SharedPrefix
from server.engine.request import AdapterRef, GenerationRequest
from server.engine.sequence import Sequence
from server.engine.step_plan import Chunk
from server.engine.step_program import StepProgram
from server.engine.tiles import has_tiles
from tests.server.engine.test_decode_kernel import TOLERANCE, Case, Setting, single_tokens
from tests.tiny_models import tiny_spec

if not has_tiles():
    pytest.skip("this processor has no tiles", allow_module_level=True)

# Prefixes by their lengths: those of 200 tokens are one and the same, so are those of 33.
ROWS = ((200, 5), (33, 40), (0, 7), (200, 1), (200, 70), (33, 1), (16, 3), (1000, 20))
CASE = Case(rows=ROWS, dtype=torch.bfloat16, block_size=16, head_dim=32)
CASES = {
    "two heads a KV head": CASE,
    "nine heads over three": dataclasses.replace(CASE, num_heads=9, num_kv_heads=3, head_dim=64),
    "one KV head": dataclasses.replace(CASE, num_heads=8, num_kv_heads=1, head_dim=128),
    "blocks of 32": dataclasses.replace(CASE, block_size=32),
    "many rows": dataclasses.replace(CASE, rows=ROWS * 6),
    "peaked": dataclasses.replace(CASE, spread=8.0),
}


class Shared(Setting):
    """Rows of prefixes of one length see the same blocks."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        size, seen = case.block_size, {}
        for (length, _), (ids, _, _) in zip(case.rows, self.tables, strict=True):
            count = -(-length // size)
            ids[:count] = seen.setdefault(length, ids[:count].copy())

    def apart(self, rows: list[int], shortest: int = 1) -> torch.Tensor:
        """Attention of some rows, prefixes of at least so many tokens apart."""
        tables = [self.tables[row] for row in rows]
        groups: dict[int, list[int]] = {}
        for line, row in enumerate(rows):
            if self.case.rows[row][0] >= shortest:
                groups.setdefault(self.case.rows[row][0], []).append(line)
        prefixes = []
        for length, lines in groups.items():
            count = -(-length // self.case.block_size)
            shared = tuple(part[:count] for part in tables[lines[0]])
            prefixes.append(SharedPrefix(np.array(lines), shared))
            for line in lines:
                tables[line] = tuple(part[count:] for part in tables[line])
        positions = np.array([self.positions[row] for row in rows])
        given = single_tokens(np.arange(len(rows)), positions, tables)
        path = AttentionPath(self.blocks)
        path.fast = DecodeKernel(self.blocks).plan(dataclasses.replace(given, prefixes=prefixes))
        return path.attend(1, *(tensor[rows] for tensor in self.tensors), **self.options)


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention(name):
    setting = Shared(CASES[name])
    got = setting.apart(list(range(len(setting.tables))))
    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(
        got.double(), setting.by_definition(), atol=tolerance, rtol=tolerance
    )


def test_prefixes_that_are_not_taken_apart_are_as_they_were():
    setting = Shared(CASE)
    everything = list(range(len(ROWS)))
    before, got = setting.by_kernel(), setting.apart(everything, shortest=200)
    for row, (length, _) in enumerate(ROWS):
        assert torch.equal(got[row], before[row]) == (length < 200)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_is_the_same_in_any_company(torch_threads, threads):
    torch_threads(threads)
    setting = Shared(CASES["many rows"])
    everything = list(range(len(setting.tables)))
    together = setting.apart(everything)
    turned = setting.apart(everything[::-1])
    assert torch.equal(turned.flip(0), together)
    for row in everything[:: len(everything) // 7]:
        assert torch.equal(setting.apart([row])[0], together[row])


@pytest.mark.parametrize("changes", [{"window": 9}, {"softcap": 5.0}, {"alibi": True}])
def test_scores_that_depend_on_positions_are_refused(changes):
    setting = Shared(dataclasses.replace(CASE, **changes))
    with pytest.raises(ValueError, match="attended apart"):
        setting.apart([0, 1])


# --- through the model ---------------------------------------------------------------------

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
LENGTHS = (150, 20, 300)


def logits_of(config, chosen: list[int], *, program: bool = True) -> torch.Tensor:
    """Logits of some of twelve sequences for four steps, (steps, chosen, V); each third has an adapter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval().requires_grad_(False)
    spec = tiny_spec(model)
    assert pack_linears(model)
    runner = ModelRunner(
        model,
        spec,
        num_blocks=100,
        block_size=16,
        num_scale_slots=1,
        prefill_chunk=32,
        fast_kernels=True,
    )
    if not program:
        runner._stack._program = None
    entries, free = [], iter(range(100))
    for number, length in enumerate(LENGTHS):
        shape = (2, spec.num_layers, spec.num_kv_heads, length, spec.head_dim)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        entry = AdapterEntry(AdapterRef(f"prefix-{number}", length, False))
        entry.block_ids = [next(free) for _ in range(-(-length // 16))]
        runner.install(entry, KVPrefix(*drawn.bfloat16()))
        entries.append(entry)
    sequences = []
    for row in range(12):
        tokens = tuple((7 * i + 13 * row) % 90 + 3 for i in range(20 + row))
        ref = entries[row % 3].ref
        sequence = Sequence.of(GenerationRequest(f"{row}", tokens, adapter=ref), arrival=row)
        sequence.block_ids = [next(free) for _ in range(3)]
        sequences.append((sequence, 16 + row, entries[row % 3]))
    out = []
    for row in chosen:
        sequence, size, entry = sequences[row]
        runner.run([StepRows(Chunk(sequence, 0, size, True), entry, num_logits=1)])
    for step in range(4):
        rows = []
        for row in chosen:
            sequence, size, entry = sequences[row]
            rows.append(StepRows(Chunk(sequence, size + step, 1, True), entry, num_logits=1))
        out.append(torch.cat(runner.run(rows)))
    return torch.stack(out)


@pytest.fixture
def split(monkeypatch):
    """Which rows had their prefixes taken apart, step by step."""
    seen = []
    real = ModelRunner._own_tables

    def noted(self, pieces):
        tables, prefixes = real(self, pieces)
        seen.append(sorted(int(row) for prefix in prefixes for row in prefix.rows))
        return tables, prefixes

    monkeypatch.setattr(ModelRunner, "_own_tables", noted)
    return seen


def test_through_the_model(split, monkeypatch):
    config = LlamaConfig(**_SIZES)
    everything = list(range(12))
    got = logits_of(config, everything)
    long = [row for row in everything if LENGTHS[row % 3] >= model_runner._LONG_PREFIX]
    assert split[-4:] == [long] * 4
    assert torch.equal(got, logits_of(config, everything, program=False))
    for row in (0, 1, 5):
        assert torch.equal(got[:, [row]], logits_of(config, [row]))
    monkeypatch.setattr(model_runner, "_LONG_PREFIX", 10**9)
    whole = logits_of(config, everything)
    assert split[-4:] == [[]] * 4
    assert not torch.equal(got, whole)
    torch.testing.assert_close(got.float(), whole.float(), atol=0.05, rtol=0.05)


def test_steps_with_and_without_prefixes_take_turns(monkeypatch):
    """The list of calls is the longer one only where there is a prefix."""
    lengths = []
    real = StepProgram.run

    def noted(self, *given):
        result = real(self, *given)
        if given[-1].tiles is None:  # a step of single tokens
            lengths.append(self._program[1])
        return result

    monkeypatch.setattr(StepProgram, "run", noted)
    config = LlamaConfig(**_SIZES)
    logits_of(config, [1, 4])
    logits_of(config, [0, 1])
    assert lengths == [lengths[0]] * 4 + [lengths[0] + config.num_hidden_layers] * 4


def test_windows_see_no_prefix_apart(split):
    logits_of(MistralConfig(**_SIZES, sliding_window=64), [0, 2])
    assert not any(split)
