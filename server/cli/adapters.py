"""`graftwork adapters`: look at adapters, add and remove them, in a data directory or a server.

What is done is `server.cli.adapter_backends`'s; here are the options, and what is printed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.adapter_tables import details_of, table_of, tell_added, tell_record
from server.cli.data import errors_as_lines, labels_from
from server.cli.options import (
    AsJson,
    Base,
    DataDir,
    Revision,
    Url,
    connect,
    err,
    fail,
    place_from,
    prepare_base,
    print_json,
    print_table,
    tell,
)

if TYPE_CHECKING:
    from server.cli.adapter_backends import AdapterPlace, Source
    from server.config.settings import Settings

EXIT_FOUND_FAILURE = 1

adapters_app = typer.Typer(
    help="Look at adapters, add and remove them: in a data directory, or in a running server.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter.")]
Reference = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION]", help="An adapter; NAME@ALIAS works as well.")
]
Version = Annotated[int, typer.Argument(metavar="VERSION", min=1, help="One of its versions.")]


@adapters_app.command("list")
def list_adapters(url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List adapters, each at the version that its bare name means.

    graftwork adapters list --url http://127.0.0.1:8000
    """
    with adapter_place(url, data_dir) as place:
        records = place.list()
    if as_json:
        print_json(records)
        return
    print_table(table_of(records))


@adapters_app.command("show")
def show_adapter(
    reference: Reference, url: Url = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Show an adapter: method, template, recipe, metrics, versions and aliases.

    graftwork adapters show complaints@2
    """
    with adapter_place(url, data_dir) as place:
        shown = place.show(reference)
    if as_json:
        print_json(shown)
    else:
        print_table(details_of(shown))


@adapters_app.command("add")
def add_adapters(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders that PEFT saved, or a .zip or .tar of one."),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Its name, of one folder; left out, the folder's."),
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
    description: Annotated[str | None, typer.Option("--description")] = None,
    url: Url = None,
    base: Base = None,
    revision: Revision = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Register PEFT folders, with the checks of an upload.

    A folder that is refused does not stop the others; the exit status is 1
    then, and 2 where there was only one. Template, labels and recipe of a
    folder that graftwork train made are taken from it; a server is not told the
    recipe, for which an upload has no place.

    graftwork adapters add out/complaints
    graftwork adapters add adapters/* --url http://127.0.0.1:8000
    """
    if name is not None and len(paths) > 1:
        raise fail(f"--name is for one folder; came {len(paths)}, which are named by their own")
    said = {"template": template, "labels": labels_from(labels), "description": description}
    given = {key: value for key, value in said.items() if value is not None}
    with adapter_place(
        url, data_dir, base=base, revision=revision, fills=True, needs_base=True
    ) as place:
        if len(paths) == 1:
            results = [_added(place, paths[0], name, given)]
        else:
            results = [_added_or_not(place, path, given) for path in paths]
    if as_json:
        print_json(results)
    else:
        for one in results:
            tell_added(one)
    if any("error" in one for one in results):
        raise typer.Exit(EXIT_FOUND_FAILURE)


@adapters_app.command("remove")
def remove_adapter(
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Remove an adapter, or one version of it.

    Requests that run keep theirs to the end.

    graftwork adapters remove complaints@1 --yes
    """
    with adapter_place(url, data_dir) as place:
        shown = place.show(reference)
        whole = "@" not in reference
        count = len(shown["versions"])
        what = f"{shown['name']} with its {count} version{'s' * (count != 1)}"
        if not whole:
            what = f"{shown['name']}@{shown['version']}"
        _confirm(f"Remove {what}?", yes=yes)
        gone = place.remove(shown["name"], None if whole else shown["version"])
    if as_json:
        print_json(gone)
    else:
        listed = ", ".join(f"{gone['name']}@{one}" for one in gone["deleted_versions"])
        tell(f"removed {listed}")


@adapters_app.command("rollback")
def rollback_adapter(
    name: Name,
    version: Version,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a bare name mean an older version, until the next new one is published.

    graftwork adapters rollback complaints 1
    """
    with adapter_place(url, data_dir) as place:
        record = place.rollback(name, version)
    tell_record(record, "is what a bare name means now", as_json=as_json)


@adapters_app.command("alias")
def set_alias(
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The new name, such as stable.")],
    version: Version,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Name a version: NAME@ALIAS means it then; or move an alias.

    graftwork adapters alias complaints stable 2
    """
    with adapter_place(url, data_dir) as place:
        record = place.set_alias(name, alias, version)
    tell_record(record, f"is {name}@{alias} now", as_json=as_json)


@adapters_app.command("download")
def download_adapter(
    reference: Reference,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="A folder that is not there or empty, or a new .zip."),
    ],
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Write the PEFT folder of an adapter, or a zip of it.

    graftwork adapters download complaints@2 --out complaints
    """
    from server.cli.adapter_backends import download_to

    with adapter_place(url, data_dir) as place:
        record = download_to(place, reference, out)
    if as_json:
        print_json({**record, "out": str(out)})
    else:
        tell(f"{record['name']}@{record['version']} written to {out}")


@adapters_app.command("preload")
def preload_adapter(reference: Reference, url: Url = None, as_json: AsJson = False) -> None:
    """Bring an adapter to the device of a running server before it is asked for.

    graftwork adapters preload complaints --url http://127.0.0.1:8000
    """
    _move(reference, "preload", "is on its way to the device", url, as_json=as_json)


@adapters_app.command("unload")
def unload_adapter(reference: Reference, url: Url = None, as_json: AsJson = False) -> None:
    """Let an adapter leave the device of a running server.

    The adapter stays, and loads again when it is asked for.

    graftwork adapters unload complaints --url http://127.0.0.1:8000
    """
    _move(reference, "unload", "leaves the device once no request uses it", url, as_json=as_json)


# --- where ------------------------------------------------------------------------------------


@contextmanager
def adapter_place(
    url: str | None,
    data_dir: Path | None,
    *,
    fills: bool = False,
    needs_base: bool = False,
    **given: Any,
) -> Iterator[AdapterPlace]:
    """The data directory or the server that is meant; refusals end the command with one line.

    Args:
        url: the option.
        data_dir: the option.
        fills: whether the directory is made if it is not there.
        needs_base: whether the default base is.
        given: other options that are settings.
    """
    settings, chosen = place_from(url, data_dir, **given)
    if chosen is None and needs_base:
        prepare_base(settings)
    with errors_as_lines():
        place = _open(settings, chosen, fills=fills)
        try:
            yield place
        finally:
            place.close()


def _open(settings: Settings, url: str | None, *, fills: bool) -> AdapterPlace:
    from server.cli.local_adapters import DataDirectory
    from server.cli.remote_adapters import RunningServer

    if url is None:
        return DataDirectory(settings, create=fills)
    return RunningServer(connect(url))


def _move(reference: str, where: str, said: str, url: str | None, *, as_json: bool) -> None:
    from server.cli.remote_adapters import RunningServer

    _, chosen = place_from(url, None)
    if chosen is None:
        raise fail(
            f"{where} needs a running server: --url http://127.0.0.1:8000, or GRAFTWORK_URL; a data "
            "directory has no device"
        )
    with errors_as_lines(), connect(chosen) as server:
        record = RunningServer(server).move(reference, where)
    tell_record(record, said, as_json=as_json)


# --- add --------------------------------------------------------------------------------------


def _source(path: Path, name: str | None, given: Mapping[str, Any]) -> Source:
    from adapters.template import Template
    from server.cli.adapter_backends import Source, read_words

    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "expected a folder that PEFT saved", str(path))
    provenance = read_words(path)
    words = {} if provenance is None else {**vars(provenance.metadata())}
    if "template" in given:
        # White space at a template's end is its separator, as in an upload and in training.
        dropped = Template.parse(given["template"]).dropped
        words |= {"target_separator": dropped} if dropped else {}
    own = path.resolve().name if path.is_dir() else path.name.split(".")[0]
    return Source(path, name or own, {**words, **given})


def _added(
    place: AdapterPlace, path: Path, name: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    return {"path": str(path), **place.add(_source(path, name, given))}


def _added_or_not(place: AdapterPlace, path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    from adapters.errors import AdapterError
    from server.cli.http_client import ServerRefused

    try:
        return _added(place, path, None, given)
    except (AdapterError, ServerRefused) as error:
        return {"path": str(path), "error": error.message}
    except OSError as error:
        return {"path": str(path), "error": error.strerror or str(error)}


def _confirm(question: str, *, yes: bool) -> None:
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        raise fail("nobody answered; say --yes to remove without a question") from None
    if not agreed:
        err.print("nothing was removed")
        raise typer.Exit(EXIT_FOUND_FAILURE)
