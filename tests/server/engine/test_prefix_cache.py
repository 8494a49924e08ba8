"""Prompts that begin the same: what is computed once, what is never shared, and that no token changes.

What is right is what the same engine gives with the cache switched off.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from server.engine.blocks import BlockPool
from server.engine.decode_kernel import DecodeKernel
from server.engine.prefix_cache import PrefixCache, num_common
from server.engine.request import FailedEvent, GenerationRequest, SamplingParams
from server.engine.sequence import Sequence
from tests.conformance.peft_oracle import make_adapter, prompt_ids
from tests.engine_tools import TINY, adapter_ref, request, run, tiny_engine, tokens
from tests.tiny_models import tiny_model

VARIANTS = ("prefix", "cpt", "ia3")
SHARED = prompt_ids(45, seed=99)


# --- the books -------------------------------------------------------------------------------


def test_a_pool_counts_holders_and_keeps_what_it_is_told_to():
    pool = BlockPool(3)
    lost = []
    pool.on_reuse = lost.append
    first = pool.allocate(2)
    pool.hold(first)
    pool.keep(first[0])
    pool.free(first)
    assert (pool.num_used, pool.num_idle) == (2, 0)
    pool.free(first)
    assert (pool.num_free, pool.num_idle) == (3, 1)
    assert pool.allocate(4) is None
    # The one whose contents are worth something goes last.
    assert pool.allocate(3)[-1] == first[0]
    assert lost == [first[0]]


def test_of_a_freed_sequence_the_end_is_reused_before_the_beginning():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.keep(block)
    pool.free(blocks)
    assert pool.allocate(3) == blocks[::-1]


def a_sequence(ids, num_computed=0, blocks=(), **sampling):
    asked = GenerationRequest("r", tuple(ids), SamplingParams(**sampling))
    sequence = Sequence.of(asked, 0)
    sequence.num_computed, sequence.block_ids = num_computed, list(blocks)
    return sequence


@pytest.fixture
def known():
    """A cache of blocks of 4 that knows the 10 tokens 0 to 9."""
    pool = BlockPool(8)
    cache = PrefixCache(pool, 4)
    done = a_sequence(range(10), 10, pool.allocate(3))
    done.node = cache.root(None)
    cache.note(done)
    return cache, done.block_ids


@pytest.mark.parametrize(
    ("ids", "num_blocks", "num_tokens"),
    [
        (range(20), 2, 10),
        (range(10), 2, 9),  # the last token is computed: its logits are wanted
        (range(9), 2, 8),
        (range(8), 1, 7),
        ([0, 1, 2, 9, 9, 9], 0, 3),
        ([0, 1, 2, 3, 4, 5, 9, 9, 9], 1, 6),
        ([5, 6, 7, 8, 9], 0, 0),
        ([0], 0, 0),
    ],
)
def test_match_finds_the_longest_beginning(known, ids, num_blocks, num_tokens):
    cache, blocks = known
    match = cache.match(a_sequence(ids))
    assert match.block_ids == blocks[:num_blocks]
    assert match.num_tokens == num_tokens
    assert (match.partial is not None) == (num_tokens > 4 * num_blocks)


def test_wanted_logprobs_are_computed(known):
    cache, _ = known
    everything = a_sequence(range(20), prompt_logprobs=True)
    assert cache.match(everything).num_tokens == 0
    the_last = a_sequence(range(20), prompt_logprobs=True, prompt_logprobs_from=7)
    assert cache.match(the_last).num_tokens == 6  # token 6 gives the logits of token 7


def test_a_scope_finds_nothing_of_another(known):
    cache, _ = known
    asked = GenerationRequest("r", tuple(range(20)), SamplingParams(), cache_scope="somebody")
    stranger = Sequence.of(asked, 1)
    assert cache.match(stranger).num_tokens == 0
    running = a_sequence(range(20))
    assert cache.is_under_way(running, cache.match(a_sequence([50])), [a_sequence(range(20))])
    nothing = cache.match(stranger)
    # Nor does it wait for what another is computing, which would tell as much.
    assert not cache.is_under_way(stranger, nothing, [running])
    assert cache.is_under_way(stranger, nothing, [Sequence.of(asked, 2)])


def test_what_is_forgotten_is_not_found(known):
    cache, blocks = known
    cache.forget(blocks)
    assert cache.match(a_sequence(range(20))).num_tokens == 0


def test_num_common():
    assert num_common([1, 2, 3], [1, 2, 4]) == 2
    assert num_common([1, 2], [1, 2, 3]) == 2
    assert num_common([], [1]) == 0


# --- in the engine ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = {}
    for variant in VARIANTS:
        out[variant] = tmp_path_factory.mktemp(variant)
        make_adapter(tiny_model("llama"), "llama", variant, out[variant], 1)
    return out


@pytest.fixture
def start(folders):
    engines = []

    def make(**changes):
        config = dataclasses.replace(TINY, **changes)
        engines.append(tiny_engine(tiny_model("llama"), folders, config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def refs(folders):
    engine = tiny_engine(tiny_model("llama"), folders)
    engine.close()
    return [None, *(adapter_ref(digest, folder, engine) for digest, folder in folders.items())]


def same_beginnings(refs, count=24):
    """Requests that share 45, 30 or 7 tokens, over the base and every adapter."""
    out = []
    for i in range(count):
        prompt = [*SHARED[: (45, 30, 7)[i % 3]], *prompt_ids(1 + i % 5, seed=i)]
        sampling = {"do_sample": True, "seed": i} if i % 4 == 1 else {}
        out.append(request(f"r{i}", prompt, refs[i % len(refs)], 6 + i % 7, **sampling))
    return out


@pytest.mark.parametrize("fast_kernels", [True, False])
def test_no_token_changes(refs, start, fast_kernels):
    load = same_beginnings(refs)
    plain = run(start(prefix_caching=False, fast_kernels=fast_kernels), load)
    engine = start(fast_kernels=fast_kernels)
    for _ in range(2):  # all at once into an empty cache, then into a full one
        cached = run(engine, load)
        assert {k: tokens(v) for k, v in cached.items()} == {k: tokens(v) for k, v in plain.items()}
    queries, hits = engine.scheduler.prefix_query_tokens, engine.scheduler.prefix_hit_tokens
    assert hits > 0.6 * queries
    assert engine.stats().kv_blocks_used == sum(
        len(entry.block_ids) for entry in engine.scheduler.slots.entries.values()
    )


def test_little_kv_changes_no_token(refs, start):
    load = same_beginnings(refs)
    plain = run(start(prefix_caching=False), load)
    per_block = start().runner._blocks.bytes_per_block(start().spec, TINY.block_size, torch.float32)
    engine = start(kv_bytes=30 * per_block, max_running=6)
    cached = run(engine, load)
    assert {k: tokens(v) for k, v in cached.items()} == {k: tokens(v) for k, v in plain.items()}
    assert engine.scheduler.prefix_hit_tokens > 0


def computed(engine, requests):
    """How many prompt tokens each request computes, when all come at once."""
    counts = Counter()
    complete = engine.scheduler.complete

    def count(plan):
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.request is not None:
                prompt = max(0, sequence.num_prompt_tokens - chunk.start)
                counts[sequence.request.request_id] += min(prompt, chunk.num_tokens)
        complete(plan)

    engine.scheduler.complete = count
    run(engine, requests)
    return counts


def test_requests_at_once_compute_their_common_prompt_once(start):
    prompt = prompt_ids(45, seed=7)
    samples = [request(f"r{i}", prompt, None, 4, do_sample=True, seed=i) for i in range(8)]
    counts = computed(start(), samples)
    assert counts == {"r0": 45, **{f"r{i}": 1 for i in range(1, 8)}}


def test_labels_share_their_prompt(refs, start):
    prompt = prompt_ids(43, seed=7)
    labels = [prompt_ids(2 + i, seed=i) for i in range(5)]

    def ranked(caching):
        engine = start(prefix_caching=caching)
        requests = [
            request(
                f"{ref and ref.digest}-{i}",
                [*prompt, *label],
                ref,
                1,
                prompt_logprobs=True,
                prompt_logprobs_from=43,
                num_logprobs=1,
            )
            for ref in refs
            for i, label in enumerate(labels)
        ]
        events = run(engine, requests)
        return engine, {key: value[0].prompt_logprobs for key, value in events.items()}

    engine, got = ranked(True)
    _, expected = ranked(False)
    for key, entries in got.items():
        assert entries[:43] == (None,) * 43
        assert len(entries) == 43 + 2 + int(key[-1])
        numbers = [[entry.logprob for entry in one[43:]] for one in (entries, expected[key])]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    # Of each adapter's five prompts four come from the cache, but for the last tokens of a block.
    assert engine.scheduler.prefix_hit_tokens >= len(refs) * 4 * 40


def test_nothing_is_shared_across_adapters(refs, start):
    engine = start()
    prompt = prompt_ids(45, seed=7)
    for index, ref in enumerate(refs):
        before = engine.scheduler.prefix_hit_tokens
        run(engine, [request(f"first-{index}", prompt, ref, 2)])
        assert engine.scheduler.prefix_hit_tokens == before
        run(engine, [request(f"second-{index}", prompt, ref, 2)])
        assert engine.scheduler.prefix_hit_tokens == before + 44


def test_an_answer_is_part_of_what_the_next_turn_begins_with(start):
    engine = start()
    prompt = prompt_ids(30, seed=7)
    answer = tokens(run(engine, [request("first", prompt, None, 20)])["first"])
    before = engine.scheduler.prefix_hit_tokens
    run(engine, [request("next", [*prompt, *answer, *prompt_ids(5)], None, 2)])
    # 49 tokens were computed, of which 6 blocks of 8 are full.
    assert engine.scheduler.prefix_hit_tokens - before == 48


def test_the_least_recently_used_goes_first(start):
    per_block = start().runner._blocks.bytes_per_block(start().spec, TINY.block_size, torch.float32)
    engine = start(kv_bytes=12 * per_block)
    prompts = [prompt_ids(40, seed=seed) for seed in range(3)]

    def hit(prompt):
        before = engine.scheduler.prefix_hit_tokens
        run(engine, [request("r", prompt, None, 1)])
        return engine.scheduler.prefix_hit_tokens - before

    assert [hit(prompts[0]), hit(prompts[1])] == [0, 0]
    assert hit(prompts[0]) == 39
    assert hit(prompts[2]) == 0  # takes the room of prompts[1]
    assert hit(prompts[0]) >= 32
    assert hit(prompts[1]) < 32


def test_what_gave_no_finite_logits_is_not_kept(start):
    engine = start()
    prompt = prompt_ids(40, seed=3)
    real_run = engine.runner.run
    engine.runner.run = lambda rows: [out * float("nan") for out in real_run(rows)]
    engine.submit(request("bad", prompt, None, 4))
    events = []
    while engine.has_work:
        events += engine.step()
    assert [e.code for e in events if isinstance(e, FailedEvent)] == ["non_finite"]
    engine.runner.run = real_run
    run(engine, [request("good", prompt, None, 2)])
    assert engine.scheduler.prefix_hit_tokens == 0


@pytest.mark.parametrize("fast_kernels", [True, False])
def test_what_stands_behind_shared_tokens_is_not_taken_along(start, fast_kernels):
    engine = start(fast_kernels=fast_kernels)
    shared = prompt_ids(5, seed=5)
    alone = tokens(
        run(start(), [request("alone", [*shared, *prompt_ids(2, seed=6)], None, 4)])["alone"]
    )
    run(engine, [request("first", [*shared, *prompt_ids(9, seed=7)], None, 1)])
    # Whatever the first one had there, the second has nothing to do with it.
    engine.runner._blocks._all[:, :, :, :, len(shared) :] = float("nan")
    second = [request("second", [*shared, *prompt_ids(2, seed=6)], None, 4)]
    assert tokens(run(engine, second)["second"]) == alone
    assert engine.scheduler.prefix_hit_tokens == len(shared)


def test_two_tokens_of_one_sequence_are_not_taken_for_two_sequences(monkeypatch):
    planned = []
    plan = DecodeKernel.plan

    def spy(kernel, rows):
        planned.append(rows)
        return plan(kernel, rows)

    monkeypatch.setattr(DecodeKernel, "plan", spy)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    engine = tiny_engine(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    shared = prompt_ids(TINY.prefill_chunk - 1, seed=5)
    run(engine, [request("first", [*shared, 7, 7, 7, 7], None, 1)])
    planned.clear()
    # One token until the chunk's end, and one behind it: two pieces, of which the second sees the first.
    run(engine, [request("second", [*shared, 9, 9], None, 1)])
    assert [(list(rows.positions), rows.are_alone) for rows in planned] == [([15, 16], False)]
    planned.clear()
    run(engine, [request(name, [3 + i], None, 2) for i, name in enumerate("ab")])
    engine.close()
    assert [rows.are_alone for rows in planned] == [True, True]
