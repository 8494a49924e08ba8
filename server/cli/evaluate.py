"""`graftwork eval`: accuracy and macro-F1 of several adapters and the base, side by side.

Finds the adapters and the metadata that was stored with them, and prints. `server.cli.evaluation` ranks.
Without --url an engine of this process does: the options about labels, which no route has, hold there,
and rows may be cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from adapters.template import Tokenization
from server.cli.data import (
    AppendEos,
    Data,
    DataFile,
    LabelName,
    Labels,
    Target,
    TargetSeparator,
    TemplateOption,
    Where,
    labels_from,
    pairs_from,
)
from server.cli.found_adapters import RENDERING, FoundAdapter, find_adapters, require_base
from server.cli.options import (
    AsJson,
    connect,
    prepare_base,
    takes_settings,
)
from server.cli.render import (
    err,
    errors_as_lines,
    fail,
    print_json,
    print_line,
    print_table,
    share,
)
from server.config.settings import MIB, Settings

if TYPE_CHECKING:
    from server.cli.evaluation import Contestant, Evaluation, Normalization
    from server.engine.offline import OfflineEngine

_NORMALIZATIONS = ("sum", "mean")


def add_commands(app: typer.Typer) -> None:
    """Hang this file's command into the command line."""
    app.command("eval")(evaluate)


@takes_settings("url", "base", "revision", "data_dir", "dtype", "device", "threads")
def evaluate(
    *,
    data: Data,
    adapters: Annotated[
        str,
        typer.Option(
            "--adapters",
            metavar="A,B",
            help="Names (NAME, NAME@VERSION), or without a server PEFT folders. The base is always "
            "there.",
        ),
    ] = "",
    template: TemplateOption = None,
    target: Target = None,
    labels: Labels = None,
    label_name: LabelName = None,
    where: Where = None,
    target_separator: TargetSeparator = None,
    append_eos: AppendEos = None,
    tokenization: Annotated[
        str | None,
        typer.Option("--tokenization", help="boundary or as_written.", show_default=False),
    ] = None,
    normalization: Annotated[
        str,
        typer.Option(
            "--normalization",
            help="A label's score: the sum of its tokens' log-likelihoods, or their mean.",
        ),
    ] = "sum",
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Measure adapters and the base on the rows of a file.

    All are computed in one mixed batch.

    Template, labels and target column are those that were stored with each
    adapter; options take their place. The base gets those of the first adapter,
    without an end of sequence. A label's score is the log-likelihood of
    separator, label and, where the adapter learned it, end of sequence. With
    --url a running server ranks, by the separator that it has stored.

    \b
    graftwork eval --adapters complaints,./mine --data rows.jsonl
    """
    if normalization not in _NORMALIZATIONS:
        raise fail(f"--normalization: expected sum or mean, came {normalization!r}")
    if tokenization not in (None, *get_args(Tokenization)):
        raise fail(f"--tokenization: expected boundary or as_written, came {tokenization!r}")
    values = (
        template,
        target,
        labels_from(labels),
        pairs_from("--label-name", label_name),
        target_separator,
        append_eos,
        tokenization,
    )
    given = {
        name: value for name, value in zip(RENDERING, values, strict=True) if value is not None
    }
    with errors_as_lines():
        given |= _separator(given)
    names = [name.strip() for name in adapters.split(",") if name.strip()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise fail(f"--adapters: {', '.join(sorted(twice))} given twice")
    with errors_as_lines():
        rows = DataFile(data, pairs_from("--where", where))
        found = [] if settings.url else find_adapters(names, settings)
    evaluation = _Evaluation(given, rows, cast("Normalization", normalization))
    with errors_as_lines(rows):
        if settings.url is not None:
            report = evaluation.at_server(settings, names)
        else:
            prepare_base(settings)
            report = evaluation.here(settings, found)
    _print(report, as_json=as_json)


def _separator(given: dict[str, Any]) -> dict[str, str]:
    """White space at the end of a template that was given is its separator, as in training."""
    from adapters.template import Template

    if "template" not in given or "target_separator" in given:
        return {}
    if given.get("tokenization") == "as_written":
        return {"target_separator": ""}
    dropped = Template.parse(given["template"]).dropped
    return {"target_separator": dropped} if dropped else {}


# --- the evaluation --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evaluation:
    """One run of the command.

    Attributes:
        given: metadata in place of what is stored.
        rows: to rank on.
        normalization: of a label's score.
    """

    given: dict[str, Any]
    rows: DataFile
    normalization: Normalization

    def here(self, settings: Settings, found: Sequence[FoundAdapter]) -> dict[str, Any]:
        """Rank with an engine of this process; the report."""
        from server.cli.evaluation import Contestant, evaluate, used_by, wording_of
        from server.engine.offline import GenerationFailed
        from server.text.tokenizer import TextTokenizer, read_eos_token_ids

        known = [{**one.metadata, **self.given} for one in found]
        # What a base was pretrained for does not end after a label.
        of_base = {**(known[0] if known else {}), "append_eos": False, **self.given}
        with _engine(settings, len(found)) as engine:
            contestants = [Contestant(None, wording_of("the base", of_base))]
            for one, own in zip(found, known, strict=True):
                require_base(one, engine.spec)
                checked = engine.add_adapter(one.given, one.directory)
                wording, count = wording_of(one.name, own), checked.facts.num_virtual_tokens
                contestants.append(Contestant(one.given, wording, count, one.name, checked.method))
            encoder = TextTokenizer(engine.tokenizer, read_eos_token_ids(engine.tokenizer_dir))
            with _progress() as on_progress:
                try:
                    evaluation = evaluate(
                        engine,
                        encoder,
                        contestants,
                        self.rows.rows(used_by(contestants)),
                        normalization=self.normalization,
                        on_progress=on_progress,
                    )
                except GenerationFailed as error:
                    raise fail(str(error)) from error
        return _report(evaluation, contestants, self.normalization)

    def at_server(self, settings: Settings, names: Sequence[str]) -> dict[str, Any]:
        """Let a running server rank; the report."""
        from server.cli.evaluation import (
            evaluate_remotely,
            stored_contestant,
            stored_metadata,
            used_by,
        )

        with connect(settings) as backend:
            shown = [backend.adapter(name) for name in names]
            inherited = stored_metadata(shown[0]) if shown else {}
            contestants = [stored_contestant(None, {}, self.given, inherited)]
            for name, one in zip(names, shown, strict=True):
                contestants.append(stored_contestant(name, one, self.given, {}))
            with _progress() as on_progress:
                evaluation = evaluate_remotely(
                    backend.server,
                    contestants,
                    self.rows.rows(used_by(contestants)),
                    normalization=self.normalization,
                    on_progress=on_progress,
                )
        return _report(evaluation, contestants, self.normalization)


@contextmanager
def _engine(settings: Settings, num_adapters: int) -> Iterator[OfflineEngine]:
    from server.engine.offline import OfflineEngine

    engine = OfflineEngine(
        settings.base,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        max_running=settings.max_running,
        max_step_tokens=settings.max_step_tokens,
        kv_bytes=settings.kv_mib * MIB,
        host_bytes=settings.host_mib * MIB,
        scale_slots=max(settings.scale_slots, num_adapters),
    )
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on standard error, if that is a terminal."""
    if not err.is_terminal:
        yield lambda _done, _all: None
        return
    columns = (TextColumn("ranking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("ranking", total=None)
        yield lambda done, everything: bar.update(task, completed=done, total=everything)


# --- what is printed -------------------------------------------------------------------------


def _report(
    evaluation: Evaluation, contestants: Sequence[Contestant], normalization: str
) -> dict[str, Any]:
    results = [
        {
            "adapter": None if one.name is None else one.title,
            "method": one.method,
            "accuracy": result.scores.accuracy,
            "macro_f1": result.scores.macro_f1,
            "num_right": round(result.scores.accuracy * evaluation.num_rows),
            "labels": one.wording.labels,
        }
        for one, result in zip(contestants, evaluation.results, strict=True)
    ]
    return {
        "num_rows": evaluation.num_rows,
        "normalization": normalization,
        "seconds": round(evaluation.seconds, 3),
        "rows_per_second": round(evaluation.rows_per_second, 2),
        "results": results,
    }


def _print(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    table = Table("adapter", "method", "accuracy", "macro-F1", "right")
    for one in report["results"]:
        table.add_row(
            one["adapter"] or "(the base)",
            one["method"],
            share(one["accuracy"]),
            share(one["macro_f1"]),
            f"{one['num_right']} of {report['num_rows']}",
        )
    print_table(table)
    count = len(report["results"])
    print_line(
        f"{report['num_rows']} rows, {count} at once, in {report['seconds']:.1f} s: "
        f"{report['rows_per_second']:.1f} rows/s (a row counts for each of the {count})"
    )
