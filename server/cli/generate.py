"""`graftwork generate`: prompts or rows in, texts out, from an engine of its own or a running server.

Where it comes from is `server.cli.generation_backends`'s; here are the options, and what is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from server.cli.data import errors_as_lines, object_from, pairs_from
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
    fail,
    place_from,
    prepare_base,
    print_json,
)

if TYPE_CHECKING:
    from server.cli.generation_backends import Ask, GenerationPlace
    from server.config.settings import Settings


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


def generate(
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
    top_k: Annotated[int | None, typer.Option("--top-k")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
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
    url: Url = None,
    base: Base = None,
    revision: Revision = None,
    data_dir: DataDir = None,
    dtype: DtypeOption = None,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Generate from prompts, a row, or the lines of standard input.

    With --url a running server does it; else an engine is started, which reads
    adapters from the data directory or from PEFT folders. With --json an object
    a line, in the order of the prompts.

    graftwork generate -a complaints --row 'text=My parcel never came.'
    graftwork generate -a complaints -p 'Tweet text : Lovely! Label :' --stream
    """
    if stream and as_json:
        raise fail("--stream and --json are both given; choose one of them")
    asks = _asks(prompt, pairs_from("--row", row))
    if stream and len(asks) > 1:
        raise fail(f"--stream is for one prompt; came {len(asks)}")
    named = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
    }
    wanted = _parameters(parameters, named)
    settings, chosen = place_from(
        url,
        data_dir,
        base=base,
        revision=revision,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    with _errors_as_lines(), _opened(settings, chosen, adapter) as place:
        if stream:
            _stream(place, asks[0], wanted)
        else:
            _print_all(place, asks, wanted, adapter, as_json=as_json)


def _asks(prompts: list[str] | None, row: dict[str, str] | None) -> list[Ask]:
    from server.cli.generation_backends import Ask

    if prompts and row is not None:
        raise fail("--prompt and --row are both given; choose one of them")
    if row is not None:
        return [Ask(row=row)]
    if not prompts and not sys.stdin.isatty():
        prompts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise fail("expected --prompt, --row or lines on standard input; came none")
    return [Ask(prompt=prompt) for prompt in prompts]


def _parameters(text: str | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """TGI's parameters, checked; exits with a sentence on one that cannot be."""
    from server.api.error_replies import describe_validation
    from server.api.schemas import GenerateParameters

    given = {name: value for name, value in named.items() if value is not None}
    others = object_from("--parameters", text) or {}
    for name in others:
        if name in given:
            raise fail(f"{name} is given twice: by its own option and in --parameters")
        if name not in GenerateParameters.model_fields or name in _OF_THE_REPLY:
            raise fail(f"--parameters: {name!r} is none that says how to choose tokens")
    try:
        GenerateParameters.model_validate({**others, **given})
    except ValidationError as error:
        raise fail(describe_validation(error.errors(include_url=False)).message) from error
    return {**others, **given}


@contextmanager
def _opened(settings: Settings, url: str | None, adapter: str | None) -> Iterator[GenerationPlace]:
    from server.cli.generation_backends import LocalGeneration, RemoteGeneration
    from server.cli.named_adapters import find_adapters

    place: GenerationPlace
    if url is not None:
        if adapter is not None and Path(adapter).is_dir() and "/" in adapter:
            raise fail(f"--adapter {adapter} is a folder; add it to the server first")
        place = RemoteGeneration(connect(url), adapter)
    else:
        found = find_adapters([] if adapter is None else [adapter], settings)
        prepare_base(settings)
        place = LocalGeneration(settings, found[0] if found else None)
    try:
        yield place
    finally:
        place.close()


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    """As `errors_as_lines`, for what an engine may say as well."""
    from server.engine.client import EngineError

    with errors_as_lines():
        try:
            yield
        except EngineError as error:
            raise fail(str(error)) from error


def _stream(place: GenerationPlace, ask: Ask, parameters: dict[str, Any]) -> None:
    for piece in place.pieces(ask, parameters):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo("")


def _print_all(
    place: GenerationPlace,
    asks: list[Ask],
    parameters: dict[str, Any],
    adapter: str | None,
    *,
    as_json: bool,
) -> None:
    for ask, answer in zip(asks, place.answers(asks, parameters), strict=True):
        if as_json:
            asked = {name: value for name, value in asdict(ask).items() if value is not None}
            said = asdict(answer)
            text = said.pop("text")
            print_json({"adapter": adapter, **asked, "generated_text": text, **said})
        else:
            typer.echo(answer.text)
