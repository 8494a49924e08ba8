"""The documentation's tables of figures, from the file that the benchmark wrote.

    python -m tests.benchmarks.markdown [FILE]

The site's page on speed is generated from `figures.json` beside this file. README has one of the tables;
a test compares it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.book import Book
from tests.benchmarks.items import w_beside_others as w

KEPT = Path(__file__).parent / "figures.json"
# What a ratio is called, by the item and the measure that it is of, in the order of measuring.
_NAMES = {
    (2, "mixed"): (
        "mixed adapters over the base alone with as much context (which it has to compute)",
        "mixed adapters over the base alone, the same prompts",
        "IA3 over the base alone",
        "the base beside loaded adapters over none loaded",
    ),
    (3, "traffic"): ("prompts of 16 to 512 tokens, outputs of 8 to 256, over even lengths",),
    (3, "sampling"): ("temperature 0.8, top_p 0.95, five log-probabilities over greedy",),
    (4, "registered"): ("1,000 adapters known to the engine over 8",),
    (4, "working set"): ("twice as many active adapters as slots over as many",),
    (4, "256 active"): ("256 active adapters over 8",),
    (5, "first token"): (
        "first token behind 200 virtual tokens of P-tuning over the base's",
        "first token behind 200 virtual tokens of CPT over the base's",
    ),
    (5, "sharing"): (
        "1,024 virtual tokens of one adapter over 16",
        "1,024 virtual tokens shared over not shared",
    ),
    (6, "kept prompts"): (
        "first token of the second prompt that begins with the same 400 tokens, base",
        "the same, CPT",
    ),
    (7, "processor time"): ("processor time a token, streaming over HTTP over the engine alone",),
    (7, "wall time"): ("tokens a second of the same, the client on the same cores",),
    (8, "stalls"): ("largest gap in 16 streams while 2,000 tokens are read over the usual one",),
    (11, "batching"): ("`--batching mixed` over `per-adapter`",),
    (11, "fairness"): (
        "first token beside an adapter with 90 % of the load over without it",
        "first token beside it over the same load from all adapters alike",
    ),
}


def beside_others(book: Book, *, bars: bool = True) -> str:
    """Tokens a second of every contestant in W(1), W(8) and W(32), and our rate over each.

    Args:
        book: the figures.
        bars: also show the bar of each ratio that has one.
    """
    measures = {c: _measure(book, 1, f"W({c})") for c in (1, 8, 32)}
    lines = [
        "| tokens a second | 1 request | 8 requests | 32 requests | ours over it at 1 | at 8 | at 32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (w.OURS, *(name for name in w.STARTERS if name != w.OURS)):
        figures = [_figure(measures[c], name) for c in measures]
        ratios = [_over(measures[c], name, bars) for c in measures]
        bold = "**" if name == w.OURS else ""
        lines.append("| " + " | ".join(f"{bold}{c}{bold}" if c else c for c in (name, *figures)))
        lines[-1] += " | " + " | ".join(ratios) + " |"
    return "\n".join(lines)


def ratios(book: Book) -> str:
    """Every other ratio with its bar."""
    lines = ["| item | ratio | bar | median (95 %) |", "|---|---|---|---|"]
    for (item, name), titles in _NAMES.items():
        for title, entry in zip(titles, _measure(book, item, name)["ratios"], strict=True):
            shown = f"{entry['ratio']:.3f}"
            if entry["low"] != entry["high"]:
                shown += f" ({entry['low']:.3f} to {entry['high']:.3f})"
            lines.append(f"| {item} | {title} | {_bar(entry)} | {shown} |")
    return "\n".join(lines)


def _measure(book: Book, item: int, name: str) -> dict[str, Any]:
    found = book.get(item, name)
    if found is None:
        raise SystemExit(f"expected a file with all items, {item}. {name} is not there")
    return found


def _figure(measure: dict[str, Any], name: str) -> str:
    median = measure["medians"].get(name)
    return "" if median is None else f"{median:.0f}"


def _over(measure: dict[str, Any], name: str, bars: bool) -> str:
    for entry in measure["ratios"]:
        if entry["below"] == name:
            bar = f", bar {entry['limit']:g}" if bars and entry["limit"] else ""
            return f"{entry['ratio']:.2f} ({entry['low']:.2f} to {entry['high']:.2f}{bar})"
    return ""


def _bar(entry: dict[str, Any]) -> str:
    if entry["limit"] is None:
        return ""
    return f"{'≥' if entry['sense'] == 'at least' else '≤'} {entry['limit']:g}"


if __name__ == "__main__":
    book = Book(Path(sys.argv[1]) if len(sys.argv) > 1 else KEPT)
    print(beside_others(book), ratios(book), sep="\n\n")
