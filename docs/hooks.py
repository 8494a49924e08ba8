"""Hooks of the site's build (mkdocs.yml): tables from the code, drawn diagrams, pages from other folders.

A page contains `<!-- generated: NAME -->`; the function NAME of `GENERATED` writes what stands there. An
entry without a meaning raises `Incomplete`, which ends the build. Mermaid diagrams become SVG here, so
the site loads nothing from another host. Independent of the text of the pages.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import mmdr  # noqa: E402
import typer  # noqa: E402
from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402
from rich.text import Text  # noqa: E402

from adapters.checkpoint.field_names import FORK_FIELDS  # noqa: E402
from adapters.method import PeftConfig, PromptLearningConfig  # noqa: E402
from adapters.methods import METHODS  # noqa: E402
from adapters.peft_names import NOT_SERVED, absent_names  # noqa: E402
from adapters.training.recipes import RECIPES  # noqa: E402
from server.api import error_replies  # noqa: E402
from server.api.middleware.route_scopes import ACCESS  # noqa: E402
from server.api.openapi.refusals import MEANINGS  # noqa: E402
from server.app import create_app  # noqa: E402
from server.cli.main import app as command_line  # noqa: E402
from server.config.limits import Limits  # noqa: E402
from server.config.settings import Settings  # noqa: E402
from server.jobs import failures  # noqa: E402
from server.telemetry.exposition import FAMILIES  # noqa: E402
from tests.benchmarks import markdown as figures  # noqa: E402
from tests.benchmarks.book import Book  # noqa: E402

# Files outside docs/ that are pages of the site: page -> source.
PAGES = {"operate/security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
_PLACEHOLDER = re.compile(r"^<!-- generated: ([a-z_]+) -->$", re.MULTILINE)
_DIAGRAM = re.compile(r'<pre class="mermaid"><code>(.*?)</code></pre>', re.DOTALL)

# What a client gets above a limit, for each limit on clients.
ABOVE_LIMIT: Mapping[str, str] = {
    "max_connections": "503 `too_many_connections`",
    "max_url_kib": "414 `url_too_long`",
    "max_headers": "431 `headers_too_large`",
    "max_header_kib": "431 `headers_too_large`",
    "header_seconds": "408 `request_timeout`",
    "body_idle_seconds": "408 `request_timeout`",
    "client_kib_per_second": "408 `request_timeout`; a reply is cut",
    "stream_send_seconds": "the connection is closed",
    "max_body_mib": "413 `body_too_large`",
    "max_json_values": "413 `body_too_large`",
    "max_parts": "422 `invalid`",
    "max_field_kib": "422 `invalid`",
    "max_upload_mib": "413 `body_too_large`",
    "max_inflated_mib": "413 `checkpoint_too_large`",
    "max_tensors": "413 `checkpoint_too_large`",
    "max_virtual_tokens": "413 `checkpoint_too_large`; of a job 422 `job_invalid`",
    "max_prompt_characters": "422 `too_long`",
    "max_prompt_tokens": "422 `too_long`",
    "max_output_tokens": "422 `too_long`",
    "max_best_of": "422 `invalid`",
    "max_sequences": "422 `invalid`",
    "max_ranked": "422 `invalid`",
    "max_labels": "422 `invalid`",
    "max_aliases": "422 `too_many_aliases`",
    "max_messages": "422 `invalid`",
    "max_stops": "422 `invalid`",
    "max_stop_characters": "422 `invalid`",
    "max_logit_biases": "422 `invalid`",
    "max_queued": "429 `overloaded`",
    "max_queued_per_adapter": "429 `adapter_overloaded`",
    "max_data_mib": "413 `body_too_large`; 422 `data_invalid`",
    "max_data_rows": "422 `data_invalid`",
    "max_queued_jobs": "429 `too_many_jobs`",
    "max_queued_jobs_per_owner": "429 `too_many_jobs`",
    "max_queued_jobs_mib": "429 `too_many_jobs`",
    "max_queued_jobs_mib_per_owner": "429 `too_many_jobs`",
    "max_files_per_owner": "413 `files_full`",
    "max_files_mib_per_owner": "413 `files_full`",
    "max_files": "413 `files_full`",
    "max_files_mib": "413 `files_full`",
}

# Codes that no error class explains: the framework's refusals, bases of the trees.
_MEANINGS: Mapping[str, str] = {
    "adapter_invalid": "The adapter cannot be used here; the message says why.",
    "bad_request": "The request cannot be read as HTTP or as JSON.",
    "method_not_allowed": "The path exists, with other methods; `Allow` lists them.",
    "refused": "The request cannot be answered; the message says why.",
    "registry_refused": "The store of adapters cannot do this; the message says why.",
    "route_not_found": "No such path.",
}
# Failures of a training job that no error class explains.
_JOB_MEANINGS: Mapping[str, str] = {
    "disk_full": "The disk is full; nothing was published.",
    "internal_error": "An unforeseen error; the job's log has it.",
    "out_of_memory": "The training process ran out of memory; nothing was published.",
    "worker_lost": "The training process died three times, or its server ten times, without a checkpoint.",
}

# Routes that the OpenAPI page leaves out.
_UNLISTED: Mapping[tuple[str, str], str] = {
    ("GET", "/v1/responses/{response_id}"): "Refused: responses are not stored",
    ("DELETE", "/v1/responses/{response_id}"): "Refused: responses are not stored",
    ("POST", "/v1/embeddings"): "Refused, with the kind of base that makes embeddings",
    ("GET", "/"): "A page for browsers: what is served, with links (others get 405)",
    ("GET", "/docs"): "The OpenAPI page, without internet",
    ("GET", "/docs/{file}"): "Scripts and styles of that page",
    ("GET", "/openapi.json"): "The OpenAPI description",
}


class Incomplete(Exception):
    """An entry of a generated table has no meaning."""


# --- tables ------------------------------------------------------------------------------------------


def settings() -> str:
    """Every setting with its default and meaning."""
    rows = [
        (f"`GRAFTWORK_{name.upper()}`", _default(field.default), _meaning(name, field.description))
        for name, field in Settings.model_fields.items()
    ]
    return _table(("variable", "default", "meaning"), rows)


def limits() -> str:
    """Every limit on what a client may ask for, with the refusal above it."""
    fields = Settings.model_fields
    rows = [
        (
            f"`GRAFTWORK_{name.upper()}`",
            _default(fields[name].default),
            _meaning(name, fields[name].description),
            _meaning(name, above),
        )
        for name, above in ABOVE_LIMIT.items()
    ]
    return _table(("variable", "default", "meaning", "above it"), rows)


def limit_names() -> set[str]:
    """The settings that limit what clients may ask for."""
    # Sizes of the machine, and of no request.
    sizes = {"max_running", "max_step_tokens"}
    named = {name for name in Settings.model_fields if name.startswith("max_")}
    return (named | set(Limits.model_fields)) - sizes


def metrics() -> str:
    """Every metric with its type, labels and meaning."""
    common = {"model_name", "engine"}
    rows = [
        (
            f"`{name}`",
            family.kind,
            ", ".join(f"`{label}`" for label in family.labels if label not in common),
            _meaning(name, family.help),
        )
        for name, family in FAMILIES.items()
    ]
    return _table(("metric", "type", "labels", "meaning"), rows)


def errors() -> str:
    """Every error code of the API, by status."""
    rows = [
        (str(status), f"`{code}`", _meaning(code, meaning))
        for (status, code), meaning in sorted(error_meanings().items())
    ]
    return _table(("status", "code", "meaning"), rows)


def error_meanings() -> dict[tuple[int, str], str]:
    """(status, code) -> meaning, of every refusal that a client can get."""
    refusals: list[tuple[int, str, str]] = [
        (refusal.status, refusal.code, _sentence(kind.__doc__))
        for kind, refusal in error_replies.TABLE.items()
        if refusal is not error_replies.UNFORESEEN
    ]
    refusals += [
        (one.status, one.code, MEANINGS[one.code]) for one in error_replies.FAILED.values()
    ]
    refusals += [(status, code, "") for status, code in error_replies.HTTP_CODES.items()]
    unforeseen = error_replies.UNFORESEEN
    refusals.append((unforeseen.status, unforeseen.code, MEANINGS[unforeseen.code]))
    found: dict[tuple[int, str], str] = {}
    for status, code, meaning in refusals:
        found.setdefault((status, code), _MEANINGS.get(code, meaning))
    return found


def job_errors() -> str:
    """Every code that a failed training job can have."""
    rows = [(f"`{code}`", _meaning(code, text)) for code, text in sorted(job_meanings().items())]
    return _table(("code", "meaning"), rows)


def job_meanings() -> dict[str, str]:
    """Code -> meaning, of every failure of a training job."""
    meanings = {code: _sentence(kind.__doc__) for kind, code in failures.CODES.items()}
    meanings |= {code: "" for code in failures.OTHER_CODES}
    return {code: _JOB_MEANINGS.get(code, meaning) for code, meaning in meanings.items()}


def routes() -> str:
    """Every route with the scopes of which a key needs one."""
    rows = [
        (f"`{method} {path}`", _meaning(path, summary), scopes)
        for (method, path), (summary, scopes) in route_meanings().items()
    ]
    return _table(("route", "what it does", "key"), rows)


def route_meanings() -> dict[tuple[str, str], tuple[str, str]]:
    """(method, path) -> summary and scopes, of every route."""
    summaries = dict(_UNLISTED)
    for path, operations in _openapi()["paths"].items():
        for method, operation in operations.items():
            summaries[method.upper(), path] = operation.get("summary", "")
    found = {}
    for (method, template), rule in ACCESS.items():
        path = template.replace(":path}", "}")
        found[method, path] = (summaries.get((method, path), ""), _scopes(rule))
    return found


@cache
def _openapi() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def _scopes(rule: Iterable[str]) -> str:
    scopes = sorted(rule)
    if not scopes:
        return "none needed"
    return "any" if len(scopes) > 2 else " or ".join(f"`{scope}`" for scope in scopes)


def commands() -> str:
    """Every command with its help, its example and its options."""
    return "\n\n".join(_command(name, command) for name, command in each_command())


def command_table() -> str:
    """Every command in one line, with the places it works on."""
    rows = []
    for name, command in each_command():
        flags = {flag for one in command.params for flag in one.opts}
        # What ends such a page's anchors: the heading of `commands`.
        link = f"[`{name}`](#graftwork-{name.replace(' ', '-')})"
        places = ("x" if "--url" in flags else "", "x" if "--data-dir" in flags else "")
        rows.append((link, *places, _meaning(name, _sentence(_help(command)).rstrip("."))))
    return _table(("command", "`--url`", "`--data-dir`", "what it does"), rows)


def each_command(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command and its words, such as "adapters add"."""
    group = typer.main.get_command(command_line) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from each_command(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def _command(name: str, command: Any) -> str:
    parts = [f"### graftwork {name}"]
    for paragraph in re.split(r"\n\s*\n", _help(command)):
        is_example = paragraph.lstrip().startswith("graftwork ")
        text = paragraph.strip() if is_example else " ".join(paragraph.split())
        parts.append(f"```console\n$ {text}\n```" if is_example else text)
    rows = []
    for one in command.params:
        flags = " ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts))
        if one.param_type_name == "argument":
            rows.append((f"`{one.name.upper()}`", "", _plain(one.help or "")))
        elif one.name != "help":
            text = re.sub(r"default: [^;\]]+(; )?", "", one.help or "").replace(" []", "")
            rows.append((flags, _option_default(one), _plain(text)))
    if rows:
        parts.append(_table(("option", "default", "meaning"), rows))
    return "\n\n".join(parts)


def _option_default(one: Any) -> str:
    said = re.search(r"\[default: ([^;\]]+)", one.help or "")
    shown = said[1] if said else one.default
    is_flag = isinstance(shown, bool)
    return _default(shown if isinstance(shown, str | int | float) and not is_flag else None)


def _help(command: Any) -> str:
    # A line of \b alone keeps the terminal from filling the lines of a paragraph.
    return _plain((command.help or "").replace("\b\n", ""))


def recipes() -> str:
    """The recipe of every method."""
    rows = []
    for peft_type, recipe in RECIPES.items():
        values = recipe.hyperparameters
        config = ", ".join(f"`{name}` {value}" for name, value in recipe.config.items())
        rows.append(
            (
                f"`{METHODS[peft_type].name}`",
                config or "PEFT's defaults",
                f"{values.learning_rate:g}",
                str(values.epochs),
                str(recipe.min_steps),
                _start(recipe),
            )
        )
    head = ("method", "config", "learning rate", "epochs", "at least steps", "start")
    return _table(head, rows)


def _start(recipe: Any) -> str:
    if recipe.context_examples:
        return f"{recipe.context_examples} rows as context"
    return "the text of training rows" if recipe.init_from_rows else "the method's own"


def config_fields() -> str:
    """The fields of every method's PEFT config that a job may set."""
    common = set(PromptLearningConfig.model_fields) - {"num_virtual_tokens"}
    parts = []
    for method in METHODS.values():
        rows = [
            (f"`{name}`", f"`{_type(field)}`", _default(field.default))
            for name, field in method.config_class.model_fields.items()
            if name not in common and not name.startswith("cpt_")
        ]
        parts += [f"### {method.name}", _table(("field", "type", "default"), rows)]
    return "\n\n".join(parts)


def fields_without_effect() -> str:
    """The fields of each method's config that PEFT does not read when it loads an adapter."""
    common = sorted(PeftConfig.only_training)
    rows = [("every method", ", ".join(f"`{name}`" for name in common))]
    for method in METHODS.values():
        own = sorted(method.config_class.only_training - PeftConfig.only_training)
        rows.append((f"`{method.peft_type}`", ", ".join(f"`{name}`" for name in own)))
    return _table(("method", "fields"), rows)


def fork_fields() -> str:
    """The fields of forks and other programs that are refused unless they are empty."""
    return _table(("field", "of"), [(f"`{name}`", of) for name, of in FORK_FIELDS.items()])


def _type(field: Any) -> str:
    shown = getattr(field.annotation, "__name__", "") if isinstance(field.annotation, type) else ""
    # A bar would end the table's cell, and in code it cannot be escaped.
    return shown or re.sub(r"[\w.]+\.(?=\w)", "", str(field.annotation)).replace(" | ", " or ")


def peft_names() -> str:
    """Names of PEFT and AdapterHub that are absent, with what to use; those with one answer share a row."""
    rows: dict[str, list[str]] = {}
    for name, instead in absent_names().items():
        is_method = instead.endswith(NOT_SERVED)
        if not is_method:
            rows.setdefault(instead, []).append(f"`{name}`")
        elif name.endswith("Config"):
            rows.setdefault(NOT_SERVED, []).append(f"`{name}`")
    return _table(("names", ""), [(", ".join(names), instead) for instead, names in rows.items()])


def examples() -> str:
    """Every file of examples/, with its code."""
    parts = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts += [f"## {path.name}", f"```python\n{path.read_text(encoding='utf-8').strip()}\n```"]
    return "\n\n".join(parts)


def speed_beside_others() -> str:
    """Tokens a second beside other engines."""
    return figures.beside_others(Book(figures.KEPT))


def speed_ratios() -> str:
    """The other measured ratios with their bars."""
    return figures.ratios(Book(figures.KEPT))


GENERATED: Mapping[str, Callable[[], str]] = {
    one.__name__: one
    for one in (
        settings,
        limits,
        metrics,
        errors,
        job_errors,
        routes,
        commands,
        command_table,
        recipes,
        config_fields,
        fields_without_effect,
        fork_fields,
        peft_names,
        examples,
        speed_beside_others,
        speed_ratios,
    )
}


def _meaning(name: str, text: str | None) -> str:
    if text is None or not text.strip():
        raise Incomplete(f"{name} has no description; the documentation cannot list it")
    return text


def _sentence(text: str | None) -> str:
    """The first sentence of a docstring or a help text, on one line."""
    paragraph = (text or "").strip().split("\n\n")[0]
    return " ".join(paragraph.split())


def _plain(text: str | None) -> str:
    """A text without rich's markup, with variables marked as code."""
    plain = Text.from_markup(text or "").plain
    return re.sub(r"(?<![`\w])GRAFTWORK_[A-Z_]*[A-Z]", r"`\g<0>`", plain)


def _default(value: Any) -> str:
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{getattr(value, 'value', value)}`"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *([_cell(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


# --- mkdocs' events ----------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        above = "../" * page.count("/")
        text = text.replace("](docs/", f"]({above}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the generated parts in place."""
    return _PLACEHOLDER.sub(lambda found: GENERATED[found[1]](), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw the diagrams."""
    numbers = iter(range(1000))
    return _DIAGRAM.sub(
        lambda found: f'<div class="diagram">{drawn(html.unescape(found[1]), next(numbers))}</div>',
        content,
    )


def drawn(diagram: str, number: int) -> str:
    """A Mermaid diagram as SVG.

    Args:
        diagram: Mermaid's text.
        number: of the diagram in its page: the ids and styles of an SVG hold for the whole page.

    Raises:
        ValueError: it does not parse.
    """
    svg = mmdr.render(diagram, theme="neutral").svg()
    svg = re.sub(r"font-family:[^;}]+", "font-family:arial,helvetica,sans-serif", svg)
    return svg.replace("merman", f"diagram-{number}")
