"""Turns, what is left of a step, and the share of prompts in it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from server.engine.config import EngineConfig
from server.engine.fairness import Budget, Turns, crowd


def test_a_chunk_counts_as_prompt_and_a_single_token_does_not():
    budget = Budget(tokens=12, prompt_tokens=8)
    budget.take(1)
    assert (budget.tokens, budget.prompt_tokens) == (11, 8)
    assert budget.allows(8)
    assert not budget.allows(9), "more than prompts may have"
    budget.take(8)
    assert (budget.tokens, budget.prompt_tokens) == (3, 0)
    assert not budget.allows(2)
    assert budget.allows(1)
    budget.take(3)
    assert not budget.allows(1), "the step is full"


def test_who_is_served_goes_to_the_end_and_newcomers_join_there():
    turns = Turns()
    assert turns.order(["a", None, "b", "a"]) == ["a", None, "b"]
    turns.served("a")
    assert turns.order(["a", "b", None]) == [None, "b", "a"]
    turns.served(None)
    assert turns.order(["c", "a", None, "b"]) == ["b", "a", None, "c"]
    assert len(turns) == 4


def test_who_is_gone_is_forgotten():
    turns = Turns()
    turns.order(["a", "b"])
    assert turns.order(["b"]) == ["b"]
    turns.served("a")
    assert turns.order(["b", "a"]) == ["b", "a"], "it comes back as a newcomer"
    assert len(turns) == 2


@pytest.mark.parametrize("others", [1, 5])
def test_who_waits_is_passed_once_by_each_of_the_others_though_they_leave_and_come_back(others):
    turns, served = Turns(), []
    for step in range(40):
        crowd = [f"o{i}" for i in range(others) if (step + i) % 3]
        first = turns.order([*crowd, "waits"])[0]
        turns.served(first)
        served.append(first)
    places = [i for i, key in enumerate(served) if key == "waits"]
    gaps = [after - before for before, after in pairwise(places)]
    assert max(gaps) <= others + 1


def test_the_share_beside_streams_holds_a_chunk():
    with pytest.raises(ValueError, match="prefill_tokens_beside is 16, expected at least"):
        EngineConfig("", "", prefill_tokens_beside=16)
    assert EngineConfig("", "", prefill_tokens_beside=None).prefill_tokens_beside is None


@pytest.mark.parametrize(
    ("running", "waiting", "expected"),
    [
        ({"a": 5, "b": 4}, [], ["a"]),
        ({"a": 5, "b": 5}, [], []),
        ({"a": 9}, ["b"], ["a"]),
        ({"a": 9}, ["a"], []),
        ({None: 9, "b": 1}, [], [None]),
        ({"a": 4, "b": 1}, [], []),
        ({}, ["a", "b"], []),
    ],
)
def test_who_crowds_the_others_has_most_rows_and_not_few_and_is_not_alone(
    running, waiting, expected
):
    assert list(crowd(running, waiting, places=20)) == expected
