"""Checks of what Graftwork runs in: Python, packages, packages that hide ours, variables.

Imports nothing of Graftwork but its settings, and those only where they are checked: a package
that hides ours must not keep the doctor from reporting it.
"""

from __future__ import annotations

import difflib
import importlib.util
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from server.cli.doctor.finding import Finding

OURS = ("adapters", "server")
_DISTRIBUTION = "graftwork"
_PREFIX = "GRAFTWORK_"
# What the tests of this project read.
_TESTS = "GRAFTWORK_TEST_"


def check_python(version: str = platform.python_version()) -> Iterator[Finding]:
    """Python's version against the one that is declared."""
    wanted = metadata.metadata(_DISTRIBUTION)["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Finding("python", "ok", f"Python {version}")
    else:
        hint = f"make a virtual environment with Python {wanted}"
        yield Finding("python", "fail", f"Python {version}, expected {wanted}", hint)


def check_packages(
    declared: list[str] | None = None, installed: Mapping[str, str] | None = None
) -> Iterator[Finding]:
    """The versions of what is installed against what is declared.

    Args:
        declared: requirements; None takes those of this distribution. Extras are left out.
        installed: name -> version; None reads the environment.
    """
    if declared is None:
        declared = metadata.requires(_DISTRIBUTION) or []
    count = 0
    for line in declared:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        count += 1
        came = _version_of(wanted.name) if installed is None else installed.get(wanted.name)
        if came is None or not wanted.specifier.contains(came, prereleases=True):
            found = "not installed" if came is None else f"version {came}"
            message = f"{wanted.name}: expected {wanted.specifier or 'any version'}, came {found}"
            yield Finding(
                "packages", "fail", message, f"pip install '{line.split(';')[0].strip()}'"
            )
            count = -len(declared)
    if count >= 0:
        yield Finding("packages", "ok", f"{count} packages as declared")


def check_shadowed(
    names: tuple[str, ...] = OURS, home: Path = Path(__file__).parents[3]
) -> Iterator[Finding]:
    """Whether our two top-level packages are the ones that Python finds.

    Other projects use these names as well, AdapterHub's `adapters` above all.

    Args:
        names: of the packages.
        home: the folder that holds ours.
    """
    others = metadata.packages_distributions()
    for name in names:
        ours = home / name / "__init__.py"
        spec = importlib.util.find_spec(name)
        came = None if spec is None else spec.origin
        owners = [one for one in dict.fromkeys(others.get(name, [])) if one != _DISTRIBUTION]
        named = ", ".join(f"{one} {_version_of(one)}" for one in owners)
        hint = (
            f"pip uninstall {' '.join(owners)}, or install Graftwork in an environment of its own"
        )
        if came is None or Path(came).resolve() != ours.resolve():
            message = f"`import {name}` finds {came or 'nothing'}, expected {ours}"
            where = hint if owners else "run from another folder, or install Graftwork anew"
            yield Finding("imports", "fail", message, where)
        elif owners:
            message = f"{named} installs a package {name!r} as well; ours is found first, for now"
            yield Finding("imports", "warning", message, hint)
        else:
            yield Finding("imports", "ok", f"`import {name}` finds {Path(came).parent}")


def check_variables(environment: Mapping[str, str], known: list[str]) -> Iterator[Finding]:
    """Variables that look like settings and are none: a wrong letter is ignored in silence.

    Args:
        environment: all variables.
        known: the names of the settings, in lower case.
    """
    ours = [name for name in environment if name.upper().startswith(_PREFIX)]
    names = {f"{_PREFIX}{name.upper()}" for name in known}
    unknown = [
        name for name in ours if name.upper() not in names and not name.upper().startswith(_TESTS)
    ]
    for name in sorted(unknown):
        close = difflib.get_close_matches(name[len(_PREFIX) :].lower(), known, n=1)
        hint = "graftwork settings lists all of them"
        if close:
            hint = f"did you mean {_PREFIX}{close[0].upper()}?"
        yield Finding("settings", "warning", f"{name} is no setting, and does nothing", hint)
    if not unknown:
        yield Finding("settings", "ok", f"{len(ours)} set in the environment, all of them known")


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
