"""`graftwork adapters combine` and `merge`: sums of adapters, and a base with one merged into it.

The arithmetic is `adapters.combine`'s and `adapters.merge`'s; here are the options, and what is printed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.cli.adapter_tables import print_record
from server.cli.data import labels_from
from server.cli.options import (
    AsJson,
    Description,
    connect,
    open_backend,
    prepare_base,
    takes_settings,
)
from server.cli.render import errors_as_lines, fail, print_json, print_line
from server.config.settings import Settings

CombinationType = Literal["linear", "delta"]
MergeDtype = Literal["float32", "bfloat16", "float16"]


def add_commands(adapters_app: typer.Typer) -> None:
    """Hang this file's commands into `graftwork adapters`."""
    adapters_app.command("combine")(combine_adapters)
    adapters_app.command("merge")(merge_adapter)


@takes_settings("url", "base", "revision", "data_dir")
def combine_adapters(
    *,
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME[@VERSION]:WEIGHT...", help="Adapters of one method, each with its weight."
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="Of the new adapter; not in use yet.")],
    combination_type: Annotated[
        CombinationType,
        typer.Option(
            "--combination-type",
            help="linear: PEFT's weighted sum, where a module that an IA3 adapter lacks counts 0. "
            "delta: for IA3, 1 + the weighted sum of distances from 1.",
        ),
    ] = "linear",
    template: Annotated[
        str | None,
        typer.Option("--template", help="Left out: that of the adapters, if they agree."),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels", metavar="A,B", help="Left out: those of the adapters, if they agree."
        ),
    ] = None,
    description: Description = None,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Register the weighted sum of adapters of one method.

    \b
    graftwork adapters combine complaints:0.7 refunds@2:0.3 --name both
    """
    weighted = [_weighted(part) for part in parts]
    options = {
        "combination_type": combination_type,
        "template": template,
        "labels": labels_from(labels),
        "description": description,
    }
    given = {key: value for key, value in options.items() if value is not None}
    with open_backend(settings, reads_base=True) as backend:
        record = backend.combine(weighted, name, **given)
    print_record(record, f"is the sum of {', '.join(parts)}", as_json=as_json)


@takes_settings("url", "base", "revision", "data_dir")
def merge_adapter(
    *,
    adapter: Annotated[
        str,
        typer.Argument(metavar="NAME[@VERSION]", help="An IA3 adapter, or a PEFT folder of one."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder of the new base; must not be there.")
    ],
    safe_merge: Annotated[
        bool, typer.Option("--safe-merge", help="Refuse weights that are not finite afterwards.")
    ] = False,
    dtype: Annotated[
        MergeDtype | None,
        typer.Option(
            "--dtype",
            help="Of all weights, changed before they are multiplied. Left out: as stored.",
        ),
    ] = None,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Multiply an IA3 adapter into its base, as PEFT merges it.

    What comes out is a stand-alone Hugging Face folder. The base is read here;
    with --url the adapter comes from there, and must be of the same base.

    \b
    graftwork adapters merge complaints-ia3 --out complaints-merged --safe-merge
    """
    from adapters.merge import merge_into_base

    with errors_as_lines():
        if out.exists():
            raise fail(f"--out {out} is there already; name a new folder")
        with _folder(adapter, settings) as (directory, name, base_digest):
            prepare_base(settings, needs_tokenizer=False)
            from server.base.load import load_base

            loaded = load_base(settings.base, revision=settings.revision, device="cpu")
            _require_base(name, base_digest, loaded.spec.digest)
            merged = merge_into_base(
                loaded.tokenizer_dir,
                directory,
                out,
                safe_merge=safe_merge,
                base=loaded.spec,
                dtype=dtype,
            )
    if as_json:
        print_json({"adapter": name, **asdict(merged), "directory": str(merged.directory)})
    else:
        print_line(
            f"{name} merged into {merged.num_modules} modules, {merged.num_bytes:,} bytes written to "
            f"{out}; serve it with: graftwork serve --base {out}"
        )


def _weighted(part: str) -> tuple[str, float]:
    reference, colon, weight = part.rpartition(":")
    try:
        if colon and reference:
            return reference, float(weight)
    except ValueError:
        pass
    raise fail(f"expected NAME:WEIGHT, such as complaints:0.5; came {part!r}")


@contextmanager
def _folder(adapter: str, settings: Settings) -> Iterator[tuple[Path, str, str | None]]:
    """The files of an adapter, what it is called, and the digest of the base it was trained on."""
    from server.cli.found_adapters import find_adapters

    if settings.url is None:
        found = find_adapters([adapter], settings)[0]
        yield found.directory, found.name, found.base_digest
        return
    with tempfile.TemporaryDirectory(prefix="graftwork-") as work, connect(settings) as backend:
        directory = Path(work) / "adapter"
        record = backend.download(adapter, directory)
        name = f"{record['name']}@{record['version']}"
        yield directory, name, backend.base_digest()


def _require_base(name: str, expected: str | None, came: str) -> None:
    from adapters.errors import BaseMismatch

    if expected not in (None, came):
        raise BaseMismatch(
            f"{name} belongs to another base (digest {str(expected)[:12]}) than --base ({came[:12]})",
            field="base",
            expected=expected,
            came=came,
        )
