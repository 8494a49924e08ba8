"""An engine that runs for weeks: adapters that come and go leave nothing behind."""

from __future__ import annotations

from server.engine.adapter_slots import Residency
from server.engine.blocks import BlockPool
from server.engine.prefix_cache import PrefixCache
from server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from server.engine.scheduler import Scheduler, SchedulerLimits

LIMITS = SchedulerLimits(
    num_blocks=32,
    block_size=4,
    max_running=4,
    max_step_tokens=32,
    prefill_chunk=16,
    max_adapter_blocks=16,
    num_scale_slots=2,
)


def kv_adapter(digest: str) -> AdapterRef:
    return AdapterRef(digest, 5, uses_scales=False)


def running(scheduler: Scheduler, digest: str, request_id: str = "r"):
    """A sequence that runs with an adapter."""
    sampling = SamplingParams(max_new_tokens=8)
    request = GenerationRequest(request_id, (5, 6, 7), sampling, kv_adapter(digest))
    sequence = scheduler.add(request)
    scheduler.schedule()
    if scheduler.slots.entries[digest].residency is Residency.LOADING:
        scheduler.adapter_loaded(digest, needs_fold=False)
    scheduler.schedule()
    assert scheduler.slots.entries[digest].pins
    return sequence


def test_an_adapter_that_is_unloaded_while_it_runs_leaves_with_its_last_sequence():
    scheduler = Scheduler(LIMITS)
    sequence = running(scheduler, "a")
    assert not scheduler.unload("a")
    assert scheduler.slots.entries["a"].residency is Residency.DEVICE
    scheduler.finish(sequence)
    scheduler.check_integrity()
    assert scheduler.slots.entries["a"].residency is Residency.HOST
    assert scheduler.pool.num_used == 0


def test_an_adapter_that_is_asked_for_again_stays():
    scheduler = Scheduler(LIMITS)
    first = running(scheduler, "a")
    scheduler.unload("a")
    second = running(scheduler, "a", "again")
    for sequence in (first, second):
        scheduler.finish(sequence)
    assert scheduler.slots.entries["a"].residency is Residency.DEVICE


def test_adapters_that_are_on_disk_only_are_forgotten_and_come_back():
    scheduler = Scheduler(LIMITS)
    kept = running(scheduler, "kept", "kept")
    gone = running(scheduler, "gone", "gone")
    scheduler.finish(gone)
    scheduler.unload("gone")
    assert scheduler.forget_idle() == []  # its form is in host memory
    scheduler.adapter_dropped("gone")
    assert scheduler.forget_idle() == ["gone"]
    assert set(scheduler.slots.entries) == {"kept"}
    running(scheduler, "gone", "back")
    scheduler.finish(kept)
    scheduler.check_integrity()


def test_a_request_that_waits_keeps_its_adapter_known():
    scheduler = Scheduler(LIMITS)
    scheduler.add(GenerationRequest("r", (5, 6), SamplingParams(max_new_tokens=1), kv_adapter("a")))
    assert scheduler.forget_idle() == []


def test_beginnings_of_adapters_without_blocks_are_not_kept_for_ever():
    pool = BlockPool(8)
    cache = PrefixCache(pool, 4)
    (block,) = pool.allocate(1) or []
    kept = cache.root("kept")
    cache.add(kept, (1, 2, 3, 4), block)
    for number in range(20_000):
        cache.root(f"digest-{number}")
    assert len(cache._roots) < 2_000
    assert cache.root("kept") == kept
