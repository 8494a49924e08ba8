"""`graftwork train`: rows of a file become an adapter, in this process or as a job of a server.

The job is what `POST /train` takes, with the same defaults. `server.cli.local_training` runs it here;
a PEFT folder needs no data directory, and an interrupted run goes on later, which no route offers.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from adapters.errors import TrainingDiverged
from adapters.field_errors import explain, listed
from adapters.template import Tokenization
from adapters.training.job import (
    METHOD_NAMES,
    HyperparameterRequest,
    IfExists,
    JobRequest,
    OnTooLong,
    method_name,
    why_no_method,
)
from adapters.training.shapes import Format
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
    merged_options,
    object_from,
    pairs_from,
)
from server.cli.options import (
    AsJson,
    Description,
    as_option,
    connect,
    prepare_base,
    takes_settings,
)
from server.cli.render import (
    EXIT_INTERRUPTED,
    as_typed,
    err,
    errors_as_lines,
    fail,
    print_json,
    print_line,
    print_table,
    say,
)
from server.config.settings import Settings

if TYPE_CHECKING:
    from adapters.training.loop import Trained
    from adapters.training.plan import Plan
    from adapters.training.provenance import Provenance
    from server.base.load import LoadedBase
    from server.cli.backend import Backend
    from server.cli.local_training import PartialRun
    from server.text.tokenizer import TextTokenizer

# A folder's name need not be an adapter's; the name in the recipe is only a note then.
_UNNAMED = "adapter"


def add_commands(app: typer.Typer) -> None:
    """Hang this file's command into the command line."""
    app.command()(train)


def _method(text: str) -> str:
    name: str = method_name(text)
    if name not in METHOD_NAMES:
        raise typer.BadParameter(
            f"expected {', '.join(METHOD_NAMES)}; came {text!r}{why_no_method(text)}"
        )
    return name


def _hyperparameter(flag: str, *others: str) -> Any:
    """The option of a field of `HyperparameterRequest`."""
    field = HyperparameterRequest.model_fields[flag[2:].replace("-", "_")]
    return typer.Option(flag, *others, help=f"{field.description} [default: the recipe's]")


@dataclass(frozen=True)
class _Outcome:
    """Where the result goes, and how it is printed.

    Attributes:
        out: the folder; None for none.
        name: the adapter's name in the data directory or at the server; None registers nothing.
        dry_run: nowhere: the job is only checked.
        resume: go on with an interrupted run.
        as_json: print JSON.
    """

    out: Path | None
    name: str | None
    dry_run: bool
    resume: bool
    as_json: bool


@takes_settings("url", "base", "revision", "base_name", "data_dir", "dtype", "device", "threads")
def train(
    *,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            parser=_method,
            help=f"How the adapter works: {', '.join(METHOD_NAMES)}.",
        ),
    ],
    data: Data,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The PEFT folder to make; must not be there, or be empty."
        ),
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(
            "--register",
            metavar="NAME",
            help="Publish it under this name in the data directory, or the server.",
        ),
    ] = None,
    shape: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="The shape of the rows, where their columns do not say it.",
            show_default=False,
        ),
    ] = None,
    template: TemplateOption = None,
    target: Target = None,
    labels: Labels = None,
    infer_labels: Annotated[
        bool,
        typer.Option(
            "--infer-labels/--no-infer-labels",
            help="Without --labels, take the target's values where they are few.",
        ),
    ] = True,
    label_name: LabelName = None,
    where: Where = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="JSON", help="PEFT's fields of the method, as an object."),
    ] = None,
    learning_rate: Annotated[float | None, _hyperparameter("--learning-rate", "--lr")] = None,
    epochs: Annotated[int | None, _hyperparameter("--epochs")] = None,
    max_steps: Annotated[int | None, _hyperparameter("--max-steps")] = None,
    batch_size: Annotated[int | None, _hyperparameter("--batch-size")] = None,
    seed: Annotated[int | None, _hyperparameter("--seed")] = None,
    validation_split: Annotated[
        float | None, typer.Option("--validation-split", help="Share of the rows held out.")
    ] = None,
    early_stopping_patience: Annotated[
        int | None,
        typer.Option(
            "--early-stopping-patience",
            help="Stop after so many epochs without a better evaluation, and keep the best.",
        ),
    ] = None,
    hyperparameters: Annotated[
        str | None,
        typer.Option(
            "--hyperparameters",
            metavar="JSON",
            help="More of them, as an object: gradient_accumulation_steps, warmup_ratio, "
            "lr_scheduler_type, optimizer, adam_epsilon, weight_decay, max_grad_norm.",
        ),
    ] = None,
    init_text: Annotated[
        str | None,
        typer.Option("--init-text", help="Start a prefix, or prompt tuning, from this text."),
    ] = None,
    context_examples: Annotated[
        int | None, typer.Option("--context-examples", help="CPT: examples in the context.")
    ] = None,
    context_seed: Annotated[
        int | None, typer.Option("--context-seed", help="CPT: which ones.")
    ] = None,
    train_on_context: Annotated[
        bool | None,
        typer.Option(
            "--train-on-context/--no-train-on-context",
            help="CPT: whether the rows of the context are trained on as well.",
            show_default=False,
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Tokens of a row at most.")
    ] = None,
    on_too_long: Annotated[
        OnTooLong, typer.Option("--on-too-long", help="Refuse longer rows, or cut the beginning.")
    ] = "error",
    target_separator: TargetSeparator = None,
    append_eos: AppendEos = None,
    tokenization: Annotated[
        Tokenization,
        typer.Option(
            "--tokenization",
            help="Where white space at the template's end goes: to the target, or it stays.",
        ),
    ] = "boundary",
    description: Description = None,
    if_exists: Annotated[
        IfExists, typer.Option("--if-exists", help="With --register, where the name is taken.")
    ] = "new_version",
    settings: Settings,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show three rows; train nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was interrupted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter from the rows of a file.

    Without --url it runs here. What is left out comes from the method's recipe.
    Ctrl-C writes a checkpoint into DIR.partial, and the same command with
    --resume goes on from there.

    \b
    graftwork train --method ia3 --data rows.jsonl --target label --out mine \\
      --template 'Tweet text : {text} Label :' --labels 'complaint,no complaint'
    """
    outcome = _Outcome(out_dir, register, dry_run, resume, as_json)
    with errors_as_lines():
        partial = None
        if settings.url is None:
            partial = _check_local(outcome)
        else:
            _check_remote(outcome)
        rows = DataFile(data, pairs_from("--where", where))
    request = _request(
        adapter=register or (out_dir.name if out_dir else "") or _UNNAMED,
        method=method,
        config=object_from("--config", config) or {},
        format=shape,
        template=template,
        target=target,
        labels=labels_from(labels),
        infer_labels=infer_labels,
        label_names=pairs_from("--label-name", label_name),
        target_separator=target_separator,
        append_eos=append_eos is not False,
        tokenization=tokenization,
        max_length=max_length,
        on_too_long=on_too_long,
        init_text=init_text,
        context_examples=context_examples,
        context_seed=context_seed,
        train_on_context=train_on_context,
        if_exists=if_exists,
        description=description,
        hyperparameters=merged_options(
            "--hyperparameters",
            hyperparameters,
            learning_rate=learning_rate,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            seed=seed,
            validation_split=validation_split,
            early_stopping_patience=early_stopping_patience,
        ),
    )
    with errors_as_lines(rows):
        _require_words(request, rows, data)
        if settings.url is None:
            _train_here(request, rows, settings, outcome, partial)
        else:
            _train_there(request, rows, settings, outcome)


# --- the request -----------------------------------------------------------------------------


def _require_words(request: JobRequest, rows: DataFile, path: Path) -> None:
    """Refuse rows of no known shape without a template and a target, before anything is loaded."""
    if request.format is not None or (request.template and request.target):
        return
    given = {"--template": request.template, "--target": request.target}
    missing = [option for option, value in given.items() if not value]
    if len(missing) < len(given) or not rows.has_known_shape():
        needed = "is needed" if len(missing) == 1 else "are needed"
        raise fail(
            f"{listed(missing)} {needed}; the columns of {path} are {rows.columns}, of no known shape "
            f"(--format){rows.header_hint}"
        )


def _request(**fields: Any) -> JobRequest:
    try:
        given = {name: value for name, value in fields.items() if value is not None}
        return JobRequest.model_validate(given)
    except ValidationError as error:
        raise fail(explain(error.errors(), JobRequest, as_option).message) from error


def _check_local(outcome: _Outcome) -> PartialRun | None:
    """The folder of the run; refuses what cannot be before anything is read."""
    from server.cli.local_training import PartialRun, check_out, partial_of

    if outcome.dry_run:
        return None
    if outcome.out is None and outcome.name is None:
        raise fail("expected --out DIR, --register NAME or both; came neither")
    if outcome.out is None:
        return None  # in the data directory, which is not known yet
    check_out(outcome.out)
    partial = PartialRun(partial_of(outcome.out))
    partial.check(resume=outcome.resume)
    return partial


def _check_remote(outcome: _Outcome) -> None:
    """Refuse what a server cannot do, before anything is read."""
    if outcome.name is None and not outcome.dry_run:
        raise fail("--url: expected --register NAME, the adapter's name at the server; came none")
    if outcome.resume:
        raise fail("--resume: a server goes on with its jobs by itself")


# --- as a job of a server --------------------------------------------------------------------


def _train_there(
    request: JobRequest, rows: DataFile, settings: Settings, outcome: _Outcome
) -> None:
    """Send the job and its rows, follow it to its end, and print the result."""
    began = time.monotonic()
    url = settings.url or ""
    selected = rows.selected() if rows.where else None
    with connect(settings) as backend:
        job = backend.train(request, rows.path, selected, dry_run=outcome.dry_run)
        if outcome.dry_run:
            _print_plan(job, as_json=outcome.as_json)
            return
        for warning in job["warnings"]:
            say(f"warning: {escape(as_typed(warning))}")
        say(f"{job['id']} is {job['state']} at {url}")
        job = _follow(backend, job["id"], url)
        if job["state"] != "succeeded":
            why = (job["error"] or {}).get("message", "it was cancelled by a request")
            raise fail(f"{job['id']} {job['state']}: {why}")
        name = f"{job['adapter']}@{job['adapter_version']}"
        if outcome.out is not None:
            backend.download(name, outcome.out)
    result = {
        "out": None if outcome.out is None else str(outcome.out),
        "registered": {"name": job["adapter"], "version": job["adapter_version"]},
        "job": job,
        "metrics": job["metrics"],
        "seconds": round(time.monotonic() - began, 3),
    }
    if outcome.as_json:
        print_json(result)
        return
    if warning := (job["metrics"] or {}).get("warning"):
        print_line(f"warning: {warning}")
    print_line(f"registered as {name} at {url}")
    if outcome.out is not None:
        print_line(f"written to {outcome.out}")


def _follow(backend: Backend, job_id: str, url: str) -> dict[str, Any]:
    """Show the events of a job until it has ended; the job."""
    from adapters.training.loop import TrainingEvent
    from server.cli.training_progress import TrainingProgress

    try:
        with TrainingProgress(err) as progress:
            for event in backend.job_events(job_id, 0, follow=True):
                progress(TrainingEvent(event["kind"], event["data"]))
    except KeyboardInterrupt:
        say(f"{job_id} goes on at {url}. Follow it, or end it, with:")
        say(f"graftwork jobs events {job_id} --follow --url {url}")
        say(f"graftwork jobs cancel {job_id} --url {url}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    return backend.job(job_id)


# --- in this process -------------------------------------------------------------------------


def _train_here(
    request: JobRequest,
    rows: DataFile,
    settings: Settings,
    outcome: _Outcome,
    partial: PartialRun | None,
) -> None:
    from adapters.training.plan import make_plan
    from server.api.training.training_data import Wish
    from server.cli.local_training import PartialRun
    from server.config.base_name import base_name

    wish = Wish.of(request)
    # Faults of the rows are found before the base is loaded, unless its chat template is needed.
    data = None if rows.is_chat(wish) else rows.read(wish, None)
    prepare_base(settings)
    name = base_name(settings)
    if outcome.name is not None and not outcome.dry_run:
        _require_free(request, settings, name)
        if partial is None:
            partial = PartialRun(settings.data_dir / f"{outcome.name}.partial")
            partial.check(resume=outcome.resume)
    base, tokenizer = _load(settings)
    data = data or rows.read(wish, tokenizer)
    with data.naming_places():
        plan = make_plan(
            data.resolve(request),
            data.rows,
            tokenizer,
            base.spec,
            base_name=name,
            prompts=data.prompts,
            notes=data.warnings,
        )
    if partial is None:
        from server.api.training.job_replies import Preview

        _print_plan(Preview.of(plan, data.facts).model_dump(mode="json"), as_json=outcome.as_json)
        return
    for warning in plan.job.warnings:
        say(f"warning: {escape(as_typed(warning))}")
    began = time.monotonic()
    partial.begin(plan.job, data.rows)
    trained = _run(plan, base, partial)
    _deliver(plan, trained, base, partial, settings, outcome, time.monotonic() - began)


def _require_free(request: JobRequest, settings: Settings, base_name: str) -> None:
    from server.store.registry import Registry

    settings.data_dir.mkdir(parents=True, exist_ok=True)
    registry = Registry(settings.data_dir, reserved=(base_name,))
    try:
        registry.require_free(request.adapter, create_only=request.if_exists == "error")
    finally:
        registry.close()


def _load(settings: Settings) -> tuple[LoadedBase, TextTokenizer]:
    import torch

    from server.base.load import load_base
    from server.base.tokenizer import load_tokenizer
    from server.text.tokenizer import TextTokenizer, read_eos_token_ids

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    base = load_base(
        settings.base,
        dtype=settings.dtype or settings.train_dtype,
        device=settings.device,
        revision=settings.revision,
    )
    directory = base.tokenizer_dir
    return base, TextTokenizer(load_tokenizer(directory), read_eos_token_ids(directory))


def _run(plan: Plan, base: LoadedBase, partial: PartialRun) -> Trained:
    from adapters.training.loop import Stopped
    from server.cli.local_training import run
    from server.cli.training_progress import TrainingProgress

    try:
        with TrainingProgress(err) as progress:
            return run(plan, base, partial, progress)
    except Stopped:
        again = [argument for argument in sys.argv[1:] if argument != "--resume"]
        command = shlex.join(["graftwork", *again, "--resume"])
        say(f"stopped; the checkpoint is in {partial.directory}. Go on with:")
        err.print(command, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except TrainingDiverged:
        partial.remove()  # going on from there would end the same way
        raise


def _deliver(
    plan: Plan,
    trained: Trained,
    base: LoadedBase,
    partial: PartialRun,
    settings: Settings,
    outcome: _Outcome,
    seconds: float,
) -> None:
    from adapters.training.provenance import Provenance

    provenance = Provenance.of_now(plan.job, trained.metrics)
    if outcome.out is not None:
        partial.finish(provenance, trained, Path.cwd() / outcome.out)
    registered = None
    if outcome.name is not None:
        registered = _publish(provenance, trained, base, settings, outcome.name)
    partial.remove()
    result = {
        "out": None if outcome.out is None else str(outcome.out),
        "registered": registered,
        "job": plan.job.model_dump(mode="json"),
        "metrics": trained.metrics,
        "seconds": round(seconds, 3),
    }
    if outcome.as_json:
        print_json(result)
    else:
        _print_result(result, settings)


def _publish(
    provenance: Provenance, trained: Trained, base: LoadedBase, settings: Settings, name: str
) -> dict[str, Any]:
    from server.config.base_name import base_name
    from server.store.registry import Registry

    reserved = base_name(settings)
    registry = Registry(settings.data_dir, reserved=(reserved,))
    try:
        with registry.staging_dir() as staged:
            trained.write(staged)
            published = registry.publish(
                name,
                staged,
                base.spec,
                provenance.metadata(),
                create_only=provenance.job.if_exists == "error",
                base_names=(reserved, settings.base),
            )
    finally:
        registry.close()
    record = published.record
    return {
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "created": published.created,
    }


# --- what is printed -------------------------------------------------------------------------


def _print_result(result: dict[str, Any], settings: Settings) -> None:
    from server.cli.training_progress import evaluation_text

    metrics = result["metrics"]
    print_line(f"{metrics['steps']} steps in {result['seconds']:.1f} s, loss {metrics['loss']:.3f}")
    if "evaluation" in metrics:
        print_line(evaluation_text(metrics["evaluation"]))
    if "warning" in metrics:
        print_line(f"warning: {metrics['warning']}")
    if (folder := result["out"]) is not None:
        base = _base_options(settings)
        add = shlex.join(["graftwork", "adapters", "add", folder, *base])
        print_line(f"written to {folder}; serve it with: {add}")
        if base:
            print_line(f"and: {shlex.join(['graftwork', 'serve', *base])}")
    if (one := result["registered"]) is not None:
        print_line(f"registered as {one['name']}@{one['version']} ({one['digest'][:12]})")


def _base_options(settings: Settings) -> list[str]:
    """What another command has to say so that it works on the same base."""
    if settings.is_default_base:
        return []
    revision = [] if settings.revision is None else ["--revision", settings.revision]
    return ["--base", str(settings.base), *revision]


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    options = {name: value for name, value in plan["hyperparameters"].items() if value is not None}
    data = plan["data"]
    what = [data["layout"], data["encoding"], data["separator"], f"format {plan['format']}"]
    facts = {
        "data": ", ".join(word for word in what if word),
        "columns": _columns(data),
        "template": "the base's chat template"
        if plan["prompts"] == "chat"
        else f"{plan['template']!r}, then {plan['target_separator']!r} and {plan['target']}",
        "method": f"{plan['method']}, {plan['trainable_params']:,} parameters",
        "rows": f"{plan['num_train']} to train on, {plan['num_held_out']} held out",
        "tokens a row": ", ".join(f"{name} {value:g}" for name, value in plan["lengths"].items()),
        "labels": ", ".join(repr(label) for label in plan["labels"] or ()) or "none",
        "hyperparameters": ", ".join(f"{name} {value}" for name, value in options.items()),
    }
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, value)
    print_table(table)
    for warning in plan["warnings"]:
        print_line(f"warning: {as_typed(warning)}")
    for row in plan["preview"]:
        tokens = "|".join("<special>" if text is None else text for text in row["tokens"])
        text = json.dumps(row["text"], ensure_ascii=False)
        print_line(f"row {row['row']} ({len(row['ids'])} tokens): {text}")
        print_line(f"  tokens: {tokens}")


def _columns(data: dict[str, Any]) -> str:
    used = ", ".join(data["columns_used"]) or "none"
    unused = ", ".join(data["columns_unused"])
    return f"{used}; not read: {unused}" if unused else used
