"""The table of states: complete, walked from its start to its ends, and drawn as it is."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from server.store import job_states as states
from server.store.job_states import FINISHED, TRANSITIONS, State, check_transition

ALL = get_args(State)


def test_every_state_has_its_line_and_leads_to_states() -> None:
    assert set(TRANSITIONS) == set(ALL)
    assert set().union(*TRANSITIONS.values()) <= set(ALL)


def test_every_state_can_be_reached_and_left_for_a_finished_one() -> None:
    def reachable(start: State) -> set[State]:
        seen, waiting = {start}, [start]
        while waiting:
            found = TRANSITIONS[waiting.pop()] - seen
            seen |= found
            waiting.extend(found)
        return seen

    assert reachable("queued") == set(ALL)
    assert all(reachable(state) & FINISHED for state in ALL)
    assert {"succeeded", "failed", "cancelled"} == FINISHED


@pytest.mark.parametrize(("before", "after"), list(itertools.product(ALL, ALL)))
def test_only_what_the_table_has_is_allowed(before: State, after: State) -> None:
    if after in TRANSITIONS[before]:
        check_transition(before, after)
    else:
        with pytest.raises(ValueError, match=f"from {before} to {after}"):
            check_transition(before, after)


def test_the_drawing_is_the_table() -> None:
    drawn = {}
    for line in (states.__doc__ or "").splitlines():
        before, arrow, after = line.partition("->")
        if arrow:
            drawn[before.strip()] = frozenset(filter(None, map(str.strip, after.split(","))))
    assert drawn == TRANSITIONS
