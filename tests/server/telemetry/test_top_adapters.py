"""Which names have books of their own: few enough, the busy ones, and no counter that falls."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.top_adapters import MAX_ASIDE, MIN_REQUESTS, OTHER, WINDOW, Busiest


class Book:
    def __init__(self) -> None:
        self.requests = 0


def ask(busiest: Busiest[Book], name: str, times: int = 1) -> None:
    for _ in range(times):
        busiest.used(name).book.requests += 1


def shown(busiest: Busiest[Book]) -> dict[str, int]:
    return {name: book.requests for name, book in busiest.books().items()}


def test_free_places_are_taken_at_once():
    busiest = Busiest(2, Book)
    for name in ("a", "b", "c", "a"):
        ask(busiest, name)
    assert shown(busiest) == {"a": 2, "b": 1, OTHER: 1}


def test_a_busier_name_takes_the_place_of_the_quietest():
    busiest = Busiest(2, Book)
    ask(busiest, "busy", 20)
    ask(busiest, "quiet", 3)
    ask(busiest, "new", MIN_REQUESTS - 1)
    assert shown(busiest) == {"busy": 20, "quiet": 3, OTHER: MIN_REQUESTS - 1}
    ask(busiest, "new", 2)
    # What it did before stays where it was counted; the quiet one's book is put aside.
    assert shown(busiest) == {"busy": 20, "new": 2, OTHER: MIN_REQUESTS - 1}


def test_a_name_that_comes_back_goes_on_from_its_book():
    busiest = Busiest(1, Book)
    ask(busiest, "a", 3)
    ask(busiest, "b", MIN_REQUESTS)
    assert shown(busiest) == {"b": 1, OTHER: MIN_REQUESTS - 1}
    ask(busiest, "a", MIN_REQUESTS * 4)
    assert shown(busiest)["a"] > 3


def test_requests_under_way_follow_a_name_that_loses_its_place():
    busiest = Busiest(1, Book)
    place = busiest.used("a")
    ask(busiest, "b", MIN_REQUESTS)
    before = shown(busiest)[OTHER]
    place.book.requests += 5
    assert shown(busiest)[OTHER] == before + 5


def test_activity_of_long_ago_is_forgotten():
    busiest = Busiest(1, Book)
    ask(busiest, "once", 400)
    ask(busiest, "now", 2 * WINDOW)
    assert "now" in shown(busiest)


def test_no_place_at_all():
    busiest = Busiest(0, Book)
    ask(busiest, "a", 100)
    assert shown(busiest) == {OTHER: 100}


def test_an_adapter_that_is_called_other_counts_there():
    busiest = Busiest(4, Book)
    ask(busiest, OTHER, 3)
    ask(busiest, "a")
    assert shown(busiest) == {"a": 1, OTHER: 3}
    assert busiest.find(OTHER) is busiest.other


def test_names_without_number_stay_few_in_memory():
    busiest = Busiest(2, Book)
    for index in range(3 * MAX_ASIDE):
        ask(busiest, f"name-{index}")
    assert len(shown(busiest)) == 3
    assert len(busiest._recent) <= WINDOW


@given(
    limit=st.integers(0, 4),
    bursts=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 60)), max_size=60),
)
def test_nothing_ever_falls_and_nothing_is_lost(limit, bursts):
    busiest: Busiest[Book] = Busiest(limit, Book)
    highest: Counter[str] = Counter()
    for index, times in bursts:
        ask(busiest, f"name-{index}", times)
        now = shown(busiest)
        assert len(now) <= limit + 1
        for name, value in now.items():
            assert value >= highest[name]
            highest[name] = value
    aside = sum(book.requests for book in busiest._aside.values())
    assert sum(shown(busiest).values()) + aside == sum(times for _, times in bursts)
