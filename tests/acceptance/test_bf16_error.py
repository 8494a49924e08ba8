"""C4: the error of bfloat16 against float32 on the default base, ours beside PEFT's.

Teacher-forced over 512 positions of the demo messages, for the base and two demo adapters. The same
bfloat16 weights are upcast for the reference, so that the error is that of the arithmetic alone. Raw
logits come from the model runner, as in the engine's self-check.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.checkpoint.folder import load_serving_form
from adapters.checkpoint.limits import CheckpointLimits
from server.base.load import load_base
from server.demo.install import ADAPTERS_DIR, demo_messages
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.model_runner import StepRows
from server.engine.request import AdapterRef, GenerationRequest
from server.engine.sequence import Sequence
from server.engine.step_plan import Chunk
from tests.acceptance.real_base import BASE_DIR, needs_base, needs_bf16
from tests.engine_tools import adapter_ref, request, run, tokens

pytestmark = [pytest.mark.slow, needs_base, needs_bf16]

NUM_POSITIONS = 512
FOLDERS = {name: ADAPTERS_DIR / name for name in ("complaints-prefix-tuning", "complaints-ia3")}
ROWS: tuple[str | None, ...] = (None, *FOLDERS)
CONFIG = EngineConfig(base=str(BASE_DIR), blobs_dir="", kv_bytes=128 << 20)
# Name -> changes of the configuration, tokens of a chunk. Single tokens go to the decode kernel.
PATHS = {
    "fast, prefill chunks": ({}, CONFIG.prefill_chunk),
    "plain, prefill chunks": ({"fast_kernels": False, "packed_linears": False}, 128),
    "fast, one token a step": ({}, 1),
}
ALLOWED = 1.1
STEP = 32
# Logits around 16 have neighbours 0.125 apart in bfloat16.
ROUNDING = 0.5

Logits = dict[str | None, torch.Tensor]


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    text = "\n".join(f"{message.text} {message.label}" for message in demo_messages())
    ids = AutoTokenizer.from_pretrained(BASE_DIR)(text)["input_ids"]
    assert len(ids) >= NUM_POSITIONS
    return ids[:NUM_POSITIONS]


@torch.inference_mode()
def peft_logits(token_ids: list[int], dtype: torch.dtype) -> Logits:
    """Row -> float32 logits (NUM_POSITIONS, V), by transformers and PEFT, in one forward pass."""
    out: Logits = {}
    ids = torch.tensor([token_ids])
    for row in ROWS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=dtype)
            if row is not None:
                model = peft.PeftModel.from_pretrained(model, FOLDERS[row])
            model.eval()
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        out[row] = logits[0, -NUM_POSITIONS:].float()
    return out


@pytest.fixture(scope="module")
def exact(token_ids) -> Logits:
    return peft_logits(token_ids, torch.float32)


def errors(logits: Logits, exact: Logits) -> dict[str | None, float]:
    """Row -> mean absolute error over all positions and the whole vocabulary."""
    return {row: float((logits[row] - exact[row]).abs().mean()) for row in ROWS}


@pytest.fixture(scope="module")
def peft_errors(token_ids, exact) -> dict[str | None, float]:
    return errors(peft_logits(token_ids, torch.bfloat16), exact)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Path]:
    """The adapters as the registry keeps them: the two files that matter."""
    out = {}
    for name, folder in FOLDERS.items():
        out[name] = tmp_path_factory.mktemp(name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(folder / file, out[name])
    return out


@pytest.fixture(scope="module")
def make_engine(stored):
    """(changes) -> one engine each on the default base in bfloat16, and the refs of its adapters."""
    made: dict[str, tuple[Engine, dict[str | None, AdapterRef | None]]] = {}

    def make(**changes) -> tuple[Engine, dict[str | None, AdapterRef | None]]:
        key = repr(sorted(changes.items()))
        if key in made:
            return made[key]
        loaded = load_base(BASE_DIR, dtype="bfloat16", device="cpu")

        def read(digest: str):
            return load_serving_form(stored[digest], loaded.spec, CheckpointLimits())

        config = dataclasses.replace(CONFIG, **changes)
        engine = Engine(loaded.model, loaded.spec, config, read)
        refs: dict[str | None, AdapterRef | None] = {None: None}
        for name, folder in stored.items():
            refs[name] = adapter_ref(name, folder, engine)
        made[key] = (engine, refs)
        return made[key]

    yield make
    for engine, _ in made.values():
        engine.close()


def our_logits(
    engine: Engine, refs: dict[str | None, AdapterRef | None], ids: list[int], chunk_size: int
) -> Logits:
    """Row -> float32 logits (NUM_POSITIONS, V) by the model runner, all rows in the same steps."""
    make_resident(engine, refs)
    sequences = {}
    for index, row in enumerate(ROWS):
        wanted = GenerationRequest(str(index), tuple(ids), adapter=refs[row])
        sequences[row] = Sequence.of(wanted, arrival=index)
        blocks = engine.scheduler.pool.allocate(engine.runner.blocks_for(len(ids)))
        assert blocks is not None
        sequences[row].block_ids = blocks
    entries = {row: engine.scheduler.slots.entries.get(row or "") for row in ROWS}
    parts: dict[str | None, list[torch.Tensor]] = {row: [] for row in ROWS}
    for start in range(0, len(ids), chunk_size):
        size = min(chunk_size, len(ids) - start)
        steps = [
            StepRows(Chunk(sequences[row], start, size, True), entries[row], num_logits=size)
            for row in ROWS
        ]
        for row, logits in zip(ROWS, engine.runner.run(steps), strict=True):
            parts[row].append(logits.float())
    for sequence in sequences.values():
        engine.scheduler.pool.free(sequence.block_ids)
    return {row: torch.cat(part) for row, part in parts.items()}


def make_resident(engine: Engine, refs: dict[str | None, AdapterRef | None]) -> None:
    for ref in refs.values():
        if ref is not None:
            engine.preload(ref)
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("path", PATHS)
def test_our_error_is_at_most_pefts(path, make_engine, token_ids, exact, peft_errors):
    changes, chunk_size = PATHS[path]
    engine, refs = make_engine(**changes)
    ours = errors(our_logits(engine, refs, token_ids, chunk_size), exact)
    for row in ROWS:
        ratio = ours[row] / peft_errors[row]
        print(
            f"\n{path}, {row or 'base'}: {ours[row]:.5f}, PEFT {peft_errors[row]:.5f}: {ratio:.3f}"
        )
    for row in ROWS:
        assert ours[row] <= ALLOWED * peft_errors[row], row


def test_the_adapters_move_the_logits_by_more_than_rounding(exact, peft_errors):
    """Else an engine that forgot the adapter would pass."""
    for row in FOLDERS:
        distance = float((exact[row] - exact[None]).abs().mean())
        assert distance > 3 * ALLOWED * peft_errors[row]


def mixed_requests(token_ids, refs) -> list[GenerationRequest]:
    """The base and the adapters, a short and a long prompt each."""
    return [
        request(
            f"{row}-{length}",
            token_ids[length : 2 * length],
            refs[row],
            max_new_tokens=12,
            num_logprobs=3,
        )
        for row in ROWS
        for length in (19, 150)
    ]


def products_depend_on_company(engine: Engine) -> bool:
    """Whether a token's product changes with the number of tokens beside it, up to STEP of them."""
    layer = engine.runner._model.model.layers[0]
    generator = torch.Generator().manual_seed(0)
    for linear in (
        layer.self_attn.q_proj,
        layer.self_attn.k_proj,
        layer.mlp.up_proj,
        layer.mlp.down_proj,
    ):
        rows = torch.randn(STEP, linear.in_features, generator=generator).bfloat16()
        alone = torch.cat([linear(row[None]) for row in rows])
        for count in range(2, STEP + 1):
            if not torch.equal(linear(rows[:count]), alone[:count]):
                return True
    return False


def test_bf16_rows_are_bit_identical_to_their_solo_runs_in_small_steps(make_engine, token_ids):
    """With AMX, oneDNN adds up in one order to 32 tokens, and in another (for most shapes) beyond."""
    engine, refs = make_engine(
        max_running=16,
        prefill_chunk=16,
        max_step_tokens=STEP,
        # What is reused leaves a shorter chunk, which attention rounds otherwise.
        prefix_caching=False,
    )
    if products_depend_on_company(engine):
        pytest.skip("this processor's bfloat16 products depend on the number of rows")
    requests = mixed_requests(token_ids, refs)
    together = run(engine, requests)
    for one in requests:
        alone = run(engine, [one])[one.request_id]
        mixed = together[one.request_id]
        assert tokens(mixed) == tokens(alone)
        assert [event.logprob for event in mixed] == [event.logprob for event in alone]


def test_bf16_rows_equal_their_solo_runs_up_to_rounding_in_larger_steps(make_engine, token_ids):
    """One element of some 30,000 rounds to its other neighbour when a step grows past 32 tokens."""
    engine, refs = make_engine()
    requests = mixed_requests(token_ids, refs)
    together = run(engine, requests)
    identical = 0
    for one in requests:
        alone = run(engine, [one])[one.request_id]
        mixed = together[one.request_id]
        identical += [event.logprob for event in mixed] == [event.logprob for event in alone]
        for ours, theirs in zip(mixed, alone, strict=True):
            (_, first), (_, second), _ = theirs.logprob.top
            if ours.token_id != theirs.token_id:
                assert first - second < ROUNDING
                break  # from here on they answer different texts
            assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=ROUNDING)
    print(f"\n{identical} of {len(requests)} rows bit-identical in steps of up to 512 tokens")
