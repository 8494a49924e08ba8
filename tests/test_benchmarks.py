"""What the benchmark concludes from figures: pairs, intervals, bars. The engines are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks.book import Book, fact, show, stamps
from tests.benchmarks.paired import Bar, interval, is_met, take_turns
from tests.benchmarks.stamp import stamp_of
from tests.benchmarks.workload import NEW_RANGE, PROMPT_RANGE, mixed_lengths


def test_a_bar_is_met_when_the_interval_reaches_it() -> None:
    assert is_met(Bar("a", "b", 1.2), 9, 1.1, 1.2)
    assert is_met(Bar("a", "b", 1.2), 9, 1.1, 1.19) is False
    assert is_met(Bar("a", "b", 1.07, "at most"), 9, 1.07, 1.3)
    assert is_met(Bar("a", "b", 1.07, "at most"), 9, 1.08, 1.3) is False


def test_few_pairs_and_no_bar_are_no_verdict() -> None:
    assert is_met(Bar("a", "b", 1.0), 8, 2.0, 3.0) is None
    assert is_met(Bar("a", "b"), 9, 2.0, 3.0) is None


def test_drift_that_both_halves_share_is_not_in_the_ratio() -> None:
    asked: list[tuple[str, int]] = []

    def contestant(name: str, speed: float):
        def measure(number: int) -> float:
            asked.append((name, number))
            return speed * (1 + number)  # the machine gets faster all the time

        return measure

    kept: list[int] = []
    result = take_turns(
        {"ours": contestant("ours", 3.0), "theirs": contestant("theirs", 2.0)},
        [Bar("ours", "theirs", 1.4), Bar("ours", "absent", 9.0)],
        rounds=9,
        unit="tokens/s",
        keep=lambda result: kept.append(result["rounds"]),
    )
    [ratio] = result["ratios"]
    assert (ratio["low"], ratio["ratio"], ratio["high"], ratio["met"]) == (1.5, 1.5, 1.5, True)
    assert kept == list(range(1, 10))
    # Nobody is always the first.
    assert asked[:4] == [("ours", 0), ("theirs", 0), ("theirs", 1), ("ours", 1)]


def test_the_interval_holds_the_median_and_not_the_outlier() -> None:
    low, high = interval([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 50.0])
    assert 1.0 <= low < 1.4 < high <= 1.7


def test_lengths_of_two_seeds_add_up_to_the_same() -> None:
    totals = []
    for seed in (1, 2):
        lengths = mixed_lengths(seed)
        block = [next(lengths) for _ in range(32)]
        assert all(PROMPT_RANGE[0] <= one.prompt <= PROMPT_RANGE[1] for one in block)
        assert all(NEW_RANGE[0] <= one.new <= NEW_RANGE[1] for one in block)
        totals.append((sum(one.prompt for one in block), sum(one.new for one in block)))
    (prompt_a, new_a), (prompt_b, new_b) = totals
    assert abs(prompt_a / prompt_b - 1) < 0.05
    assert abs(new_a / new_b - 1) < 0.05


def test_figures_of_something_else_are_not_taken_for_ours(tmp_path: Path, capsys) -> None:
    path = tmp_path / "figures.json"
    base = str(tmp_path)
    ours = stamp_of(base, "float32", 2, 32, {})
    Book(path, ours).put(1, "W(8)", {"rounds": 9})
    assert Book(path, {**ours, "commit": "another, with the same code"}).is_done(1, "W(8)", 9)
    assert capsys.readouterr().err == ""
    for other, differs in [
        (stamp_of(base, "float32", 2, 32, {"fast_kernels": False}), "changes"),
        (stamp_of(base, "bfloat16", 2, 32, {}), "dtype"),
        (stamp_of(base, "float32", 2, 8, {}), "concurrency"),
        ({**ours, "code": "another"}, "code"),
    ]:
        assert not Book(path, other).is_done(1, "W(8)", 9)
        assert f"for another {differs}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figure", "low", "high", "said"),
    [
        (1.1, 1.0, 1.2, "met"),
        (0.9, 0.8, 1.0, "met by the interval, not by the median"),
        (0.9, 0.8, 0.95, "not met"),
    ],
)
def test_the_table_says_whether_the_median_reaches_the_bar_too(
    tmp_path, figure, low, high, said
) -> None:
    entry = {"above": "a", "below": "b", "ratio": figure, "low": low, "high": high, "limit": 1.0}
    entry |= {"sense": "at least", "met": is_met(Bar("a", "b", 1.0), 9, low, high)}
    book = Book(None, stamp_of(str(tmp_path), "float32", 2, 32, {}))
    measure = {"unit": "x", "rounds": 9, "medians": {}, "samples": {}, "ratios": [entry]}
    book.put(1, "W(8)", {**measure, "left out": {"llama.cpp": "not installed"}})
    console = Console(record=True, width=200)
    show(book, console)
    shown = console.export_text()
    assert [cell.strip() for cell in shown.split("at least 1")[1].split("│")[1:2]] == [said]
    assert "without llama.cpp: not installed" in shown
    assert "2 threads, float32" in shown


def test_what_items_have_in_common_is_said_once_with_the_day_of_each(tmp_path: Path) -> None:
    stamp = stamp_of(str(tmp_path), "float32", 2, 32, {})
    book = Book(None, stamp)
    for item in (1, 2):
        book.put(item, "measure", {"rounds": 9})
    days = {"1": "2026-01-30", "2": "2026-02-01"}
    for item, day in days.items():
        book.content["items"][item]["measure"]["stamp"]["date"] = f"{day}T00:00:00+00:00"
    [said] = stamps(book)
    assert "items 1 (2026-01-30), 2 (2026-02-01):" in said
    assert said.count("2 threads, float32") == 1


def test_a_file_without_stamps_is_shown_and_measured_anew(tmp_path: Path, capsys) -> None:
    path = tmp_path / "figures.json"
    facts = [fact("time", 1.0, "s")]
    path.write_text(json.dumps({"items": {"10": {"start": {"facts": facts, "rounds": 9}}}}))
    book = Book(path, stamp_of(str(tmp_path), "float32", 2, 32, {}))
    console = Console(record=True, width=200)
    show(book, console)
    assert "items 10:\nunknown code, options and machine" in console.export_text()
    assert not book.is_done(10, "start", 9)
    assert "10. start: anew" in capsys.readouterr().err


def test_a_figure_of_too_few_rounds_has_a_bar_and_no_verdict() -> None:
    assert fact("memory", 2.0, "bytes", at_most=1.0)["met"] is False
    few = fact("memory", 2.0, "bytes", at_most=1.0, judged=False)
    assert (few["limit"], few["met"]) == (1.0, None)


def test_a_book_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    Book(path).put(1, "W(8)", {"rounds": 3})
    book = Book(path)
    assert book.is_done(1, "W(8)", 3)
    assert not book.is_done(1, "W(8)", 9)
    assert not book.is_done(1, "W(32)", 1)
    book.drop(1)
    assert Book(path).items() == []
