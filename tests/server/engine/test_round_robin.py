"""Deficit round robin, in tokens."""

from __future__ import annotations

from collections import Counter

from server.engine.round_robin import RoundRobin


def serve(turns, costs, times):
    """Who is served, where each of `costs` always has something to do."""
    served = []
    for _ in range(times):
        first = turns.order(costs)[0]
        turns.served(first, costs[first])
        served.append(first)
    return served


def test_who_spends_no_more_than_the_quantum_is_served_once_a_round():
    costs = {"a": 1, None: 8, "b": 3}
    assert serve(RoundRobin(8), costs, 6) == ["a", None, "b"] * 2


def test_who_spends_more_is_passed_by_until_it_is_paid_for():
    served = Counter(serve(RoundRobin(8), {"large": 32, "small": 8}, 100))
    assert served["large"] == 20
    assert served["small"] == 80


def test_large_steps_alone_share_evenly():
    served = Counter(serve(RoundRobin(8), {"a": 100, "b": 50, "c": 100}, 400))
    assert served == {"a": 100, "b": 200, "c": 100}


def test_nobody_saves_more_than_one_quantum():
    turns = RoundRobin(8)
    costs = {"thrifty": 1, "other": 8}
    serve(turns, costs, 100)
    costs["thrifty"] = 16
    # One quantum saved and one given pay for one such step; the next has to wait for its turn.
    assert serve(turns, costs, 4).count("thrifty") <= 2


def test_who_can_do_nothing_is_passed_by_and_keeps_its_place():
    turns = RoundRobin(8)
    assert turns.order(["loads", "a", "b"]) == ["loads", "a", "b"]
    turns.served("a", 4)
    assert turns.order(["loads", "a", "b"]) == ["loads", "b", "a"]


def test_who_leaves_and_comes_back_joins_at_the_end():
    turns = RoundRobin(8)
    turns.order(["a", "b"])
    turns.order(["b"])
    assert turns.order(["a", "b"]) == ["b", "a"]
