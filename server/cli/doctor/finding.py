"""What a check of `graftwork doctor` found. Knows no check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "warning", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what, in a word or two.
        status: "fail" where something will not work, "warning" where it may surprise.
        message: what was found.
        hint: what to do; None where nothing need be done.
    """

    check: str
    status: Severity
    message: str
    hint: str | None = None


def guarded(check: str, work: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run a check; an unforeseen error becomes a finding, so that the others still run."""
    try:
        return list(work())
    except Exception as error:
        message = " ".join(str(error).split())[:400]
        return [Finding(check, "fail", f"{type(error).__name__}: {message}")]
