"""The figures of a benchmark: a JSON file that grows measure by measure, and its table.

Every measure has one of three forms, told apart by their keys: contestants with `ratios`, `facts` (single
figures, some with a limit), `curves` (figures over a quantity, which are also drawn). Knows no engine.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


class Book:
    """What was measured, by item and measure.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.content: dict[str, Any] = {"machine": machine(), "items": {}}
        if path is not None and path.exists():
            self.content["items"] = json.loads(path.read_text())["items"]

    def put(self, item: int, measure: str, result: dict[str, Any]) -> None:
        """Keep a measure; what the same one had before is replaced."""
        self.content["items"].setdefault(str(item), {})[measure] = result
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
        """Whether a measure was taken in at least so many rounds."""
        found = self.get(item, measure)
        return found is not None and found.get("rounds", rounds) >= rounds

    def items(self) -> list[tuple[int, dict[str, Any]]]:
        """All items, by number."""
        return sorted((int(item), measures) for item, measures in self.content["items"].items())


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return {
        "cores": os.cpu_count(),
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "features": sorted(flag for flag in flags.split() if "bf16" in flag or "amx" in flag),
        "system": platform.platform(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


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
    return {None: "", True: "met", False: "not met"}[entry.get("met")]


def fact(name: str, value: float, unit: str, at_most: float | None = None) -> dict[str, Any]:
    """A single figure, and the most that it may be."""
    entry: dict[str, Any] = {"name": name, "value": value, "unit": unit}
    if at_most is not None:
        entry |= {"limit": at_most, "sense": "at most", "met": value <= at_most}
    return entry
