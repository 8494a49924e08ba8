"""A step in one call against the same kernels called one by one: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from adapters.parts import ActivationScales
from server.engine.adapter_slots import AdapterEntry
from server.engine.model_runner import ModelRunner, StepRows
from server.engine.packed_linear import can_pack, pack_linears
from server.engine.request import AdapterRef, GenerationRequest
from server.engine.sequence import Sequence
from server.engine.step_plan import Chunk
from server.engine.step_program import StepProgram
from server.engine.tile_product import PRODUCT_ROWS
from server.engine.tiles import has_tiles
from tests.tiny_models import tiny_spec

if not (has_tiles() and can_pack(nn.Linear(1, 1).bfloat16())):
    pytest.skip("the processor has no tiles, or may not use them", allow_module_level=True)

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES, sliding_window=12),
    "qwen2": Qwen2Config(**_SIZES),
}
BLOCK, BLOCKS = 8, 5  # of one sequence
LAYER = "model.layers.{}."
# What IA3 targets in Llama by default, and what needs a second product of a packed layer.
USUAL = (("mlp.down_proj",), ("self_attn.k_proj", "self_attn.v_proj"))
UNUSUAL = (("mlp.gate_proj", "self_attn.o_proj"), ("self_attn.q_proj", "mlp.down_proj"))


def runner_of(config, dtype=torch.bfloat16, block_size=BLOCK) -> ModelRunner:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases are ones and zeros else
            parameter += 0.2 * torch.randn_like(parameter)
    spec = tiny_spec(model)
    if dtype == torch.bfloat16:
        assert pack_linears(model)
    return ModelRunner(
        model,
        spec,
        num_blocks=BLOCKS * (PRODUCT_ROWS + 1),
        block_size=block_size,
        num_scale_slots=2,
        prefill_chunk=16,
        fast_kernels=True,
    )


def install(runner: ModelRunner, slot: int, targets, spec) -> AdapterEntry:
    generator = torch.Generator().manual_seed(slot)

    def vectors(names, attribute):
        paths = [LAYER.format(layer) + name for layer in range(3) for name in names]
        return {
            path: 1
            + torch.randn(getattr(spec.linear_modules[path], attribute), generator=generator)
            for path in paths
        }

    entry = AdapterEntry(AdapterRef(f"ia3-{slot}", 0, True))
    entry.scale_slot = slot
    inputs, outputs = vectors(targets[0], "in_features"), vectors(targets[1], "out_features")
    runner.install(entry, ActivationScales(inputs, outputs))
    return entry


def logits_of(runner: ModelRunner, num_rows: int, entries=()) -> torch.Tensor:
    """All logits of some prompts of different lengths, and of eight single tokens after each."""
    sequences = []
    for row in range(num_rows):
        tokens = tuple((7 * i + 13 * row) % 90 + 3 for i in range(12 + row % 9 + 8))
        sequence = Sequence.of(GenerationRequest(f"{row}", tokens), arrival=row)
        sequence.block_ids = [BLOCKS * row + i for i in (3, 0, 4, 1, 2)]
        sequences.append((sequence, 12 + row % 9, entries[row % len(entries)] if entries else None))
    sequences.sort(key=lambda known: 0 if known[2] is None else known[2].scale_slot)
    out = []
    for sequence, size, entry in sequences:
        out += runner.run([StepRows(Chunk(sequence, 0, size, True), entry, num_logits=1)])
    for step in range(8):
        rows = [
            StepRows(Chunk(sequence, size + step, 1, True), entry, num_logits=1)
            for sequence, size, entry in sequences
        ]
        out += runner.run(rows)
    return torch.cat(out)


@pytest.fixture
def num_runs(monkeypatch):
    """How often a program ran."""
    runs = []
    real = StepProgram.run
    monkeypatch.setattr(
        StepProgram, "run", lambda self, *given: runs.append(1) or real(self, *given)
    )
    return lambda: len(runs)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"], autouse=True)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def one_by_one(runner: ModelRunner) -> ModelRunner:
    runner._stack._program = None
    return runner


@pytest.mark.parametrize("num_rows", [1, 5, 32, 45])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bits(name, num_rows, num_runs):
    got = logits_of(runner_of(CONFIGS[name]), num_rows)
    assert num_runs() == num_rows + 8  # each prompt, and steps of single tokens
    assert torch.equal(got, logits_of(one_by_one(runner_of(CONFIGS[name])), num_rows))
    assert num_runs() == num_rows + 8
    assert got.float().std() > 0.1
    assert not torch.isnan(got).any()


def test_a_row_does_not_depend_on_the_others():
    together = logits_of(runner_of(CONFIGS["llama"]), 20).view(9, 20, -1)
    alone = logits_of(runner_of(CONFIGS["llama"]), 1).view(9, 1, -1)
    assert torch.equal(together[:, :1], alone)


def test_more_rows_than_products_take_go_one_by_one(num_runs):
    logits_of(runner_of(CONFIGS["llama"]), PRODUCT_ROWS + 1)
    assert num_runs() == PRODUCT_ROWS + 1  # the prompts, each alone


def mixed_logits(runner: ModelRunner) -> torch.Tensor:
    """Logits of steps in which two prompts are computed, several chunks at a time, beside five streams."""
    sequences = []
    for number, size in enumerate((9, 12, 1, 5, 16, 60, 37)):
        tokens = tuple((7 * i + 13 * number) % 90 + 3 for i in range(size + 6))
        sequence = Sequence.of(GenerationRequest(f"{number}", tokens), arrival=number)
        sequence.block_ids = [10 * number + i for i in (3, 0, 4, 1, 2, 7, 5, 6, 9, 8)]
        sequences.append((sequence, size))
    streams, (long, short) = sequences[:5], sequences[5:]
    out = []
    for sequence, size in streams:
        out += runner.run([StepRows(Chunk(sequence, 0, size, True), None, num_logits=1)])
    chunks = [
        [Chunk(long[0], 0, 16, False)],
        [Chunk(short[0], 0, 37, True), Chunk(long[0], 16, 16, False)],
        [Chunk(long[0], 32, 28, True)],
    ]
    for step, prompts in enumerate(chunks):
        rows = [
            StepRows(Chunk(sequence, size + step, 1, True), None, num_logits=1)
            for sequence, size in streams
        ]
        rows += [StepRows(chunk, None, num_logits=int(chunk.samples)) for chunk in prompts]
        out += runner.run(rows)
    return torch.cat(out)


# Prompts go through the decode kernel, or through tiles where blocks and heads have their sizes.
@pytest.mark.parametrize(("head_dim", "block_size"), [(16, BLOCK), (32, 16)])
@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_beside_single_tokens(name, head_dim, block_size, num_runs):
    config = type(CONFIGS[name])(
        **{**_SIZES, "hidden_size": 4 * head_dim},
        **({"sliding_window": 12} if name == "mistral" else {}),
    )
    got = mixed_logits(runner_of(config, block_size=block_size))
    assert num_runs() == 8
    assert torch.equal(got, mixed_logits(one_by_one(runner_of(config, block_size=block_size))))
    assert got.float().std() > 0.1
    assert not torch.isnan(got).any()


@pytest.mark.parametrize(("targets", "runs"), [(USUAL, 14), (UNUSUAL, 2)])
def test_scales(targets, runs, num_runs):
    """Rows with two adapters and with none, after steps without any."""
    spec = tiny_spec(AutoModelForCausalLM.from_config(CONFIGS["llama"]))  # before it is packed
    outs = []
    for prepare in (lambda runner: runner, one_by_one):
        runner = prepare(runner_of(CONFIGS["llama"]))
        plain = logits_of(runner, 6)
        before = num_runs()
        entries = [None, install(runner, 1, targets, spec), install(runner, 2, USUAL, spec)]
        scaled = logits_of(runner, 6, entries)
        outs.append(scaled)
        if prepare is not one_by_one:
            assert num_runs() - before == runs
        # Rows without scales are as they were, and so is a step without any once the tables are there.
        assert torch.equal(scaled.view(9, 6, -1)[1:, 0], plain.view(9, 6, -1)[1:, 0])
        assert not torch.equal(scaled, plain)
        assert torch.equal(logits_of(runner, 6), plain)
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (Qwen3Config(**_SIZES, head_dim=16), torch.bfloat16),
        (LlamaConfig(**{**_SIZES, "intermediate_size": 80}), torch.bfloat16),
        (CONFIGS["llama"], torch.float32),
    ],
    ids=["query and key norms", "no tiles of this size", "float32"],
)
def test_others_go_one_by_one(config, dtype, num_runs):
    logits = logits_of(runner_of(config, dtype), 2)
    assert num_runs() == 0
    assert not torch.isnan(logits).any()
