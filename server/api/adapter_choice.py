"""Which adapter a generation request means, or why that is not clear.

The base never answers in silence for an adapter that was meant: whatever looks like an adapter in
a place where none belongs is refused. Knows names only, not whether they exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fastapi import Request

from adapters.field_errors import unknown_name
from server.errors import Contradiction, UnknownParameter

# A field with one of these in its name looks like an adapter, in any case. `model` is not among them
# everywhere: on OpenAI's routes it is where an adapter belongs.
MARKS = ("adapter", "lora", "peft")
_LOOKS_LIKE_ADAPTER = re.compile("|".join(MARKS), re.IGNORECASE)
# lorax-client sends every parameter that it knows, these as nulls by default.
LORAX_FIELDS = ("adapter_source", "merged_adapters")
# A field may be named with megabytes.
_MAX_NAME = 200


def only_query(request: Request, *known: str) -> None:
    """Refuse query parameters that the route does not have, and repeated ones.

    Raises:
        UnknownParameter: naming it and the known ones.
        Contradiction: the same parameter with two values.
    """
    for name in request.query_params:
        if name not in known:
            raise UnknownParameter(
                unknown_name(name, known, "query parameter")
                + "; this route takes none" * (not known),
                field=name,
                expected=_listed(known),
                came=name,
            )
        values = request.query_params.getlist(name)
        if len(set(values)) > 1:
            raise Contradiction(
                f"query parameter {name!r} is given {len(values)} times with different values",
                field=name,
                expected="one value",
                came=_listed(values),
            )


def chosen_adapter(query: str | None, parameter: str | None) -> str | None:
    """The one adapter that `?adapter=` and `parameters.adapter_id` name; None is the base.

    Raises:
        Contradiction: a name is empty, or the two differ.
    """
    for place, name in (("adapter", query), ("adapter_id", parameter)):
        if name is not None and not name.strip():
            raise Contradiction(
                f"{place} is empty; name an adapter, or leave it out for the base",
                field=place,
                expected="NAME, NAME@VERSION or NAME@ALIAS",
                came=repr(name),
            )
    if query is not None and parameter is not None and query != parameter:
        raise Contradiction(
            f"?adapter= says {query!r} and parameters.adapter_id says {parameter!r}",
            field="adapter_id",
            expected=query,
            came=parameter,
        )
    return query if query is not None else parameter


def refuse_stray_adapters(
    fields: Iterable[str],
    *,
    also: Sequence[str] = (),
    place: str = "?adapter= or in parameters.adapter_id",
) -> None:
    """Refuse unknown body fields that look as if they named an adapter.

    Args:
        fields: names of unknown fields.
        also: other names that are refused.
        place: where this route expects an adapter.

    Raises:
        Contradiction: naming the field and where the adapter belongs.
    """
    for name in (field[:_MAX_NAME] for field in fields):
        if name in also or _LOOKS_LIKE_ADAPTER.search(name):
            raise Contradiction(
                f"the field {name!r} looks like an adapter, and is not where one belongs; "
                f"name it in {place}",
                field=name,
                expected=f"an adapter in {place}",
                came=name,
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
