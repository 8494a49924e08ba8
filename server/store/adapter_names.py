"""What an adapter may be called, and the name that would do for a text that is none.

Names stand in URLs, headers, metrics and command lines, so they are plain: lower-case letters, digits,
dots, dashes, underscores. Any text of any script has a slug. Independent of the database.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

from anyascii import anyascii

from adapters.errors import NameInvalid
from adapters.field_errors import listed, quoted

MAX_CHARACTERS = 63
NAME_RULE = (
    "1 to 63 lower-case letters, digits, '.', '_' or '-', the first a letter or digit, without '..'"
)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# What one text's name can depend on; longer ones are cut first.
_MOST_READ = 200


def is_name(text: str) -> bool:
    """Whether an adapter can be called so."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def slug_of(text: str) -> str | None:
    """The nearest valid name: "Complaints EN" -> "complaints-en", "投诉分类" -> "tou-su-fen-lei".

    None for a text that has neither letters nor digits.
    """
    plain = unicodedata.normalize("NFKC", text[:_MOST_READ].encode("utf-8", "ignore").decode())
    spaced = _HUMP.sub("-", anyascii(plain)).lower()
    dashed = re.sub(r"[^a-z0-9._]+", "-", spaced)
    dashed = re.sub(r"\.\.+", ".", dashed)
    slug = dashed.strip("-._")[:MAX_CHARACTERS].strip("-._")
    return slug or None


# Comparing texts takes time, and every name that is not there would take it.
MOST_COMPARED = 500
_FEW = 5
_ALIKE = 0.7


def near_names(asked: str, known: Sequence[str]) -> list[str]:
    """The names that were probably meant, the likeliest first; at most three.

    Args:
        asked: as it came.
        known: names that exist; no more than `MOST_COMPARED` are looked at.
    """
    name = slug_of(asked)
    if name is None:
        return []
    return difflib.get_close_matches(name, known[:MOST_COMPARED], n=3, cutoff=_ALIKE)


def did_you_mean(near: Sequence[str]) -> str:
    """The end of a sentence about a name that does not exist; empty without near names."""
    return f"; did you mean {listed([quoted(one) for one in near], 'or')}?" if near else ""


def what_there_is(known: Sequence[str], where: str) -> str:
    """The end of such a sentence where no name is near: the names if they are few, else `where`."""
    if len(known) > _FEW:
        return f"; {where}"
    there = "is" if len(known) == 1 else "are"
    return f"; there {there} {listed([quoted(one) for one in known])}" if known else ""


def check_name(name: str, field: str = "name") -> None:
    """Refuse what is no name, with the one that would do.

    Raises:
        NameInvalid: it is none.
    """
    if is_name(name):
        return
    slug = slug_of(name)
    hint = "" if slug is None else f"; try {slug!r}"
    what = "alias" if field == "alias" else "adapter's name"
    raise NameInvalid(
        f"{quoted(name)} cannot be an {what}: expected {NAME_RULE}{hint}",
        field=field,
        expected=NAME_RULE if slug is None else slug,
        came=name[:80],
    )
