"""`graftwork bench`: load on a running server, and what its clients felt.

The load is `server.cli.load`'s; here are the options, and what is printed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from server.cli.options import (
    AsJson,
    api_key,
    require_url,
    takes_settings,
)
from server.cli.render import (
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
    from server.cli.load import Figures, LoadReport

_DEFAULT_CONCURRENCY = 8
EXIT_FOUND_FAILURE = 1
# Milliseconds without a decimal.
_ROUND_FROM = 100


def add_commands(app: typer.Typer) -> None:
    """Hang this file's command into the command line."""
    app.command()(bench)


@takes_settings("url")
def bench(
    *,
    settings: Settings,
    adapters: Annotated[
        str,
        typer.Option(
            "--adapters",
            metavar="A,B",
            help="Asked in turn, the base by its id. Left out: the base alone.",
        ),
    ] = "",
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "-c",
            min=1,
            help="Requests in flight; 8 if left out, and no limit with --rate.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", help="Requests a second on average, at random times (Poisson)."),
    ] = None,
    num_requests: Annotated[int, typer.Option("--num-requests", "-n", min=1, help="In all.")] = 100,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Of every prompt.")
    ] = 48,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Of every output, exactly.")
    ] = 64,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Requests an adapter sent first, uncounted.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and arrivals.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Put load on a running server, and measure what its clients feel.

    Tokens a second, time to the first token, time between tokens. Greedy
    streams of random words; the end of sequence is ignored, so that every
    output has the same length. Exit status 1 where requests failed.

    \b
    graftwork bench --url http://127.0.0.1:8000 --adapters complaints,refunds
    """
    from server.cli.load import LoadPlan, run_load

    url = require_url(settings, "bench")
    if rate is not None and not rate > 0:
        raise fail(f"--rate: expected more than 0 requests a second, came {rate}")
    names = tuple(name.strip() for name in adapters.split(",") if name.strip())
    if concurrency is None and rate is None:
        concurrency = _DEFAULT_CONCURRENCY
    plan = LoadPlan(
        url,
        names or (None,),
        num_requests=num_requests,
        concurrency=concurrency,
        rate=rate,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        warmup=warmup,
        seed=seed,
        api_key=api_key(settings),
    )
    with errors_as_lines(), err.status("sending requests"):
        report = run_load(plan)
    if as_json:
        shown = {name: value for name, value in asdict(plan).items() if name != "api_key"}
        print_json({"plan": shown, **asdict(report)})
    else:
        _print(report)
    for error, count in report.errors.items():
        say(f"[red]graftwork:[/red] {count} failed: {escape(error)}")
    if report.errors:
        raise typer.Exit(EXIT_FOUND_FAILURE)


def _print(report: LoadReport) -> None:
    table = Table(
        "adapter",
        "requests",
        "tokens/s",
        "first token, ms\np50 / p90 / p99",
        "between tokens, ms\np50 / p90 / p99",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for figures in report.by_adapter:
        table.add_row(Text(figures.adapter or "(the base)"), *_cells(figures))
    if len(report.by_adapter) > 1:
        table.add_section()
        table.add_row("all", *_cells(report.total))
    print_table(table)
    total = report.total
    print_line(
        f"{total.output_tokens} tokens of {total.num_requests} requests in {report.seconds:.1f} s: "
        f"{total.output_tokens_per_second:.1f} tokens/s, {total.requests_per_second:.2f} requests/s"
    )


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        str(figures.num_requests),
        f"{figures.output_tokens_per_second:.1f}",
        _spread(figures.ttft_ms),
        _spread(figures.itl_ms),
    )


def _spread(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return "-"
    figures = (spread[name] for name in ("p50", "p90", "p99"))
    return " / ".join(f"{one:.0f}" if one >= _ROUND_FROM else f"{one:.1f}" for one in figures)
