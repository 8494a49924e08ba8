"""Steps that fail: too much memory, a row that raises, a choice that raises, a storm of aborts."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from server.engine.request import AdapterRef, FailedEvent, Grammar, TokenEvent
from tests.conformance.peft_oracle import prompt_ids
from tests.engine_tools import TINY, request, tiny_engine, tokens
from tests.tiny_models import tiny_model

LENGTHS = (5, 9, 16, 23, 31, 40, 12, 7)


def load(**sampling):
    return [
        request(f"r{i}", prompt_ids(length, seed=i), None, 16, seed=i, **sampling)
        for i, length in enumerate(LENGTHS)
    ]


def drain(engine):
    got, failed = {}, {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                got.setdefault(event.request_id, []).append(event)
            elif isinstance(event, FailedEvent):
                failed[event.request_id] = event
        engine.scheduler.check_integrity()
    return {one: tokens(events) for one, events in got.items()}, failed


def answers(engine, requests):
    for one in requests:
        assert not engine.submit(one)
    return drain(engine)


def assert_empty(engine):
    """Blocks, slots and books are as before the first request."""
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert len(engine.scheduler.pool.free_ids()) == engine.limits.num_blocks
    for book in (
        engine._held,
        engine._submitted_at,
        engine._started,
        engine._prompt_logprobs,
        engine._fold_rows,
        engine._guides._guides,
        engine.scheduler._sequences,
        engine.scheduler._queues,
        engine.scheduler._passed_over,
    ):
        assert not book


@pytest.fixture
def expected():
    engine = tiny_engine(tiny_model("llama"))
    got, failed = answers(engine, load())
    engine.close()
    assert not failed
    return got


@pytest.mark.parametrize("most", [17, 24, 40])
def test_memory_for_few_tokens_at_once_costs_nobody_a_token(expected, most):
    """A device with room for `most` tokens of a step: a larger one asks for more than there is."""
    model = tiny_model("llama")
    engine = tiny_engine(model)
    sizes = []

    def room(_module, args):
        sizes.append(len(args[0]))
        if sizes[-1] > most:
            torch.empty(1 << 60, dtype=torch.uint8)

    model.get_input_embeddings().register_forward_pre_hook(room)
    assert answers(engine, load()) == (expected, {})
    assert max(sizes) > most
    assert_empty(engine)
    engine.close()


def test_a_row_that_always_raises_fails_alone(expected):
    engine = tiny_engine(tiny_model("llama"))
    run = engine.runner.run

    def one_is_poison(rows):
        if any(row.chunk.sequence.request.request_id == "r3" for row in rows):
            raise RuntimeError("this one cannot be computed")
        return run(rows)

    engine.runner.run = one_is_poison
    got, failed = answers(engine, load())
    assert failed.keys() == {"r3"}
    assert failed["r3"].code == "engine_error"
    assert "this one cannot be computed" in failed["r3"].message
    assert got == {one: ids for one, ids in expected.items() if one != "r3"}
    assert_empty(engine)
    engine.close()


def test_a_device_that_is_lost_ends_the_engine():
    """An engine on a lost device would refuse everybody for ever: its process is to be replaced."""
    engine = tiny_engine(tiny_model("llama"))

    def lost(_rows):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    engine.runner.run = lost
    engine.submit(load()[0])
    with pytest.raises(torch.AcceleratorError):
        engine.step()
    engine.close()


def test_a_choice_that_raises_fails_its_own_request(expected):
    engine = tiny_engine(tiny_model("llama"))
    odd = [
        request("bias", prompt_ids(6), None, 9, logit_bias=((10**6, 1.0),)),
        request("hot", prompt_ids(8), None, 9, do_sample=True, temperature="hot"),
    ]
    requests = load()
    got, failed = answers(engine, [odd[0], *requests[:4], odd[1], *requests[4:]])
    assert {one: event.code for one, event in failed.items()} == {
        "bias": "engine_error",
        "hot": "engine_error",
    }
    assert got == expected
    assert_empty(engine)
    engine.close()


def test_adapters_and_grammars_that_cannot_be_had_fail_their_own_requests(expected):
    def missing(digest):
        raise OSError(f"nothing is stored under {digest}")

    engine = tiny_engine(tiny_model("llama"), read_form=missing)
    ref = AdapterRef("gone", 7, False)
    bad = [request(f"gone{i}", prompt_ids(6), ref, 9) for i in range(3)]
    bad += [request("guided", prompt_ids(6), None, 9, grammar=Grammar("regex", "("))]
    requests = load()
    got, failed = answers(engine, [*bad[:2], *requests, *bad[2:]])
    assert {one: event.code for one, event in failed.items()} == {
        "gone0": "adapter_not_loaded",
        "gone1": "adapter_not_loaded",
        "gone2": "adapter_not_loaded",
        "guided": "grammar_invalid",
    }
    assert got == expected
    assert_empty(engine)
    engine.close()


def test_a_storm_of_aborts_leaves_nothing(expected):
    """A thousand requests that are dropped at any moment: queued, in their prompt, in their output."""
    config = dataclasses.replace(TINY, kv_bytes=96 << 10)  # so few blocks that some are preempted
    engine = tiny_engine(tiny_model("llama"), config=config)
    draw = random.Random(7)
    alive: list[str] = []
    for number in range(1000):
        prompt = prompt_ids(draw.randrange(1, 60), seed=draw.randrange(20))
        options = {"prompt_logprobs": True} if draw.random() < 0.2 else {}
        one = request(f"s{number}", prompt, None, draw.randrange(1, 40), **options)
        if not engine.submit(one):
            alive.append(one.request_id)
        if draw.random() < 0.1:
            engine.abort(one.request_id)
        while len(alive) > draw.randrange(1, 40):
            engine.abort(alive.pop(draw.randrange(len(alive))))
        if draw.random() < 0.3:
            engine.step()
            engine.scheduler.check_integrity()
    for request_id in alive:
        engine.abort(request_id)
    drain(engine)
    assert engine.stats().num_preemptions > 0
    assert_empty(engine)
    assert answers(engine, load()) == (expected, {})
    engine.close()
