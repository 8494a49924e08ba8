"""The figures of a benchmark: a JSON file that grows measure by measure, and its table.

Every measure has one of three forms, told apart by their keys: contestants with `ratios`, `facts` (single
figures, some with a limit), `curves` (figures over a quantity, which are also drawn). Knows no engine.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.paired import reaches
from tests.benchmarks.stamp import difference, text


class Book:
    """What was measured, by item and measure.

    Args:
        path: the file; None keeps nothing.
        stamp: what measures depend on from now on (`stamp_of`); those of another are not done.
    """

    def __init__(self, path: Path | None, stamp: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._stamp = dict(stamp or {})
        self.content: dict[str, Any] = {"items": {}}
        if path is not None and path.exists():
            self.content["items"] = json.loads(path.read_text())["items"]

    def put(self, item: int, measure: str, result: dict[str, Any]) -> None:
        """Keep a measure; what the same one had before is replaced."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        stamped = {**result, "stamp": {**self._stamp, "date": date}}
        self.content["items"].setdefault(str(item), {})[measure] = stamped
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(scratch, self._path)

    def drop(self, item: int) -> None:
        """Forget an item."""
        self.content["items"].pop(str(item), None)
        self._write()

    def get(self, item: int, measure: str) -> dict[str, Any] | None:
        """A measure, if it was taken."""
        found: dict[str, Any] | None = self.content["items"].get(str(item), {}).get(measure)
        return found

    def is_done(self, item: int, measure: str, rounds: int) -> bool:
        """Whether a measure was taken in at least so many rounds, and of what is measured now."""
        found = self.get(item, measure)
        if found is None or found.get("rounds", rounds) < rounds:
            return False
        differs = difference(found.get("stamp", {}), self._stamp)
        if differs is not None:
            print(f"   {item}. {measure}: anew, for another {differs}", file=sys.stderr)
        return differs is None

    def items(self) -> list[tuple[int, dict[str, Any]]]:
        """All items, by number."""
        return sorted((int(item), measures) for item, measures in self.content["items"].items())


def show(book: Book, console: Console) -> None:
    """Print tables of everything in the book."""
    for item, measures in book.items():
        for name, measure in measures.items():
            title = f"{item}. {name}"
            if "samples" in measure:
                _show_contestants(title, measure, console)
            if measure.get("facts"):
                _show_facts(title, measure, console)
            if "curves" in measure:
                _show_curves(title, measure, console)
            for who, why in measure.get("left out", {}).items():
                console.print(f"{title}: without {who}: {why}")
    for line in stamps(book):
        console.print(line, highlight=False)


def stamps(book: Book) -> list[str]:
    """What the measures depend on: one text for all items that have it in common, with their days."""
    items: dict[str, list[str]] = {}
    for item, measures in book.items():
        for measure in measures.values():
            stamp = measure.get("stamp", {})
            # A file of an earlier benchmark has measures without one.
            what = text(stamp) if "code" in stamp else "unknown code, options and machine"
            dated = f"{item} ({stamp['date'][:10]})" if "date" in stamp else str(item)
            of_it = items.setdefault(what, [])
            of_it += [dated] if dated not in of_it else []
    return [f"\nitems {', '.join(of_it)}:\n{what}" for what, of_it in items.items()]


def _show_contestants(title: str, measure: dict[str, Any], console: Console) -> None:
    rounds = measure["rounds"]
    medians = Table("contestant", f"{measure['unit']} (median)", title=f"{title}; {rounds} rounds")
    for name, median in measure["medians"].items():
        medians.add_row(name, f"{median:.4g}")
    console.print(medians)
    if not measure["ratios"]:
        return
    ratios = Table("ratio", "median", "95 % interval", "bar", "")
    for entry in measure["ratios"]:
        ratios.add_row(
            f"{entry['above']} / {entry['below']}",
            f"{entry['ratio']:.3f}",
            f"{entry['low']:.3f} to {entry['high']:.3f}",
            _bar(entry),
            _verdict(entry),
        )
    console.print(ratios)


def _show_facts(title: str, measure: dict[str, Any], console: Console) -> None:
    table = Table("figure", "", "bar", "", title=title)
    for entry in measure["facts"]:
        table.add_row(
            entry["name"], f"{entry['value']:,.6g} {entry['unit']}", _bar(entry), _verdict(entry)
        )
    console.print(table)


def _show_curves(title: str, measure: dict[str, Any], console: Console) -> None:
    table = Table(measure["over"], *measure["curves"], title=f"{title}, {measure['unit']}")
    for index, x in enumerate(measure["x"]):
        values = (values[index] for values in measure["curves"].values())
        table.add_row(f"{x:,}", *("-" if v is None else f"{v:,.4g}" for v in values))
    console.print(table)


def _bar(entry: dict[str, Any]) -> str:
    limit = entry.get("limit")
    return "" if limit is None else f"{entry['sense']} {limit:,.6g}"


def _verdict(entry: dict[str, Any]) -> str:
    if entry.get("met") is None:
        return ""
    if not entry["met"]:
        return "not met"
    figure = entry["ratio"] if "ratio" in entry else entry["value"]
    reached = reaches(figure, entry["limit"], entry["sense"])
    return "met" if reached else "met by the interval, not by the median"


def fact(
    name: str, value: float, unit: str, at_most: float | None = None, *, judged: bool = True
) -> dict[str, Any]:
    """A single figure, and the most that it may be; not `judged` where there were too few rounds."""
    entry: dict[str, Any] = {"name": name, "value": value, "unit": unit}
    if at_most is not None:
        met = value <= at_most if judged else None
        entry |= {"limit": at_most, "sense": "at most", "met": met}
    return entry
