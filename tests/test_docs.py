"""What must stand in the README stands there."""

from __future__ import annotations

import re
from pathlib import Path

from server.api import error_replies as errors
from server.config.limits import Limits
from server.config.settings import Settings
from server.jobs import failures
from tests.benchmarks import markdown
from tests.benchmarks.book import Book

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_error_code_is_documented():
    codes = {refusal.code for refusal in errors.TABLE.values()}
    codes |= {refusal.code for refusal in errors.FAILED.values()}
    codes |= set(errors.HTTP_CODES.values()) | {errors.UNFORESEEN.code}
    codes |= set(failures.CODES.values()) | failures.OTHER_CODES
    documented = set(re.findall(r"`([a-z_0-9]+)`", README.split("## Errors")[1]))
    assert codes - documented == set()


# Sizes of the machine, and of no request.
NO_LIMITS = {"max_running", "max_step_tokens"}


def test_every_limit_stands_in_the_readme_with_its_default_and_its_error():
    section = README.split("### Limits")[1].split("\n### ")[0]
    table = re.findall(r"^\| `([A-Z_]+)` \| (.+?) \| .+? \| (.+?) \|$", section, re.MULTILINE)
    limits = {name for name in Settings.model_fields if name.startswith("max_")} - NO_LIMITS
    assert {name.lower() for name, _, _ in table} >= limits | set(Limits.model_fields)
    refusals = {(refusal.status, refusal.code) for refusal in errors.TABLE.values()}
    for name, default, told in table:
        value = Settings.model_fields[name.lower()].default
        if value is not None:
            assert float(default.replace(",", "")) == value, name
        for status, code in re.findall(r"(\d{3}) `(\w+)`", told):
            assert (int(status), code) in refusals, name


def test_the_figures_of_the_benchmark_are_those_of_its_file():
    book = Book(markdown.KEPT)
    assert markdown.beside_others(book) in README
    assert markdown.ratios(book) in README
    named = {entry["stamp"]["code"] for _, measures in book.items() for entry in measures.values()}
    assert len(named) == 1, "figures of more than one engine"
