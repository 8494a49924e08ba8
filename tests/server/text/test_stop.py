"""The match depends on the text, not on how it was cut."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.text.stop import StopStrings

letters = st.text(alphabet="ab", min_size=1, max_size=4)


def first_match(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Where the match starts and ends, found the slow way."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


@example(["ba", "b", "b"], ["babb"], True)  # a stop longer than what has come so far
@example(["b", "a"], ["ba", "a"], False)  # two that end together
@given(st.lists(letters, max_size=12), st.lists(letters, min_size=1, max_size=3), st.booleans())
def test_the_first_completed_stop_is_found_across_pieces(pieces, stops, include):
    watcher = StopStrings(stops, include=include)
    text = "".join(pieces)
    match = first_match(text, stops)
    out = ""
    for piece in pieces:
        certain, stopped = watcher.feed(piece)
        out += certain
        if stopped:
            assert match is not None
            assert out == text[: match[1] if include else match[0]]
            return
    assert match is None
    assert out + watcher.flush() == text


@given(st.lists(letters, min_size=1, max_size=12), st.lists(letters, min_size=1, max_size=3))
def test_no_more_is_held_back_than_a_stop_may_begin_with(pieces, stops):
    watcher = StopStrings(stops, include=False)
    fed = out = ""
    for piece in pieces:
        certain, stopped = watcher.feed(piece)
        if stopped:
            return
        fed, out = fed + piece, out + certain
        held = fed[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(("include", "want"), [(True, "a\n"), (False, "a")])
def test_a_stop_inside_one_piece_cuts_it(include, want):
    assert StopStrings(["\n"], include=include).feed("a\n\nb") == (want, True)


def test_no_stops_and_no_text():
    assert StopStrings([]).feed("abc") == ("abc", False)
    assert StopStrings(["a"]).feed("") == ("", False)
