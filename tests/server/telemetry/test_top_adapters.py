"""Which names have counters of their own: few enough, the busy ones, and no counter that falls."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.top_adapters import MAX_ASIDE, MIN_REQUESTS, OTHER, WINDOW, TopAdapters


class Counts:
    def __init__(self) -> None:
        self.requests = 0


def ask(top: TopAdapters[Counts], name: str, times: int = 1) -> None:
    for _ in range(times):
        top.used(name).counters.requests += 1


def counted(top: TopAdapters[Counts]) -> dict[str, int]:
    return {name: counts.requests for name, counts in top.by_label().items()}


def test_free_places_are_taken_at_once():
    top = TopAdapters(2, Counts)
    for name in ("a", "b", "c", "a"):
        ask(top, name)
    assert counted(top) == {"a": 2, "b": 1, OTHER: 1}


def test_a_busier_name_takes_the_place_of_the_quietest():
    top = TopAdapters(2, Counts)
    ask(top, "busy", 20)
    ask(top, "quiet", 3)
    ask(top, "new", MIN_REQUESTS - 1)
    assert counted(top) == {"busy": 20, "quiet": 3, OTHER: MIN_REQUESTS - 1}
    ask(top, "new", 2)
    # What it did before stays where it was counted; the quiet one's counts is put aside.
    assert counted(top) == {"busy": 20, "new": 2, OTHER: MIN_REQUESTS - 1}


def test_a_name_that_comes_back_goes_on_from_its_counters():
    top = TopAdapters(1, Counts)
    ask(top, "a", 3)
    ask(top, "b", MIN_REQUESTS)
    assert counted(top) == {"b": 1, OTHER: MIN_REQUESTS - 1}
    ask(top, "a", MIN_REQUESTS * 4)
    assert counted(top)["a"] > 3


def test_requests_under_way_follow_a_name_that_loses_its_place():
    top = TopAdapters(1, Counts)
    series = top.used("a")
    ask(top, "b", MIN_REQUESTS)
    before = counted(top)[OTHER]
    series.counters.requests += 5
    assert counted(top)[OTHER] == before + 5


def test_activity_of_long_ago_is_forgotten():
    top = TopAdapters(1, Counts)
    ask(top, "once", 400)
    ask(top, "now", 2 * WINDOW)
    assert "now" in counted(top)


def test_no_place_at_all():
    top = TopAdapters(0, Counts)
    ask(top, "a", 100)
    assert counted(top) == {OTHER: 100}


def test_an_adapter_that_is_called_other_counts_there():
    top = TopAdapters(4, Counts)
    ask(top, OTHER, 3)
    ask(top, "a")
    assert counted(top) == {"a": 1, OTHER: 3}
    assert top.find(OTHER) is top.other


def test_names_without_number_stay_few_in_memory():
    top = TopAdapters(2, Counts)
    for index in range(3 * MAX_ASIDE):
        ask(top, f"name-{index}")
    assert len(counted(top)) == 3
    assert len(top._recent) <= WINDOW


@given(
    limit=st.integers(0, 4),
    bursts=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 60)), max_size=60),
)
def test_nothing_ever_falls_and_nothing_is_lost(limit, bursts):
    top: TopAdapters[Counts] = TopAdapters(limit, Counts)
    highest: Counter[str] = Counter()
    for index, times in bursts:
        ask(top, f"name-{index}", times)
        now = counted(top)
        assert len(now) <= limit + 1
        for name, value in now.items():
            assert value >= highest[name]
            highest[name] = value
    aside = sum(counts.requests for counts in top._aside.values())
    assert sum(counted(top).values()) + aside == sum(times for _, times in bursts)
