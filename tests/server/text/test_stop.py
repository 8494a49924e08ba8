"""The match depends on the text, not on how it was cut."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from server.text.stop import StopStrings

letters = st.text(alphabet="ab", min_size=1, max_size=4)


def first_end(text: str, stops: list[str]) -> int | None:
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    return min(ends, default=None)


@example(["ba", "b", "b"], ["babb"])  # a stop longer than what has come so far
@given(st.lists(letters, max_size=12), st.lists(letters, min_size=1, max_size=3))
def test_the_first_completed_stop_is_found_across_pieces(pieces, stops):
    watcher = StopStrings(stops)
    taken = 0
    for piece in pieces:
        kept = watcher.feed(piece)
        if kept is not None:
            assert taken + kept == first_end("".join(pieces), stops)
            return
        taken += len(piece)
    assert first_end("".join(pieces), stops) is None


def test_a_stop_inside_one_piece_cuts_it():
    assert StopStrings(["\n"]).feed("a\n\nb") == 2


def test_no_stops_and_no_text():
    assert StopStrings([]).feed("abc") is None
    assert StopStrings(["a"]).feed("") is None
