"""`graftwork adapters`: look at adapters, add and remove them, in a data directory or a server.

`server.cli.backend` does the work; here are the options, and what is printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.field_errors import listed
from server.cli.adapter_folders import AdapterPlace, RefusedPath, find_places
from server.cli.adapter_tables import EXPENDABLE, details_of, print_added, print_record, table_of
from server.cli.command_group import CommandGroup
from server.cli.data import labels_from
from server.cli.options import (
    AsJson,
    Description,
    open_backend,
    require_url,
    takes_settings,
)
from server.cli.render import (
    EXIT_FOUND_FAILURE,
    err,
    errors_as_lines,
    fail,
    print_json,
    print_line,
    print_table,
    warn,
)
from server.config.settings import Settings

if TYPE_CHECKING:
    from server.cli.backend import AdapterFiles, Backend

adapters_app = typer.Typer(
    cls=CommandGroup,
    help="List, show, add, remove, download and combine adapters.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter.")]
Reference = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION]", help="An adapter; NAME@ALIAS works as well.")
]
Version = Annotated[int, typer.Argument(metavar="VERSION", min=1, help="One of its versions.")]


@adapters_app.command("list")
@takes_settings("url", "data_dir")
def list_adapters(*, settings: Settings, as_json: AsJson = False) -> None:
    """List adapters, each at the version that its bare name means.

    \b
    graftwork adapters list --url http://127.0.0.1:8000
    """
    with open_backend(settings) as backend:
        records = backend.adapters()
    if as_json:
        print_json(records)
        return
    print_table(table_of(records), expendable=EXPENDABLE)


@adapters_app.command("show")
@takes_settings("url", "data_dir")
def show_adapter(reference: Reference, *, settings: Settings, as_json: AsJson = False) -> None:
    """Show an adapter: method, template, recipe, metrics, versions.

    \b
    graftwork adapters show complaints@2
    """
    with open_backend(settings) as backend:
        shown = backend.adapter(reference)
    if as_json:
        print_json(shown)
    else:
        print_table(details_of(shown))


@adapters_app.command("add")
@takes_settings("url", "base", "revision", "data_dir")
def add_adapters(
    *,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Folders that PEFT saved, a .zip or .tar of one, or a folder of several.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Its name, of one folder; left out, that of the folder."),
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="Template of its prompts.")
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            metavar="A,B",
            help="What it may answer: once with commas, or once for each label.",
        ),
    ] = None,
    description: Description = None,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Register PEFT folders, with the checks of an upload.

    A folder of such folders adds them all; one of checkpoints asks which. A
    folder that is refused does not stop the others; the exit status is 1
    then, and 2 where there was only one. Template, labels and recipe of a
    folder that graftwork train made are taken from it; an upload to a server
    has no place for the recipe.

    \b
    graftwork adapters add out/complaints
    graftwork adapters add adapters/* --url http://127.0.0.1:8000
    """
    with errors_as_lines():
        places = find_places(paths, name)
        _require_default_base(places, settings)
    _say_what_was_found(paths, places)
    options = {"template": template, "labels": labels_from(labels), "description": description}
    given = {key: value for key, value in options.items() if value is not None}
    with open_backend(settings, create=True, reads_base=True) as backend:
        if len(places) == 1:
            results = [_added(backend, places[0], given)]
        else:
            results = [_added_or_not(backend, place, given) for place in places]
    if as_json:
        print_json(results)
    else:
        printed: set[str] = set()
        for one in results:
            print_added(one, printed)
    if any("error" in one for one in results):
        raise typer.Exit(EXIT_FOUND_FAILURE)


@adapters_app.command("remove")
@takes_settings("url", "data_dir")
def remove_adapter(
    *,
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Remove an adapter, or one version of it.

    Requests that run keep theirs to the end.

    \b
    graftwork adapters remove complaints@1 --yes
    """
    with open_backend(settings) as backend:
        shown = backend.adapter(reference)
        whole = "@" not in reference
        count = len(shown["versions"])
        what = f"{shown['name']} with its {count} version{'s' * (count != 1)}"
        if not whole:
            what = f"{shown['name']}@{shown['version']}"
        _confirm(f"Remove {what}?", yes=yes)
        gone = backend.remove(shown["name"], None if whole else shown["version"])
    if as_json:
        print_json(gone)
    else:
        listed = ", ".join(f"{gone['name']}@{one}" for one in gone["deleted_versions"])
        print_line(f"removed {listed}")


@adapters_app.command("rollback")
@takes_settings("url", "data_dir")
def rollback_adapter(
    *,
    name: Name,
    version: Version,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Make a bare name mean an older version.

    Until the next new version is published.

    \b
    graftwork adapters rollback complaints 1
    """
    with open_backend(settings) as backend:
        record = backend.rollback(name, version)
    print_record(record, "is what a bare name means now", as_json=as_json)


@adapters_app.command("alias")
@takes_settings("url", "data_dir")
def set_alias(
    *,
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The new name, such as stable.")],
    version: Annotated[
        int | None, typer.Argument(metavar="[VERSION]", min=1, help="One of its versions.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the alias; its version stays.")
    ] = False,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Name a version (NAME@ALIAS), or move or remove the name.

    \b
    graftwork adapters alias complaints stable 2
    graftwork adapters alias complaints stable --remove
    """
    if remove is (version is not None):
        raise fail(
            f"expected a version that {name}@{alias} is to mean, or --remove; came "
            + ("both" if remove else "neither")
        )
    with open_backend(settings) as backend:
        if version is None:
            record, now = backend.remove_alias(name, alias), f"is {name}@{alias} no longer"
        else:
            record, now = backend.set_alias(name, alias, version), f"is {name}@{alias} now"
    print_record(record, now, as_json=as_json)


@adapters_app.command("download")
@takes_settings("url", "data_dir")
def download_adapter(
    *,
    reference: Reference,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="A folder that is not there or empty, or a new .zip."),
    ],
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Write the PEFT folder of an adapter, or a zip of it.

    \b
    graftwork adapters download complaints@2 --out complaints
    """
    with open_backend(settings) as backend:
        record = backend.download(reference, out)
    if as_json:
        print_json({**record, "out": str(out)})
    else:
        print_line(f"{record['name']}@{record['version']} written to {out}")


@adapters_app.command("preload")
@takes_settings("url")
def preload_adapter(reference: Reference, *, settings: Settings, as_json: AsJson = False) -> None:
    """Bring an adapter to the device of a running server.

    Ahead of its first request, which then need not wait for it.

    \b
    graftwork adapters preload complaints --url http://127.0.0.1:8000
    """
    _move(reference, "preload", "is on its way to the device", settings, as_json=as_json)


@adapters_app.command("unload")
@takes_settings("url")
def unload_adapter(reference: Reference, *, settings: Settings, as_json: AsJson = False) -> None:
    """Let an adapter leave the device of a running server.

    The adapter stays, and loads again with its next request.

    \b
    graftwork adapters unload complaints --url http://127.0.0.1:8000
    """
    _move(
        reference, "unload", "leaves the device once no request uses it", settings, as_json=as_json
    )


def _move(
    reference: str, direction: str, remark: str, settings: Settings, *, as_json: bool
) -> None:
    require_url(settings, direction, "; a data directory has no device")
    with open_backend(settings) as backend:
        record = backend.move(reference, direction)
    print_record(record, remark, as_json=as_json)


# --- add --------------------------------------------------------------------------------------


def _say_what_was_found(
    paths: Sequence[Path], places: Sequence[AdapterPlace | RefusedPath]
) -> None:
    """What a folder of folders holds, and names that are not their folder's."""
    added = [one for one in places if isinstance(one, AdapterPlace)]
    if len(added) > len(paths):
        names = listed([one.name for one in added])
        warn(f"found {len(added)} adapters: {names}", "yellow")
    for one in added:
        if one.title is not None:
            warn(f"{one.path} is named {one.name}, after {one.title!r}", "yellow")


def _require_default_base(places: Sequence[AdapterPlace | RefusedPath], settings: Settings) -> None:
    """Refuse folders of another base before the default one is fetched and made for them.

    Raises:
        BaseMismatch: none of them can be added to it.
    """
    from adapters.errors import BaseMismatch, ConfigInvalid
    from adapters.training.provenance import read_provenance
    from server.base.convert import DEFAULT_BASE_DIGEST, is_prepared

    if settings.url is not None or not settings.is_default_base or is_prepared(Path(settings.base)):
        return
    refused: list[BaseMismatch] = []
    for place in places:
        try:
            provenance = read_provenance(place.path) if place.path.is_dir() else None
            if provenance is not None:
                provenance.metadata().require_digest(DEFAULT_BASE_DIGEST)
        except BaseMismatch as error:
            refused.append(error)
        except ConfigInvalid:
            continue  # refused when it is added
    if refused and len(refused) == len(places):
        raise refused[0]


def _source(place: AdapterPlace, given: Mapping[str, Any]) -> AdapterFiles:
    from adapters.template import Template
    from adapters.training.provenance import read_provenance
    from server.cli.backend import AdapterFiles

    path = place.path
    provenance = read_provenance(path) if path.is_dir() else None
    metadata = {} if provenance is None else {**vars(provenance.metadata())}
    if "template" in given:
        # White space at a template's end is its separator, as in an upload and in training.
        dropped = Template.parse(given["template"]).dropped
        metadata |= {"target_separator": dropped} if dropped else {}
    if place.title is not None and metadata.get("description") is None:
        metadata["description"] = place.title
    return AdapterFiles(path, place.name, {**metadata, **given})


def _added(
    backend: Backend, place: AdapterPlace | RefusedPath, given: Mapping[str, Any]
) -> dict[str, Any]:
    if isinstance(place, RefusedPath):
        return {"path": str(place.path), "error": place.error}
    return {"path": str(place.path), **backend.add(_source(place, given))}


def _added_or_not(
    backend: Backend, place: AdapterPlace | RefusedPath, given: Mapping[str, Any]
) -> dict[str, Any]:
    from adapters.errors import AdapterError
    from server.cli.http_client import ServerRefused

    try:
        return _added(backend, place, given)
    except (AdapterError, ServerRefused) as error:
        return {"path": str(place.path), "error": error.message}
    except OSError as error:
        return {"path": str(place.path), "error": error.strerror or str(error)}


def _confirm(question: str, *, yes: bool) -> None:
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        raise fail("no answer came; say --yes to remove without a question") from None
    if not agreed:
        err.print("nothing was removed")
        raise typer.Exit(EXIT_FOUND_FAILURE)
