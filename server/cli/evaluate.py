"""`graftwork eval`: accuracy and macro-F1 of several adapters and the base, side by side.

Finds the adapters and the words that were stored with them, and prints. The ranking is
`server.cli.evaluation`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from server.cli.named_adapters import WORDS, FoundAdapter, find_adapters, require_base
from server.cli.options import (
    AsJson,
    Base,
    DataDir,
    Device,
    DtypeOption,
    Revision,
    Threads,
    Url,
    connect,
    place_from,
    prepare_base,
)
from server.cli.render import (
    err,
    errors_as_lines,
    fail,
    out,
    print_json,
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


def evaluate(
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
    url: Url = None,
    base: Base = None,
    revision: Revision = None,
    data_dir: DataDir = None,
    dtype: DtypeOption = None,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure adapters and the base on the rows of a file, all in one mixed batch.

    Template, labels and target column are those that were stored with each
    adapter; options take their place. The base gets those of the first adapter,
    without an end of sequence. A label's score is the log-likelihood of
    separator, label and, where the adapter learned it, end of sequence. With
    --url a running server ranks, by the separator that it has stored.

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
    given = {name: value for name, value in zip(WORDS, values, strict=True) if value is not None}
    with errors_as_lines():
        given |= _separator(given)
    settings, chosen = place_from(
        url,
        data_dir,
        base=base,
        revision=revision,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    names = [name.strip() for name in adapters.split(",") if name.strip()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise fail(f"--adapters: {', '.join(sorted(twice))} given twice")
    with errors_as_lines():
        rows = DataFile(data, pairs_from("--where", where))
        found = [] if chosen else find_adapters(names, settings)
    normalized = cast("Normalization", normalization)
    with errors_as_lines(rows):
        if chosen is not None:
            report = _evaluate_remotely(chosen, names, given, rows, normalized)
        else:
            prepare_base(settings)
            report = _evaluate(found, given, rows, settings, normalized)
    _print(report, as_json=as_json)


# --- words ----------------------------------------------------------------------------------


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


def _evaluate(
    found: Sequence[FoundAdapter],
    given: dict[str, Any],
    rows: DataFile,
    settings: Settings,
    normalization: Normalization,
) -> dict[str, Any]:
    from server.cli.evaluation import evaluate as evaluate_rows
    from server.engine.offline import GenerationFailed
    from server.text.tokenizer import TextTokenizer, read_eos_token_ids

    words = [{**one.words, **given} for one in found]
    # What a base was pretrained for does not end after a label.
    of_base = {**(words[0] if words else {}), "append_eos": False, **given}
    with _engine(settings, len(found)) as engine:
        methods = ["base"]
        contestants = [_contestant(None, "the base", of_base)]
        for one, own in zip(found, words, strict=True):
            require_base(one, engine.spec)
            checked = engine.add_adapter(one.given, one.directory)
            methods.append(checked.method)
            count = checked.facts.num_virtual_tokens
            contestants.append(_contestant(one.given, one.name, own, count))
        directory = engine.tokenizer_dir
        encoder = TextTokenizer(engine.tokenizer, read_eos_token_ids(directory))
        with _progress() as tell:
            try:
                evaluation = evaluate_rows(
                    engine,
                    encoder,
                    contestants,
                    rows.rows,
                    normalization=normalization,
                    on_progress=tell,
                )
            except GenerationFailed as error:
                raise fail(str(error)) from error
    names = ["base", *(one.name for one in found)]
    labels = [one.wording.labels for one in contestants]
    return _report(evaluation, names, methods, labels, normalization)


def _evaluate_remotely(
    url: str,
    names: Sequence[str],
    given: dict[str, Any],
    rows: DataFile,
    normalization: Normalization,
) -> dict[str, Any]:
    from server.cli.remote_evaluation import contestant_of, evaluate_remotely, stored_words

    with connect(url) as backend:
        shown = [backend.adapter(name) for name in names]
        inherited = stored_words(shown[0]) if shown else {}
        contestants = [contestant_of(None, {}, given, inherited)]
        for name, one in zip(names, shown, strict=True):
            contestants.append(contestant_of(name, one, given, {}))
        with _progress() as tell:
            evaluation = evaluate_remotely(
                backend.server,
                contestants,
                rows.rows,
                normalization=normalization,
                on_progress=tell,
            )
    columns = ([one.name for one in contestants], [one.method for one in contestants])
    return _report(evaluation, *columns, [one.labels for one in contestants], normalization)


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


def _contestant(
    engine_name: str | None, name: str, words: dict[str, Any], num_virtual_tokens: int = 0
) -> Contestant:
    from server.cli.evaluation import Contestant, Wording, require_words

    require_words(name, words)
    known = {key: value for key, value in words.items() if value is not None}
    return Contestant(engine_name, Wording(**known), num_virtual_tokens)


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
    evaluation: Evaluation,
    names: Sequence[str],
    methods: Sequence[str],
    labels: Sequence[list[str]],
    normalization: str,
) -> dict[str, Any]:
    results = [
        {
            "adapter": None if result.name is None else name,
            "method": method,
            "accuracy": result.scores.accuracy,
            "macro_f1": result.scores.macro_f1,
            "num_right": round(result.scores.accuracy * evaluation.num_rows),
            "labels": own,
        }
        for name, method, own, result in zip(
            names, methods, labels, evaluation.results, strict=True
        )
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
    out.print(
        f"{report['num_rows']} rows, {count} at once, in {report['seconds']:.1f} s: "
        f"{report['rows_per_second']:.1f} rows/s (a row counts for each of the {count})",
        highlight=False,
        soft_wrap=True,
    )
