"""README keeps its bars, the documentation is complete, and what it names exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from starlette.routing import compile_path

from adapters.method import parse_config
from adapters.methods import METHODS
from adapters.training.recipes import RECIPES
from server.api import error_replies as errors
from server.api.middleware.route_scopes import ACCESS
from server.base.load import describe_base
from server.config.settings import Settings
from server.jobs import failures
from server.telemetry.exposition import FAMILIES
from tests.acceptance.real_base import BASE_DIR, needs_base
from tests.benchmarks import markdown
from tests.benchmarks.book import Book
from tests.documentation import PAGES, README, ROOT, hooks

MOST_LINES, MOST_CHARACTERS = 200, 120
FOLDERS = r"(?:server|adapters|graftwork|tests|docs|docker|examples|\.ci)"
# `server/app.py`, `server/app.py:create_app`, `server/api/`
PLACE = re.compile(rf"`({FOLDERS}/[\w./-]*)(?::([A-Za-z_][\w.]*))?`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")


# --- README ------------------------------------------------------------------------------------------


def test_readme_is_short_and_its_lines_are_too():
    lines = README.read_text().splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > MOST_CHARACTERS] == []


def test_readme_has_the_figures_of_the_benchmarks_file():
    book = Book(markdown.KEPT)
    assert markdown.beside_others(book, bars=False) in README.read_text()
    named = {entry["stamp"]["code"] for _, measures in book.items() for entry in measures.values()}
    assert len(named) == 1, "figures of more than one engine"


@needs_base
@pytest.mark.parametrize(
    ("peft_type", "row", "column"),
    [
        ("IA3", "(IA)³", 0),
        ("PROMPT_TUNING", "prompt tuning", 0),
        ("P_TUNING", "P-tuning", 1),
        ("PREFIX_TUNING", "prefix tuning", 0),
    ],
)
def test_readme_counts_parameters_as_the_methods_do(peft_type, row, column):
    base = describe_base(BASE_DIR, dtype="bfloat16")
    method = METHODS[peft_type]
    raw = {**RECIPES[peft_type].config, "peft_type": peft_type, "task_type": "CAUSAL_LM"}
    config = method.complete_config(parse_config(method.config_class, raw), base)
    line = re.search(rf"^\| {re.escape(row)} \| (.*?) \|", README.read_text(), re.MULTILINE)
    shown = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line[1])]
    assert shown[column] == method.num_trainable(config, base)


@pytest.mark.parametrize("page", [README, ROOT / "SECURITY.md", ROOT / "docker" / "README.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(page):
    # Those of the site's pages are checked by its build.
    wrong = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert wrong == []


# --- generated tables --------------------------------------------------------------------------------


def test_every_error_code_has_a_meaning():
    refusals = (*errors.TABLE.values(), *errors.FAILED.values(), errors.UNFORESEEN)
    codes = {refusal.code for refusal in refusals} | set(errors.HTTP_CODES.values())
    meanings = hooks().error_meanings()
    assert {code for _, code in meanings} == codes
    assert [key for key, meaning in meanings.items() if not meaning.strip()] == []


def test_every_code_of_a_failed_job_has_a_meaning():
    meanings = hooks().job_meanings()
    assert set(meanings) == set(failures.CODES.values()) | failures.OTHER_CODES
    assert [code for code, meaning in meanings.items() if not meaning.strip()] == []


def test_every_limit_is_listed_with_the_refusal_above_it():
    above = hooks().ABOVE_LIMIT
    assert set(above) >= hooks().limit_names()
    assert set(above) <= set(Settings.model_fields)
    refusals = {(refusal.status, refusal.code) for refusal in errors.TABLE.values()}
    for name, refusal in above.items():
        for status, code in re.findall(r"(\d{3}) `(\w+)`", refusal):
            assert (int(status), code) in refusals, name


def test_every_route_has_a_summary():
    assert [route for route, (text, _) in hooks().route_meanings().items() if not text] == []


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ("settings", [f"GRAFTWORK_{name.upper()}" for name in Settings.model_fields]),
        ("metrics", FAMILIES),
        ("recipes", [method.name for method in METHODS.values()]),
        (
            "peft_names",
            ["get_peft_model", "LoraConfig", "AutoPeftModelForCausalLM", "AutoAdapterModel"],
        ),
        ("fields_without_effect", [*METHODS, "inference_mode", "encoder_dropout"]),
        ("fork_fields", ["origin_prompts", "postprocess_past_key_value_function"]),
        ("examples", [path.name for path in (ROOT / "examples").glob("*.py")]),
    ],
)
def test_a_generated_table_has_every_entry(table, names):
    text = hooks().GENERATED[table]()
    assert [name for name in names if name not in text] == []


def test_an_entry_without_a_meaning_ends_the_build(monkeypatch):
    monkeypatch.setattr(Settings.model_fields["port"], "description", None)
    with pytest.raises(hooks().Incomplete, match="port"):
        hooks().settings()


def test_every_page_uses_tables_that_exist_and_each_table_is_used():
    used = {
        name
        for page in PAGES
        for name in re.findall(r"^<!-- generated: (\w+) -->$", page.read_text(), re.MULTILINE)
    }
    assert used == set(hooks().GENERATED)


# --- what pages name ---------------------------------------------------------------------------------


def places() -> Iterator[tuple[str, str, str]]:
    """(page, path, name or "") of every place in backticks."""
    for page in PAGES:
        for path, name in PLACE.findall(page.read_text()):
            yield page.relative_to(ROOT).as_posix(), path, name


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a file defines: its functions, classes, methods and variables, such as `Engine.step`."""

    def found(body: list[ast.stmt], before: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield before + node.name
            if isinstance(node, ast.ClassDef):
                yield from found(node.body, f"{before}{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (before + one.id for one in targets if isinstance(one, ast.Name))

    return frozenset(found(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def test_every_path_and_name_in_backticks_exists():
    found = list(places())
    assert len(found) > 100
    assert [one for one in found if not (ROOT / one[1]).exists()] == []
    assert [one for one in found if one[2] and one[2] not in names_in(ROOT / one[1])] == []


def console_commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words after `graftwork`) of every command of ours in a console block."""
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
            text = block.replace("\\\n", " ")
            for line in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
                if ran := re.search(r"(?:^|/|\$run )graftwork (\w.*)$", line):
                    words = shlex.split(ran[1].removesuffix("&"), comments=True)
                    yield page.relative_to(ROOT).as_posix(), words


def test_every_command_that_is_shown_takes_its_options():
    known = {name: command for name, command in hooks().each_command()}
    shown = list(console_commands())
    assert len(shown) > 20
    for page, words in shown:
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        assert name in known, (page, words)
        flags = {
            flag for one in known[name].params for flag in (*one.opts, *one.secondary_opts)
        } | {"--help"}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given - flags == set(), (page, words)


def test_every_route_that_is_named_is_one():
    templates = [(method, compile_path(path)[0]) for method, path in ACCESS]
    for page in PAGES:
        for method, path in re.findall(r"`(GET|POST|PUT|DELETE) (/[\w/]*)", page.read_text()):
            here = [one for one, pattern in templates if pattern.fullmatch(path)]
            assert method in here, (page, method, path)


def test_every_setting_that_is_named_is_one():
    known = {f"GRAFTWORK_{name.upper()}" for name in Settings.model_fields}
    for page in PAGES:
        named = set(re.findall(r"\bGRAFTWORK_[A-Z_]*[A-Z]", page.read_text()))
        assert named - known == set(), page


# --- the site ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    pages = [page.read_text() for page in tmp_path.rglob("*.html")]
    assert len(pages) > 30
    for page in pages:
        assert (
            re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=\"https?:[^>]*>", page) == []
        )
        # Material would fetch Mermaid for one that is not drawn.
        assert 'class="mermaid"' not in page
        assert "<!-- generated:" not in page
    assert sum(page.count('<div class="diagram"><svg') for page in pages) >= 6
