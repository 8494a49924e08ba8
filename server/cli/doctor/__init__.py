"""`graftwork doctor`: whether Graftwork would run here, and what to do where it would not.

    environment   Python, packages, packages that hide ours, variables
    machine       device, disk, port, a running server
    stores        base, data directory, database, adapters

Every check gives `Finding`s and changes nothing. What fails does not keep the others from running.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import ValidationError

from server.cli.doctor import environment
from server.cli.doctor.finding import Finding, Severity, guarded

if TYPE_CHECKING:
    from server.config.settings import Settings

__all__ = ["Finding", "Severity", "check_installation", "examine", "read_settings"]


def check_installation() -> Iterator[list[Finding]]:
    """Checks that need nothing else of Graftwork to be imported."""
    yield guarded("python", environment.check_python)
    yield guarded("packages", environment.check_packages)
    yield guarded("imports", environment.check_shadowed)


def read_settings(
    given: Mapping[str, object],
) -> tuple[Settings | None, list[Finding]]:
    """The settings, options before the environment; findings where they cannot be read."""
    # Not above: where our other packages are hidden they cannot be imported.
    from adapters.field_errors import explain
    from server.config.settings import Settings

    known = list(Settings.model_fields)
    findings = guarded("settings", lambda: environment.check_variables(os.environ, known))
    try:
        return Settings(**given), findings  # type: ignore[arg-type]
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            name = str(fault["loc"][0])
            said = explain([fault])
            message = f"GRAFTWORK_{name.upper()}: expected {said.expected}, came {said.came}"
            findings.append(Finding("settings", "fail", message, "graftwork settings lists them"))
        return None, findings


def examine(settings: Settings, url: str | None, *, deep: bool) -> Iterator[list[Finding]]:
    """Everything else, check by check.

    Args:
        settings: what a server would be started with.
        url: a running server to check too; None for none.
        deep: also hash every adapter and load the base's weights.
    """
    from server.cli.doctor import machine, stores

    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("device", lambda: machine.check_device(settings)),
        ("disk", lambda: machine.check_disk(settings.data_dir)),
        ("port", lambda: machine.check_port(settings.host, settings.port)),
        ("data directory", lambda: stores.check_data_dir(settings, deep=deep)),
    ]
    if url is not None:
        key = None if settings.api_key is None else settings.api_key.get_secret_value()
        checks.append(("server", lambda: machine.check_server(url, key)))
    for name, work in checks:
        yield guarded(name, work)
    base = None

    def check_base() -> list[Finding]:
        nonlocal base
        findings, base = stores.check_base(settings, deep=deep)
        return findings

    yield guarded("base", check_base)
    if base is not None and stores.has_adapters(settings):
        spec = base
        yield guarded("adapters", lambda: stores.check_adapters(settings, spec))
