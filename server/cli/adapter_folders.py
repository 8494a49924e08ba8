"""Which adapters are meant by a path on a command line: a PEFT folder, an archive, or a folder of several.

Looks at names of files only, one level deep. Prints nothing and reads no adapter.
"""

from __future__ import annotations

import difflib
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adapters.errors import FileSetInvalid, NameInvalid
from adapters.field_errors import listed
from server.store.adapter_names import check_name, is_name, slug_of

CONFIG_FILE = "adapter_config.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz")
_MANY = 6


@dataclass(frozen=True)
class AdapterPlace:
    """One adapter that is to be added.

    Attributes:
        path: a PEFT folder or an archive.
        name: the adapter's name.
        title: what it is called on this machine; None if that is the name.
    """

    path: Path
    name: str
    title: str | None = None


@dataclass(frozen=True)
class RefusedPath:
    """A path that means no adapter, with the reason."""

    path: Path
    error: str


def find_places(paths: Sequence[Path], name: str | None) -> list[AdapterPlace | RefusedPath]:
    """Every adapter that the paths mean, in their order.

    Args:
        paths: PEFT folders, archives, folders of PEFT folders, or a file of a PEFT folder.
        name: for the one adapter; None names each after its folder.

    Returns:
        Among several paths, one that means no adapter is a `RefusedPath`.

    Raises:
        FileSetInvalid: the one path is not there, holds no adapter, or several checkpoints.
        NameInvalid: `name` is none, or stands for several; two folders have the same name.
    """
    if name is not None:
        check_name(name)
    found = list(_each(paths))
    if name is not None:
        if len(found) > 1:
            raise NameInvalid(
                f"--name is for one folder; came {len(found)}: "
                f"{_some([str(one.path) for one in found])}, which are named by their own",
                field="name",
            )
        return [AdapterPlace(found[0].path, name)]
    _check_distinct([one for one in found if isinstance(one, AdapterPlace)])
    return found


def _each(paths: Sequence[Path]) -> Iterator[AdapterPlace | RefusedPath]:
    for path in paths:
        try:
            yield from _places(path)
        except (FileSetInvalid, NameInvalid) as error:
            if len(paths) == 1:
                raise
            yield RefusedPath(path, error.message)


def _check_distinct(places: Sequence[AdapterPlace]) -> None:
    by_name: dict[str, Path] = {}
    for one in places:
        other = by_name.setdefault(one.name, one.path)
        if other.resolve() != one.path.resolve():
            raise NameInvalid(
                f"{other} and {one.path} would both be named {one.name!r}; add them one by one, "
                "with --name",
                field="name",
                came=one.name,
            )


def _places(path: Path) -> Iterator[AdapterPlace | RefusedPath]:
    if not path.exists():
        raise FileSetInvalid(
            f"{path}: expected a folder that PEFT saved; there is no such file or folder{_near(path)}",
            field="path",
        )
    if path.is_file() and path.suffix not in _ARCHIVES and (path.parent / CONFIG_FILE).is_file():
        path = path.parent  # one of its files was named
    _refuse_several(path)
    if path.is_file() or (path / CONFIG_FILE).is_file():
        yield _named(path, path)
        return
    inside = sorted(one.parent for one in path.glob(f"*/{CONFIG_FILE}"))
    checkpoints = [one for one in inside if _CHECKPOINT.fullmatch(one.name)]
    others = [one for one in inside if one not in checkpoints]
    if others:
        yield from (_named(one, one) for one in others)
        yield from _without_config(path)
    elif len(checkpoints) == 1:
        yield _named(checkpoints[0], path)
    elif checkpoints:
        checkpoints.sort(key=lambda one: int(one.name.rpartition("-")[2]))
        last, named = checkpoints[-1], slug_of(path.resolve().name) or "NAME"
        raise FileSetInvalid(
            f"{path} holds {len(checkpoints)} checkpoints of one adapter: "
            f"{_some([one.name for one in checkpoints])}; add one of them, such as the last: "
            f"graftwork adapters add {last} --name {named}",
            field="path",
        )
    else:
        raise FileSetInvalid(f"{path} holds no adapter: {_instead(path)}", field="path")


def _refuse_several(path: Path) -> None:
    """Refuse a zip of several adapters, which an upload could not name apart."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = [PurePosixPath(one) for one in archive.namelist()]
    inside = sorted(str(one.parent) for one in names if one.name == CONFIG_FILE)
    if len(inside) > 1:
        raise FileSetInvalid(
            f"{path} holds {len(inside)} adapters: {_some(inside)}; unzip it, and add the folder, which "
            "adds them all: graftwork adapters add FOLDER",
            field="path",
        )


def _without_config(path: Path) -> Iterator[RefusedPath]:
    """Folders in a folder of adapters that have weights and nothing that says whose."""
    for weights in sorted(path.glob("*/adapter_model.*")):
        if not (weights.parent / CONFIG_FILE).is_file():
            yield RefusedPath(
                weights.parent,
                f"{weights.parent} holds {weights.name} and no {CONFIG_FILE}, so it was left out; copy "
                "the one that PEFT saved with it",
            )


def _named(path: Path, after: Path) -> AdapterPlace:
    """An adapter named after a folder or a file."""
    title = after.resolve().name
    if after.is_file():
        title = re.sub(r"(\.tar)?\.\w+$", "", title) or title
    slug = title if is_name(title) else slug_of(title)
    if slug is None:
        raise NameInvalid(f"{path}: no name follows from {title!r}; give one with --name")
    return AdapterPlace(path, slug, None if slug == title else title)


def _instead(path: Path) -> str:
    if (path / "config.json").is_file():
        return (
            "it is a whole model (config.json); an adapter's folder has adapter_config.json. Serve "
            f"the model with graftwork serve --base {path}"
        )
    names = sorted(one.name + "/" * one.is_dir() for one in path.iterdir())
    what = f"it holds {_some(names)}" if names else "it is empty"
    return f"expected {CONFIG_FILE} in it, or in folders directly in it; {what}"


def _some(names: Sequence[str]) -> str:
    if len(names) <= _MANY:
        return listed(names)
    return f"{', '.join(names[:_MANY])} and {len(names) - _MANY} more"


def _near(path: Path) -> str:
    try:
        names = [one.name for one in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
