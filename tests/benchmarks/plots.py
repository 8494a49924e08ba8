"""Plots of the book's curves and of its ratios, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from tests.benchmarks.book import Book


def draw(book: Book, directory: Path) -> list[Path]:
    """A file for every measure with curves, and one of all ratios that have a bar."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    bars: list[tuple[str, dict[str, Any]]] = []
    for item, measures in book.items():
        for name, measure in measures.items():
            if "curves" in measure:
                drawn.append(_curves(directory, item, name, measure))
            ratios = measure.get("ratios", [])
            bars += [(f"{item}. {name}", entry) for entry in ratios if entry["limit"]]
    if bars:
        drawn.append(_ratios(directory, bars))
    return drawn


def _curves(directory: Path, item: int, name: str, measure: dict[str, Any]) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for curve, values in measure["curves"].items():
        axes.plot(measure["x"], [v or float("nan") for v in values], marker="o", label=curve)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(measure["x"], [str(x) for x in measure["x"]])
    axes.set_ylim(bottom=0)
    axes.set(xlabel=measure["over"], ylabel=measure["unit"], title=f"{item}. {name}")
    axes.grid(alpha=0.3)
    axes.legend()
    path = directory / f"{item}-{''.join(c if c.isalnum() else '-' for c in name)}.png"
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _ratios(directory: Path, bars: list[tuple[str, dict[str, Any]]]) -> Path:
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.4 * len(bars)))
    for row, (_, entry) in enumerate(bars):
        scaled = [entry[key] / entry["limit"] for key in ("low", "ratio", "high")]
        if entry["sense"] == "at most":
            scaled = [1 / value for value in reversed(scaled)]
        colour = {True: "tab:green", False: "tab:red", None: "tab:grey"}[entry["met"]]
        axes.plot([scaled[0], scaled[2]], [row, row], color=colour)
        axes.plot(scaled[1], row, "o", color=colour)
    labels = [f"{where}: {entry['above']} / {entry['below']}" for where, entry in bars]
    axes.set_yticks(range(len(bars)), [label[:90] for label in labels], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(
        "ratio over its bar, where that says at most, bar over ratio\n"
        "right of 1 is good (grey: not judged)"
    )
    path = directory / "ratios.png"
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
