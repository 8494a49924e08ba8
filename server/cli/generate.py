"""`graftwork generate`: prompts or rows in, texts out, from an engine of its own or a running server.

`server.cli.backend` generates; here are the options, and what is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from server.cli.data import merged_options, pairs_from
from server.cli.options import (
    AsJson,
    as_option,
    connect,
    prepare_base,
    takes_settings,
)
from server.cli.render import errors_as_lines, fail, print_json
from server.config.settings import Settings

if TYPE_CHECKING:
    from server.cli.backend import Backend, GenerationInput

# Parameters of /generate that say what else a reply holds, or whose it is.
_OF_THE_REPLY = frozenset(
    {
        "adapter_id",
        "best_of",
        "decoder_input_details",
        "details",
        "return_full_text",
        "top_n_tokens",
    }
)


def add_commands(app: typer.Typer) -> None:
    """Hang this file's command into the command line."""
    app.command()(generate)


@takes_settings("url", "base", "revision", "data_dir", "dtype", "device", "threads")
def generate(
    *,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME[@VERSION]",
            help="An adapter; without a server a PEFT folder as well. Left out: the base.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            "--row",
            metavar="COLUMN=VALUE",
            help="A row for the adapter's own template; once for each column.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Tokens at most; 64 if left out.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Sample. Left out, with top-k and top-p: greedy."),
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Of so many tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Keep the likeliest tokens of this probability together."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what is sampled.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends the output; repeatable.")
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            "--parameters",
            metavar="JSON",
            help="More of /generate's parameters, as an object, such as repetition_penalty.",
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print tokens as they come; of one prompt.")
    ] = False,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Generate from prompts, a row, or the lines of standard input.

    With --url a running server does it; else an engine is started, which reads
    adapters from the data directory or from PEFT folders. With --json an object
    a line, in the order of the prompts.

    \b
    graftwork generate -a complaints --row 'text=My parcel never came.'
    graftwork generate -a complaints -p 'Tweet text : Lovely! Label :' --stream
    """
    if stream and as_json:
        raise fail("--stream and --json are both given; choose one of them")
    prompts = _prompts(prompt, pairs_from("--row", row))
    if stream and len(prompts) > 1:
        raise fail(f"--stream is for one prompt; came {len(prompts)}")
    chosen_parameters = merged_options(
        "--parameters",
        parameters,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    _check_parameters(chosen_parameters)
    with errors_as_lines(), _opened(settings, adapter) as backend:
        if stream:
            for piece in backend.pieces(adapter, prompts[0], chosen_parameters):
                typer.echo(piece, nl=False)
                sys.stdout.flush()
            typer.echo("")
            return
        answers = backend.answers(adapter, prompts, chosen_parameters)
        for one, answer in zip(prompts, answers, strict=True):
            if as_json:
                shown = asdict(answer)
                text = shown.pop("text")
                print_json({"adapter": adapter, **_shown(one), "generated_text": text, **shown})
            else:
                typer.echo(answer.text)


def _prompts(texts: list[str] | None, row: dict[str, str] | None) -> list[GenerationInput]:
    from server.cli.backend import GenerationInput

    if texts and row is not None:
        raise fail("--prompt and --row are both given; choose one of them")
    if row is not None:
        return [GenerationInput(row=row)]
    if not texts and not sys.stdin.isatty():
        texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        raise fail("expected --prompt, --row or lines on standard input; came none")
    return [GenerationInput(text) for text in texts]


def _shown(prompt: GenerationInput) -> dict[str, Any]:
    return {"prompt": prompt.text} if prompt.row is None else {"row": prompt.row}


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Exit with a sentence where the parameters are none of TGI's that choose tokens."""
    from adapters.field_errors import explain, unknown_name
    from server.api.schemas import GenerateParameters

    for name in parameters:
        if name not in GenerateParameters.model_fields or name in _OF_THE_REPLY:
            known = [one for one in GenerateParameters.model_fields if one not in _OF_THE_REPLY]
            raise fail(f"--parameters: {unknown_name(name, known, 'parameter')}")
    try:
        GenerateParameters.model_validate(parameters)
    except ValidationError as error:
        raise fail(explain(error.errors(), GenerateParameters, as_option).message) from error


def _opened(settings: Settings, adapter: str | None) -> Backend:
    if settings.url is not None:
        if adapter is not None and Path(adapter).is_dir() and "/" in adapter:
            raise fail(f"--adapter {adapter} is a folder; add it to the server first")
        return connect(settings)
    from server.cli.found_adapters import find_adapters
    from server.cli.in_process import PrivateEngine

    found = find_adapters([] if adapter is None else [adapter], settings)
    prepare_base(settings)
    return PrivateEngine(settings, found[0] if found else None)
