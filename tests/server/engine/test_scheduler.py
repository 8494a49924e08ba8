"""The scheduler: a state machine of everything that may happen to it, and its rules one by one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.adapter_slots import Residency
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduler import MAX_LOADS, MAX_PASSED_OVER, Scheduler
from server.engine.sequence import TRANSITIONS, Sequence, SequenceState
from tests.server.engine.simulation import (
    LIMITS,
    Simulation,
    kv_adapter,
    scales_adapter,
    soft_adapter,
)

ADAPTERS = [
    None,
    kv_adapter("a"),
    kv_adapter("b", 13),
    soft_adapter("c"),
    soft_adapter("d", 11),
    soft_adapter("e", 1),
    soft_adapter("f", 2),
    scales_adapter("g"),
    scales_adapter("h"),
]
TIGHT = [
    LIMITS,
    replace(LIMITS, num_blocks=9),
    replace(LIMITS, max_running=2, max_step_tokens=10),
    replace(LIMITS, max_adapter_blocks=4, num_scale_slots=2, num_blocks=30),
    replace(LIMITS, max_running=6, max_step_tokens=14, max_adapter_blocks=12),
    replace(LIMITS, prefill_chunk=4, block_size=3, num_blocks=20, max_adapter_blocks=10),
    replace(LIMITS, max_running=6, max_step_tokens=30, prefill_tokens_beside=8),
    replace(LIMITS, num_blocks=9, max_step_tokens=20, prefill_tokens_beside=11),
    replace(LIMITS, prefill_chunk=4, num_blocks=30, max_step_tokens=30, prefill_tokens_beside=4),
    replace(LIMITS, per_adapter=True),
    replace(LIMITS, num_blocks=9, per_adapter=True, prefill_tokens_beside=8),
    replace(LIMITS, num_blocks=30, max_running=6, max_step_tokens=30, per_adapter=True),
]
# Never fits: more blocks than adapters may hold.
TOO_LARGE = kv_adapter("huge", 30)


def test_the_scheduler_knows_no_tensors_clocks_or_threads():
    code = (
        "import sys, server.engine.scheduler\n"
        "bad = {'torch', 'numpy', 'transformers', 'asyncio', 'threading'} & set(sys.modules)\n"
        "sys.exit(f'imports {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, aborts, loads, drops and steps in any order; `teardown` wants everything finished."""

    @initialize(
        limits=st.sampled_from(TIGHT), host_slots=st.sampled_from([1, 3]), keep_folds=st.booleans()
    )
    def start(self, limits, host_slots, keep_folds):
        self.sim = Simulation(limits, host_slots, auto_load=False, keep_folds=keep_folds)

    @rule(
        adapter=st.sampled_from(ADAPTERS),
        num_prompt=st.integers(1, 24),
        max_new_tokens=st.integers(1, 12),
        num_shared=st.integers(0, 24),
    )
    def add(self, adapter, num_prompt, max_new_tokens, num_shared):
        self.sim.add(adapter, num_prompt, max_new_tokens, num_shared=num_shared)

    @precondition(lambda self: self.sim.live)
    @rule(data=st.data())
    def abort(self, data):
        self.sim.abort(data.draw(st.sampled_from(sorted(self.sim.live))))

    @precondition(lambda self: self.sim.loading)
    @rule(data=st.data(), ends_well=st.sampled_from([True, True, True, False]))
    def load_ends(self, data, ends_well):
        index = data.draw(st.integers(0, len(self.sim.loading) - 1))
        (self.sim.finish_load if ends_well else self.sim.fail_load)(index)

    @rule(adapter=st.sampled_from([*ADAPTERS[1:], TOO_LARGE]))
    def preload(self, adapter):
        self.sim.scheduler.preload(adapter)

    @rule(adapter=st.sampled_from(ADAPTERS[1:]))
    def unload(self, adapter):
        entry = self.sim.scheduler.slots.entries.get(adapter.digest)
        could = entry is not None and not entry.pins and entry.residency is Residency.DEVICE
        assert self.sim.scheduler.unload(adapter.digest) == could

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.sim.step()

    @rule()
    def step_that_fails(self):
        self.sim.step(fails=True)

    @invariant()
    def books_are_right(self):
        self.sim.scheduler.check_integrity()
        for sequence in self.sim.live.values():
            assert sequence.state is not SequenceState.FINISHED
            assert sequence.num_output_tokens == len(self.sim.emitted[sequence.request.request_id])

    def teardown(self):
        """Nothing new comes and every load ends: everything ends, in steps bounded by the work."""
        self.sim.auto_load = True
        work = sum(s.num_tokens + s.request.sampling.max_new_tokens for s in self.sim.live.values())
        # A token a step at worst, each request alone, with a load and a fold before it; where an
        # adapter has the step to itself, each waits for the turns of all.
        turns = len(ADAPTERS) if self.sim.limits.per_adapter else 1
        self.sim.run(max_steps=turns * (50 + work + 20 * len(self.sim.live)))
        assert not self.sim.live
        scheduler = self.sim.scheduler
        scheduler.check_integrity()
        for entry in list(scheduler.slots.entries.values()):
            scheduler.unload(entry.ref.digest)
        assert scheduler.pool.num_used == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True
)
TestSchedulerMachine = SchedulerMachine.TestCase


# --- the rules, one by one -------------------------------------------------------------------


def started(plan):
    """Ids of the requests that this plan computes from their first token on."""
    requests = [c.sequence.request for c in plan.chunks if c.start == 0]
    return [request.request_id for request in requests if request is not None]


def roomy(**changes):
    return Simulation(replace(LIMITS, num_blocks=400, max_adapter_blocks=100, **changes))


def test_a_long_queue_delays_another_adapter_by_one_turn_at_most():
    sim = roomy()
    busy, other = kv_adapter("busy"), kv_adapter("other")
    for _ in range(50):
        sim.add(busy, num_prompt=4, max_new_tokens=6)
    sim.scheduler.preload(other)
    for _ in range(5):
        sim.step()
    assert sim.scheduler.slots.entries[other.digest].residency is Residency.DEVICE
    single = sim.add(other, num_prompt=4, max_new_tokens=6)
    before = []
    while single not in before:
        before += started(sim.step())
    assert before.index(single) <= 1
    sim.run()


def test_adapters_with_long_queues_take_turns():
    sim = roomy(max_running=2, max_step_tokens=10)
    names = {}
    for adapter in (None, kv_adapter("a"), soft_adapter("b"), scales_adapter("c")):
        for _ in range(10):
            names[sim.add(adapter, num_prompt=2, max_new_tokens=2)] = adapter
    sim.run()
    # Loads and folds shift the first turns; from then on each of the four comes once in four.
    order = [names[request_id] for request_id in sim.finished[8:36]]
    for start in range(0, len(order), 4):
        assert len(set(order[start : start + 4])) >= 3, order


@pytest.mark.parametrize(
    ("waits_for", "crowd", "limits"),
    [
        (scales_adapter("late"), scales_adapter("crowd"), {"num_scale_slots": 1}),
        (kv_adapter("late", 16), kv_adapter("crowd", 16), {"max_adapter_blocks": 6}),
        (soft_adapter("late", 16), soft_adapter("crowd", 16), {"max_adapter_blocks": 6}),
    ],
    ids=["scale slot", "adapter blocks", "fold"],
)
def test_an_adapter_that_does_not_fit_is_passed_over_so_many_times_and_no_more(
    waits_for, crowd, limits
):
    sim = Simulation(replace(LIMITS, num_blocks=60, **limits))
    for i in range(6):
        sim.add(crowd, max_new_tokens=3 + i % 5)
    sim.step()
    late = sim.add(waits_for)
    more_of_the_late = [sim.add(waits_for) for _ in range(9)]
    passed = []
    while late not in passed:
        # A stream that never ends: there is always somebody who uses the only slot.
        sim.add(crowd, max_new_tokens=3 + sim.num_steps % 5)
        passed += started(sim.step())
        assert sim.num_steps < 1000
    assert MAX_PASSED_OVER <= passed.index(late) <= MAX_PASSED_OVER + LIMITS.max_running
    # It is its turn, and not more than that: the others come again.
    base = sim.add(num_prompt=1)
    while base not in passed:
        passed += started(sim.step())
    assert not set(more_of_the_late) <= set(passed)


def test_a_prompt_that_needs_more_blocks_than_are_left_is_not_passed_over_for_ever():
    limits = replace(LIMITS, num_blocks=8, max_running=6, max_step_tokens=14)
    sim = Simulation(limits)
    for i in range(6):
        sim.add(kv_adapter("crowd", 1), num_prompt=1, max_new_tokens=3 + i % 5)
    while not sim.scheduler.running:
        sim.step()
    late = sim.add(num_prompt=24, max_new_tokens=2)
    passed = []
    while late in sim.live:
        sim.add(kv_adapter("crowd", 1), num_prompt=1, max_new_tokens=3 + sim.num_steps % 5)
        passed += started(sim.step())
        assert sim.num_steps < 1000
    assert MAX_PASSED_OVER <= passed.index(late) <= MAX_PASSED_OVER + LIMITS.max_running


def test_the_oldest_prompt_moves_though_younger_ones_could_take_its_blocks():
    # All six blocks are the prompt's in the end, in three chunks; single tokens come all the time.
    sim = Simulation(replace(LIMITS, num_blocks=6))
    oldest = sim.add(num_prompt=23, max_new_tokens=1)
    for _ in range(3):
        for _ in range(2):
            sim.add(num_prompt=4, max_new_tokens=9)
        sim.step()
    assert sim.finished == [oldest]
    sim.run()


def test_the_youngest_gives_way_and_comes_back_before_anybody_new():
    sim = Simulation(replace(LIMITS, num_blocks=6))
    ids = [sim.add(num_prompt=4, max_new_tokens=8) for _ in range(4)]
    preempted = []
    while sim.scheduler.has_work:
        plan = sim.step()  # the simulation checks who comes back before whom
        for sequence in plan.preempted:
            running = [s for s in sim.scheduler.running if s.request is not None]
            assert all(s.arrival < sequence.arrival for s in running)
            preempted.append(sequence.request.request_id)
    assert preempted
    assert ids[0] not in preempted
    assert sorted(sim.finished) == sorted(ids)


def test_nobody_small_slips_past_a_preempted_sequence():
    sim = Simulation(replace(LIMITS, num_blocks=8))
    older = sim.add(num_prompt=7, max_new_tokens=20)
    large = sim.add(num_prompt=14, max_new_tokens=9)
    while not sim.scheduler.num_preemptions:
        sim.step()
    assert sim.live[large].state is SequenceState.PREEMPTED
    small = sim.add(num_prompt=1, max_new_tokens=1)
    assert sim.scheduler.pool.num_free > 1  # it would fit
    sim.run()
    assert sim.finished.index(older) < sim.finished.index(small)
    assert len(sim.finished) == 3


@pytest.mark.parametrize("host_slots", [1, 100])
def test_everything_ends_with_kv_for_a_third_of_the_load(host_slots):
    sim = Simulation(
        replace(LIMITS, num_blocks=30, max_running=12, max_step_tokens=20, max_adapter_blocks=15),
        host_slots,
    )
    kinds = [None, kv_adapter("a"), soft_adapter("b"), scales_adapter("c")]
    ids = [sim.add(kinds[i % 4], num_prompt=5 + i, max_new_tokens=10 + i) for i in range(12)]
    need = sum(
        -(-(s.num_tokens + s.request.sampling.max_new_tokens) // 4) for s in sim.live.values()
    )
    assert need >= 3 * sim.limits.num_blocks - 10
    sim.run(max_steps=1000)
    assert sim.scheduler.num_preemptions > 0
    assert sorted(sim.finished) == sorted(ids)
    assert [len(sim.emitted[r]) for r in ids] == [10 + i for i in range(12)]


@pytest.mark.parametrize("host_slots", [1, 2, 100])
def test_more_adapters_than_fit_are_all_served(host_slots):
    sim = Simulation(replace(LIMITS, max_adapter_blocks=4), host_slots)
    adapters = [
        kind(str(i)) for i in range(9) for kind in (kv_adapter, soft_adapter, scales_adapter)
    ]
    ids = [sim.add(adapter) for adapter in adapters * 3]
    sim.run(max_steps=2000)
    assert sorted(sim.finished) == sorted(ids)
    assert sim.scheduler.slots.num_evictions > len(adapters) // 2
    # An eviction never folds twice: the folded form is kept.
    assert set(sim.num_folds.values()) == {1}


def test_only_so_many_adapters_are_read_at_once():
    sim = roomy(num_scale_slots=20)
    sim.auto_load = False
    ids = [sim.add(kind(str(i))) for i in range(9) for kind in (kv_adapter, scales_adapter)]
    ids.append(sim.add())
    most = 0
    while sim.scheduler.has_work:
        sim.step()
        most = max(most, len(sim.loading))
        if sim.num_steps % 3 == 0 and sim.loading:
            sim.finish_load(sim.num_steps % len(sim.loading))
    assert most == MAX_LOADS
    assert sorted(sim.finished) == sorted(ids)


def test_every_stream_gets_its_token_whatever_prompts_come():
    sim = roomy()
    streams = [sim.add(num_prompt=1, max_new_tokens=40) for _ in range(3)]
    sim.step()
    for _ in range(12):
        sim.add(kv_adapter("a"), num_prompt=30, max_new_tokens=2)
    for expected in range(2, 30):
        sim.step()
        assert [len(sim.emitted[r]) for r in streams] == [expected] * 3


def prompt_sizes(plan):
    """What a plan computes of prompts, by request."""
    chunks = [c for c in plan.chunks if c.num_tokens > 1 and c.sequence.request is not None]
    return {c.sequence.request.request_id: c.num_tokens for c in chunks}


def beside_streams(tokens, rows=1):
    """A simulation with streams of the base under way, one chunk of 8 in a step beside them."""
    sim = roomy(max_running=16, max_step_tokens=64, prefill_tokens_beside=tokens)
    streams = [sim.add(num_prompt=1, max_new_tokens=200) for _ in range(rows)]
    while len(sim.scheduler.running) < rows:
        sim.step()
    return sim, streams


@pytest.mark.parametrize(
    ("tokens", "rows", "expected"), [(8, 7, 1), (20, 7, 2), (None, 7, 6), (8, 6, 6), (8, 1, 6)]
)
def test_prompts_get_their_share_of_the_step_beside_more_streams_than_they_are(
    tokens, rows, expected
):
    sim, streams = beside_streams(tokens, rows)
    for name in "abcdef":
        sim.scheduler.preload(kv_adapter(name))
    sim.step()
    sim.step()
    ids = [sim.add(kv_adapter(name), num_prompt=24, max_new_tokens=1) for name in "abcdef"]
    sizes = prompt_sizes(sim.step())
    assert sizes == dict.fromkeys(ids[:expected], 8)
    assert {len(sim.emitted[stream]) for stream in streams} == {sim.num_steps}


def test_where_nothing_decodes_prompts_get_the_whole_step():
    sim = roomy(max_step_tokens=32, prefill_tokens_beside=8)
    ids = [sim.add(num_prompt=16) for _ in range(4)]
    assert prompt_sizes(sim.step()) == dict.fromkeys(ids, 8)


def test_where_nothing_decodes_the_oldest_prompts_get_what_is_left_of_the_step():
    sim = roomy(max_step_tokens=64, prefill_tokens_beside=8)
    first, second, third = (sim.add(num_prompt=27) for _ in range(3))
    # A chunk of 8 each, then two more and the rest of 3 for the first two; 2 tokens are left.
    assert prompt_sizes(sim.step()) == {first: 27, second: 27, third: 8}
    # Two are streams now: the third is back to a chunk a step.
    assert prompt_sizes(sim.step()) == {third: 8}
    sim.run()
    assert sim.finished == [first, second, third]


@pytest.mark.parametrize(("num_prompt", "expected"), [(8, [8]), (16, [16]), (17, [8, 8, 0])])
def test_beside_a_stream_a_prompt_of_two_chunks_is_computed_in_one_step(num_prompt, expected):
    sim, (stream,) = beside_streams(20)
    prompt = sim.add(num_prompt=num_prompt, max_new_tokens=1)
    # The rest of 17 is a single token, which is none of a prompt's.
    assert [prompt_sizes(sim.step()).get(prompt, 0) for _ in expected] == expected
    assert prompt in sim.finished
    assert len(sim.emitted[stream]) == sim.num_steps


def beside_a_crowd(rows=9):
    """One adapter has `rows` of 12 places, with streams that outlast the test; "other" is resident."""
    sim = roomy(max_running=12, max_step_tokens=64, prefill_tokens_beside=20)
    other = kv_adapter("other")
    sim.scheduler.preload(other)
    streams = [sim.add(kv_adapter("crowd"), 1, 300, num_shared=0) for _ in range(rows)]
    while len(sim.scheduler.running) < rows:
        sim.step()
    sim.step()
    return sim, other, streams


def test_short_prompts_have_every_second_step_without_the_crowd():
    sim, other, streams = beside_a_crowd()
    before = len(sim.emitted[streams[0]])
    ids, sizes = [], []
    for _ in range(6):
        ids.append(sim.add(other, num_prompt=10, max_new_tokens=1))
        sizes.append([chunk.num_tokens for chunk in sim.step().chunks])
    # In the steps between, the crowd's rows stand beside the prompt.
    assert [sorted(step) for step in sizes] == [[10], [1] * 9 + [10]] * 3
    assert sim.finished == ids, "each had its first token in its first step"
    assert {len(sim.emitted[stream]) for stream in streams} == {before + 3}


def test_nobody_makes_way_for_a_long_prompt_nor_do_few_rows_make_way():
    sim, other, streams = beside_a_crowd()
    sim.add(other, num_prompt=40, max_new_tokens=1)
    before = len(sim.emitted[streams[0]])
    for _ in range(5):
        sim.step()
    assert {len(sim.emitted[stream]) for stream in streams} == {before + 5}

    sim, other, streams = beside_a_crowd(rows=2)
    base = [sim.add(num_prompt=1, max_new_tokens=300)]
    sim.step()
    before = len(sim.emitted[streams[0]])
    sim.add(other, num_prompt=10, max_new_tokens=1)
    sim.step()
    assert {len(sim.emitted[stream]) for stream in streams} == {before + 1}
    assert {len(sim.emitted[stream]) for stream in base} == {2}


def test_a_crowd_leaves_a_place_while_others_are_there_and_has_all_of_them_alone():
    sim, other, _ = beside_a_crowd(rows=10)
    kept = sim.add(other, num_prompt=1, max_new_tokens=300)
    sim.step()
    crowd = [sim.add(kv_adapter("crowd"), num_prompt=1, max_new_tokens=300) for _ in range(4)]
    sim.step()
    assert len(sim.scheduler.running) == 11
    late = sim.add(other, num_prompt=1, max_new_tokens=300)
    sim.step()
    assert len(sim.scheduler.running) == 12
    assert sim.live[late].state is SequenceState.RUNNING
    for request_id in (kept, late):
        sim.abort(request_id)
    sim.step()
    assert [sim.live[r].state for r in crowd[:2]] == [SequenceState.RUNNING] * 2
    assert len(sim.scheduler.running) == 12


def test_a_short_prompt_does_not_wait_for_the_long_ones_of_another_adapter():
    sim, _ = beside_streams(8, rows=5)
    busy, other = kv_adapter("busy"), kv_adapter("other")
    sim.scheduler.preload(other)
    long = [sim.add(busy, num_prompt=80, max_new_tokens=1) for _ in range(3)]
    sim.step()
    sim.step()
    short = sim.add(other, num_prompt=6, max_new_tokens=1)
    sim.step()
    sim.step()
    assert short in sim.finished
    sim.step()
    # Within an adapter it is first come, first served.
    assert [sim.live[r].num_computed > 0 for r in long] == [True, False, False]


def test_a_long_prompt_moves_every_second_step_beside_a_crowd_of_short_ones():
    sim, _ = beside_streams(8, rows=5)
    crowd = kv_adapter("crowd")
    sim.scheduler.preload(crowd)
    long = sim.add(kv_adapter("long"), num_prompt=80, max_new_tokens=1)
    sim.step()
    sim.step()
    before = sim.live[long].num_computed
    for _ in range(12):
        sim.add(crowd, num_prompt=8, max_new_tokens=1)
        sim.step()
    assert sim.live[long].num_computed - before == 6 * 8


def test_a_single_token_that_grows_is_counted_as_prompt():
    sim = roomy(max_step_tokens=30, prefill_tokens_beside=8)
    sim.add(num_prompt=3, max_new_tokens=40)
    sim.step()
    sim.add(num_prompt=12, max_new_tokens=30, num_shared=7)
    for _ in range(3):
        sim.step()
    # Seven of its tokens are known: one to the end of the chunk, and eight behind it.
    late = sim.add(num_prompt=16, max_new_tokens=1, num_shared=7)
    assert prompt_sizes(sim.step()) == {}
    assert prompt_sizes(sim.step()) == {late: 8}


@pytest.mark.parametrize("rows", [1, 3])
def test_adapters_that_have_the_step_to_themselves_take_turns(rows):
    sim = roomy(max_running=12, max_step_tokens=64, per_adapter=True)
    names = [None, *(kv_adapter(name) for name in "abc")]
    ids = {sim.add(a, num_prompt=1, max_new_tokens=40): a for a in names for _ in range(rows)}
    for _ in range(12):
        sim.step()
    before = {request_id: len(sim.emitted[request_id]) for request_id in ids}
    served = [{c.sequence.adapter_digest for c in sim.step().chunks} for _ in range(40)]
    assert all(len(adapters) == 1 for adapters in served)
    assert {len(sim.emitted[r]) - before[r] for r in ids} == {10}


def test_an_adapter_that_outgrows_the_memory_is_not_served_alone_for_ever():
    limits = replace(LIMITS, num_blocks=20, max_running=4, max_step_tokens=32, per_adapter=True)
    sim = Simulation(limits)
    for step in range(400):
        while sum(sequence.adapter_digest is None for sequence in sim.live.values()) < 8:
            sim.add(num_prompt=30, max_new_tokens=30)
        if step == 20:
            other = sim.add(kv_adapter("other"), num_prompt=8, max_new_tokens=4)
        sim.step()
    assert sim.scheduler.num_preemptions > 0
    assert other in sim.finished


def test_an_adapter_with_long_prompts_gets_its_share_of_tokens_and_not_of_steps():
    sim = roomy(max_running=4, max_step_tokens=32, per_adapter=True)
    stream = sim.add(num_prompt=1, max_new_tokens=200)
    long = kv_adapter("long")
    sim.scheduler.preload(long)
    sim.step()
    sim.step()
    for _ in range(9):
        sim.add(long, num_prompt=64, max_new_tokens=1)
    before = len(sim.emitted[stream])
    sizes = [sum(prompt_sizes(sim.step()).values()) for _ in range(40)]
    # A step of three chunks is paid for by six turns of four tokens.
    assert [size for size in sizes if size] == [24] * 6
    assert len(sim.emitted[stream]) - before == 34


def test_a_load_that_fails_ends_its_own_requests_only():
    sim = Simulation(auto_load=False)
    good, bad = sim.add(kv_adapter("good")), sim.add(kv_adapter("bad"))
    sim.scheduler.preload(kv_adapter("bad"))
    sim.step()
    assert sim.loading == ["kv-good", "kv-bad"]
    sim.fail_load(1)
    sim.finish_load()
    sim.run()
    assert sim.failed == [bad]
    assert sim.finished == [good]
    # It is asked for again, not remembered as bad: the file may have been put right.
    again = sim.add(kv_adapter("bad"))
    sim.auto_load = True
    sim.run()
    assert sim.finished == [good, again]


def test_abort_frees_everything_in_every_state():
    sim = Simulation(replace(LIMITS, num_blocks=6), auto_load=False)
    waiting_for_a_load = sim.add(kv_adapter("a"))
    for _ in range(3):
        sim.add(num_prompt=7, max_new_tokens=9)
    while not sim.scheduler.num_preemptions:
        sim.step()
    states = {s.state for s in sim.live.values()}
    assert states == {SequenceState.WAITING, SequenceState.RUNNING, SequenceState.PREEMPTED}
    assert waiting_for_a_load in sim.live
    for request_id in list(sim.live):
        sim.abort(request_id)
        sim.scheduler.check_integrity()
    assert sim.scheduler.abort("nobody") is None
    sim.finish_load()
    assert sim.run() == 0
    assert sim.scheduler.pool.num_used == 0


def test_preload_and_unload():
    sim = Simulation()
    adapters = [kv_adapter("a"), soft_adapter("b"), scales_adapter("c")]
    for adapter in adapters:
        sim.scheduler.preload(adapter)
        sim.scheduler.preload(adapter)
    sim.run(max_steps=10)
    entries = sim.scheduler.slots.entries
    assert {entries[a.digest].residency for a in adapters} == {Residency.DEVICE}
    running = sim.add(adapters[0])
    sim.step()
    assert not sim.scheduler.unload(adapters[0].digest), "it is in use"
    sim.run()
    assert running in sim.finished
    assert entries[adapters[0].digest].residency is Residency.HOST, "it left with its last sequence"
    for adapter in adapters:
        assert sim.scheduler.unload(adapter.digest) == (adapter is not adapters[0])
        assert not sim.scheduler.unload(adapter.digest)
        assert entries[adapter.digest].residency is Residency.HOST
    assert not sim.scheduler.unload("never heard of")
    assert sim.scheduler.pool.num_used == 0


@pytest.mark.parametrize(
    ("limits", "adapter"),
    [({}, TOO_LARGE), ({"num_scale_slots": 0}, scales_adapter("a"))],
    ids=["blocks", "scales"],
)
def test_a_preload_that_could_never_fit_evicts_nobody_and_leaves_no_work(limits, adapter):
    sim = Simulation(replace(LIMITS, **limits))
    sim.scheduler.preload(kv_adapter("resident"))
    sim.run(max_steps=5)
    sim.scheduler.preload(adapter)
    sim.run(max_steps=5)
    assert sim.scheduler.slots.num_evictions == 0


@pytest.mark.parametrize(
    ("adapter", "num_prompt", "max_new_tokens", "reason"),
    [
        (None, 41, 8, None),
        (None, 42, 8, "49 positions and 0 virtual tokens need 13 KV blocks, the engine has 12"),
        (kv_adapter("a", 5), 32, 9, None),
        (kv_adapter("a", 5), 32, 10, "41 positions and 5 virtual tokens need 13 KV blocks"),
        (kv_adapter("a", 24), 16, 8, None),
        (kv_adapter("a", 25), 1, 1, "25 virtual tokens need 7 KV blocks, adapters may hold 6"),
        (scales_adapter("a"), 40, 8, None),
    ],
)
def test_refusal(adapter, num_prompt, max_new_tokens, reason):
    request = GenerationRequest(
        "r", (0,) * num_prompt, SamplingParams(max_new_tokens=max_new_tokens), adapter
    )
    came = Scheduler(LIMITS).refusal(request)
    if reason is not None:
        assert came is not None
        assert reason in came
        return
    assert came is None
    sim = Simulation()  # what is let through can run, if only alone
    sim.add(adapter, num_prompt, max_new_tokens)
    sim.run()
    assert len(sim.finished) == 1


def test_refusal_without_scale_slots():
    request = GenerationRequest("r", (0,), adapter=scales_adapter("a"))
    scheduler = Scheduler(replace(LIMITS, num_scale_slots=0))
    assert scheduler.refusal(request) == "the engine has no scale slots"


# --- the audits find what is planted ---------------------------------------------------------


def lose_a_block(scheduler):
    scheduler.pool.allocate(1)


def share_a_block(scheduler):
    scheduler.running[0].block_ids = list(scheduler.running[1].block_ids)


def forget_a_pin(scheduler):
    scheduler.slots.entries["kv-a"].pins -= 1


def evict_in_use(scheduler):
    entry = scheduler.slots.entries["kv-a"]
    scheduler.pool.free(entry.block_ids)
    entry.block_ids = []
    entry.residency = Residency.HOST


def share_a_scale_row(scheduler):
    scheduler.slots.entries["scales-b"].scale_slot = scheduler.slots.entries["scales-c"].scale_slot


def give_more_than_adapters_may_hold(scheduler):
    scheduler.slots.entries["kv-a"].block_ids += scheduler.pool.allocate(20)


def run_more_than_may(scheduler):
    scheduler.running += [Sequence.of(GenerationRequest(str(i), (1,)), 99) for i in range(9)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lose_a_block, "lost or held twice"),
        (share_a_block, "lost or held twice"),
        (forget_a_pin, "0 pins, 1 users"),
        (evict_in_use, "in use but not resident"),
        (share_a_scale_row, "share a row"),
        (give_more_than_adapters_may_hold, "more KV blocks than they may"),
        (run_more_than_may, "more sequences run than may"),
    ],
)
def test_check_integrity_finds(fault, message):
    sim = Simulation(replace(LIMITS, num_scale_slots=2, num_blocks=40))
    for adapter in (kv_adapter("a"), scales_adapter("b"), scales_adapter("c")):
        sim.add(adapter, max_new_tokens=9)
    sim.step()
    sim.step()
    assert len(sim.scheduler.running) == 3
    fault(sim.scheduler)
    with pytest.raises(RuntimeError, match=message):
        sim.scheduler.check_integrity()


@pytest.mark.parametrize("state", SequenceState)
def test_a_sequence_goes_only_where_the_table_lets_it(state):
    for target in SequenceState:
        sequence = Sequence.of(GenerationRequest("r", (1,)), 0)
        sequence.state = state
        if target in TRANSITIONS[state]:
            sequence.to(target)
            assert sequence.state is target
        else:
            with pytest.raises(RuntimeError, match=f"from {state.value} to {target.value}"):
                sequence.to(target)
